"""Exact evaluation: every pair once, on any number of processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn

from rm.collate import COLUMNS, collate
from rm.data.mixture import PairSets
from rm.data.plan import PairLengths, plan_micro_batches
from rm.data.rows import arrays_of
from rm.evaluate.metrics import evaluation_intervals, evaluation_metrics
from rm.evaluate.rewardbench import rewardbench_metrics
from rm.evaluate.table import sets_of, without_missing
from rm.forward import concatenated_forward
from rm.model.attention import block_size
from rm.visualize_samples import sample_records

logger = logging.getLogger(__name__)


def pair_lengths(dataset) -> PairLengths:
    """The lengths of all pairs of a tokenized data set (three int64 arrays; the tokens stay on disk)."""
    columns = ("length_chosen", "length_rejected", "prefix_length")
    return PairLengths(*(values.astype(np.int64) for values in arrays_of(dataset, columns).values()))


@torch.no_grad()
def evaluate_rewards(
    model: nn.Module,
    accelerator: Accelerator,
    dataset,
    *,
    layout: str,
    micro_batch_tokens: int,
    pad_token_id: int,
) -> np.ndarray:
    """Rewards (chosen, rejected) of every pair, float64 [n, 2], in the data set's order. Collective: every rank.

    Each process scores its share and writes it into a table of zeros; the sum over processes is the whole table. So no
    row is gathered twice, and nothing depends on batches, layout or processes but for float rounding.
    """
    costs = pair_lengths(dataset).cost(layout)
    plans = plan_micro_batches(
        np.arange(len(costs)), costs, layout, micro_batch_tokens, accelerator.num_processes, block_size(model)
    )
    table = torch.zeros(
        len(costs), 3, device=accelerator.device
    )  # chosen, rejected (float32 as computed), times scored
    dataset = dataset.with_format("numpy", columns=COLUMNS)
    was_training = model.training
    model.eval()
    for micro_batch in plans[accelerator.process_index]:
        batch = collate(dataset, micro_batch, layout, pad_token_id).to(accelerator.device)
        chosen_B, rejected_B = concatenated_forward(model, batch)
        if not micro_batch.is_filler:
            scored = torch.stack([chosen_B, rejected_B, torch.ones_like(chosen_B)], dim=1)
            table[batch.index_B] += scored
    model.train(was_training)
    table = accelerator.reduce(table, "sum").cpu().numpy()  # collective
    assert (table[:, 2] == 1).all(), "a pair was scored twice or not at all"
    return table[:, :2].astype(np.float64)


def pairs_metrics(table: pd.DataFrame, *, intervals: bool = False, **options: Any) -> dict[str, Any]:
    """`rm.metrics.evaluation_metrics` of an evaluation's table (or the `intervals` of them); of RewardBench its scores.

    With several sets: of all pairs together as `eval/...`, and of each set as `eval/<set>/...`. Subsets stand under
    their set alone, and what needs a `true_margin` only where every pair has one. `options`: of the loss.
    """
    measure, sets = evaluation_intervals if intervals else evaluation_metrics, sets_of(table)

    def of_set(part: pd.DataFrame, prefix: str) -> dict[str, Any]:
        return measure(part, **options, prefix=prefix) | rewardbench_metrics(part, prefix)[intervals]

    if len(sets) == 1:
        return of_set(without_missing(table), "eval")
    metrics = measure(without_missing(table).drop(columns="subset", errors="ignore"), **options)
    for name, part in sets.items():
        metrics |= of_set(part, f"eval/{name}")
    return metrics


def warn_of_nonfinite(pairs: PairSets, table: pd.DataFrame) -> None:
    """Name the pairs whose rewards are NaN or infinite: nothing can be said of the accuracy then."""
    bad = np.flatnonzero(~np.isfinite(table[["reward_chosen", "reward_rejected"]]).all(axis=1))
    if len(bad):
        ids = ", ".join(pairs.ids(bad[:10])) + (", ..." if len(bad) > 10 else "")
        logger.warning(f"the rewards of {len(bad)} of {len(table)} evaluation pairs are not finite: {ids}")


def mistake_records(
    pairs: PairSets,
    table: pd.DataFrame,
    rows: Sequence[int],
    *,
    step: int | None = None,
    traces: Sequence[tuple[list, list] | None] | None = None,
) -> list[dict]:
    """The pairs `rows` (of `rm.evaluate.table.worst`) with their texts, as `visualize_samples` writes them."""
    return sample_records(
        [pairs.texts(int(i)) for i in rows],
        table["reward_chosen"].to_numpy()[rows],
        table["reward_rejected"].to_numpy()[rows],
        ids=pairs.ids(rows),
        sets=[pairs.set_of(int(i)) for i in rows] if pairs.are_several else None,
        step=step,
        margins=table["data_margin"].to_numpy()[rows] if table["data_margin"].any() else None,
        traces=traces,
    )
