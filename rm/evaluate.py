"""Exact evaluation: every pair once, on any number of processes.

python -m rm.evaluate --model OUT                                   # the run's own evaluation set
python -m rm.evaluate --model OUT --dataset_name pairs.jsonl        # another one; options as in train_rm.py
"""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import is_torch_tf32_available

from rm.adapters import load_trained
from rm.attention import block_size
from rm.batching import PairLengths, plan_micro_batches
from rm.collate import COLUMNS, collate
from rm.command_line import parse_config, read_yaml, split_arguments
from rm.config import ConfigError
from rm.data import arrays_of
from rm.forward import LayoutError, concatenated_forward, resolve_layout
from rm.load import DataError
from rm.metrics import evaluation_metrics
from rm.mixture import PairSets, load_pairs
from rm.model import ModelError, RewardModel, check_positions, use_cpu_kernel
from rm.precision import cast_weights, set_tf32
from rm.pretrained import check_folder, find_adapter, load_tokenizer
from rm.quantization import QUANTIZATION_OPTIONS, quantization_config
from rm.redact import safe_line


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


def pairs_metrics(
    rewards: np.ndarray, pairs: PairSets, *, center_rewards_coefficient: float | None, label_smoothing: float
) -> dict[str, float]:
    """`rm.metrics.evaluation_metrics` of the table `rewards` [n, 2], with the columns that `pairs` has.

    With several sets: of all pairs together as `eval/...`, and of each set as `eval/<set>/...`. Subsets stand under
    their set alone, and what needs a `true_margin` only where every pair has one.
    """
    measure = partial(
        evaluation_metrics, center_rewards_coefficient=center_rewards_coefficient, label_smoothing=label_smoothing
    )
    columns = {
        name: {c: part.dataset[c][:] for c in ("subset", "true_margin") if c in part.dataset.column_names}
        for name, part in pairs.sets.items()
    }
    margin = np.asarray(pairs.dataset["margin"][:])
    if not pairs.are_several:
        return measure(rewards, margin=margin, **columns.popitem()[1])
    known = [own.get("true_margin") for own in columns.values()]
    metrics = measure(rewards, margin=margin, true_margin=None if None in known else np.concatenate(known))
    for name, rows in pairs.rows().items():
        metrics |= measure(rewards[rows], margin=margin[rows], **columns[name], prefix=f"eval/{name}")
    return metrics


def main(argv: list[str]) -> dict[str, float]:
    """Evaluate a saved reward model; prints the metrics as one JSON line, the same as at the end of training."""
    given = [token.removeprefix("--") for token in argv]
    model_at = next((i for i, token in enumerate(given) if token.split("=")[0] == "model"), None)
    if model_at is None or (given[model_at] == "model" and model_at + 1 == len(argv)):
        raise ConfigError("command line: --model FOLDER is needed: the output folder of a run, or a hub name")
    name = given[model_at].partition("=")[2] or argv[model_at + 1]
    rest = argv[:model_at] + argv[model_at + (1 if "=" in given[model_at] else 2) :]
    check_folder(name)
    files, values = split_arguments(rest)
    chosen = set(values).union(*map(read_yaml, files))
    recorded = Path(name) / "config.yaml"
    base = ["--config", str(recorded)] if recorded.is_file() else []
    if chosen & {"dataset_name", "eval_dataset_name"}:
        others = "eval_fraction eval_dataset_name eval_dataset_config dataset_config dataset_weights max_eval_samples"
        base += [f"{option}=none" for option in others.split() if option not in chosen]
    if not is_torch_tf32_available():  # which the run may have had
        base += ["tf32=none"]
    config = parse_config([*base, f"model_name_or_path={name}", *rest])

    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.accelerator.is_available())
    set_tf32(config.tf32)
    tokenizer = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    with accelerator.main_process_first():
        _, pairs = load_pairs(tokenizer, **config.data_options(), only_evaluation=True)
    is_adapter = find_adapter(name) is not None  # what was merged is not quantised any more
    options = {name: getattr(config, name) for name in QUANTIZATION_OPTIONS}
    quantization = quantization_config(**options) if is_adapter else None
    options = dict(trust_remote_code=config.trust_remote_code, quantization_config=quantization)
    trained = load_trained(name, tokenizer, dtype=config.dtype, **options)
    model = RewardModel(trained)
    use_cpu_kernel(model.bare)
    check_positions(model, pairs.audit["max_tokens"])
    model = accelerator.prepare_model(model, evaluation_mode=True)
    tokens = pairs.dataset.with_format("numpy")
    is_half = accelerator.mixed_precision != "no" or quantization is not None or bool(config.tf32)
    is_half |= next(trained.parameters()).dtype != torch.float32
    layout, _ = resolve_layout(
        config.layout,
        model,
        tokens,
        pair_lengths(pairs.dataset).short_ones(),
        tokenizer.pad_token_id,
        accelerator.device,
        tolerance=5e-2 if is_half else 1e-4,
    )
    with cast_weights(model, config.eval_dtype):
        rewards = evaluate_rewards(
            model,
            accelerator,
            pairs.dataset,
            layout=layout,
            micro_batch_tokens=config.eval_micro_batch_tokens or 2 * config.micro_batch_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    metrics = pairs_metrics(
        rewards,
        pairs,
        center_rewards_coefficient=config.center_rewards_coefficient,
        label_smoothing=config.label_smoothing_factor,
    )
    if accelerator.is_main_process:
        print(json.dumps(metrics), flush=True)
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError, ModelError, LayoutError) as error:
        sys.exit(print(safe_line(f"error: {error}"), file=sys.stderr) or 2)
