"""The evaluations of a training run: score the held-out prompts, log the metrics, show samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from rm.config.files import finite
from rm.config.options import RewardConfig
from rm.data.dataset import PreferenceData
from rm.data.plan import Layout
from rm.evaluate.metrics import evaluation_intervals, evaluation_metrics
from rm.evaluate.slices import slices
from rm.evaluate.table import evaluation_table, worst, write_table
from rm.evaluate.token_rewards import TokenRewards, token_rewards
from rm.forward import without_autocast
from rm.model.precision import cast_weights
from rm.model.reward_model import unwrapped
from rm.score.rewards import TreeList, score_prompts
from rm.visualize_samples import sample_records, visualize_samples, write_records

logger = logging.getLogger(__name__)

NUM_MISTAKES = 20  # comparisons in mistakes.jsonl
MAX_TOKEN_REWARDS = 64  # prompts of one call with token rewards: showing all prompts costs no second evaluation


class Evaluator:
    """Scores the held-out prompts, logs the metrics and shows samples. Its methods but the last two are collective.

    Args:
        run: a `rm.train.run_dir.Run`, whose directory gets tables and samples; None: nothing is written.
        log: a `rm.log.trackers.RunLog`.
    """

    def __init__(
        self,
        data: PreferenceData,
        model: nn.Module,
        accelerator: Accelerator,
        layout: Layout,
        config: RewardConfig,
        run: Any = None,
        log: Any = None,
    ):
        self.data, self.model, self.accelerator, self.layout = data, model, accelerator, layout
        self.config, self.run, self.log = config, run, log
        self.micro_batch_tokens = config.eval_micro_batch_tokens or 2 * config.micro_batch_tokens
        self.table = evaluation_table(data)

    def __call__(self, step: int) -> dict[str, float]:
        """Evaluate after optimizer step `step`; returns the metrics."""
        table = self.scored_table()  # collective
        metrics = evaluation_metrics(table, self.config)
        first = np.flatnonzero(~self.data.comparisons["index"].duplicated())  # comparison of each prompt
        rows = first[self.data.first_of_each(self.config.num_print_samples)].tolist()
        tokens = self.token_rewards(rows)  # collective
        if self.accelerator.is_main_process:
            write_table(table, self.run.file(f"eval/step-{step}.parquet"))
            self.log.log(metrics, step)
            self.warn_of_nonfinite(table)
            records = self.records(table, rows, tokens, step)
            if records:
                self.run.file(f"samples/step-{step}.jsonl")
            visualize_samples(records, step=step, output_dir=self.run.folder, run_log=self.log)
        return metrics

    def score(
        self, data: PreferenceData, rows: Sequence[int] | None = None, every_token: bool = False
    ) -> list[np.ndarray]:
        """Rewards of the N answers of each prompt of `data`, or of some (`rows`), float64 [N]; see `score_prompts`."""
        prompts = data if rows is None else TreeList(data.trees(rows))
        with cast_weights(self.model, self.config.eval_dtype):
            options = (self.layout, self.micro_batch_tokens, self.accelerator, every_token)
            return score_prompts(self.model, prompts, *options)

    def scored_table(self) -> pd.DataFrame:
        """The evaluation table with the model's rewards."""
        rewards, frame = self.score(self.data), self.data.comparisons
        num_answers = np.array([len(r) for r in rewards])
        first, flat = (np.cumsum(num_answers) - num_answers)[frame["index"]], np.concatenate(rewards)
        return self.table.assign(**{f"reward_{side}": flat[first + frame[side]] for side in ("chosen", "rejected")})

    def token_rewards(self, rows: Sequence[int]) -> list[tuple[TokenRewards, TokenRewards] | None]:
        """Token rewards (chosen, rejected) of these rows of the table; None for rows after `MAX_TOKEN_REWARDS`. An
        encoder has none: the list is empty."""
        if not unwrapped(self.model).is_causal:
            return []
        frame = self.data.comparisons.iloc[list(rows)[:MAX_TOKEN_REWARDS]]
        prompts = frame["index"].tolist()
        found: list[tuple[TokenRewards, TokenRewards] | None] = []
        values = self.score(self.data, prompts, every_token=True)
        for tree, rewards, chosen, rejected in zip(
            self.data.trees(prompts), values, frame["chosen"], frame["rejected"], strict=True
        ):
            answers = token_rewards(self.data.tokenizer, tree, rewards)
            found.append((answers[chosen], answers[rejected]))
        return found + [None] * (len(rows) - len(found))

    def details(self, step: int) -> dict[str, Any]:
        """Intervals and slices of the evaluation after `step` for results.json; writes mistakes.jsonl."""
        is_main = self.accelerator.is_main_process
        table = pd.read_parquet(self.run.folder / "eval" / f"step-{step}.parquet") if is_main else None
        (table,) = broadcast_object_list([table])
        rows = worst(table, NUM_MISTAKES)
        tokens = self.token_rewards(rows)  # collective
        if not is_main:
            return {}
        write_records(self.run.file("mistakes.jsonl"), self.records(table, rows, tokens, step))
        return {"intervals": finite(evaluation_intervals(table, self.config)), "slices": finite(slices(table))}

    def export_check(self, count: int = 8) -> dict[str, Any]:
        """Token ids and rewards of the answers of some prompts without autocast, as transformers serves the model."""
        some = TreeList(self.data.trees(range(min(count, len(self.data)))))
        with without_autocast(self.model):
            rewards = score_prompts(self.model, some, self.layout, self.micro_batch_tokens, self.accelerator)
        sequences = [ids.tolist() for tree in some.items for ids in tree.sequences()]
        return {"sequences": sequences, "rewards": np.concatenate(rewards).tolist()}

    def records(
        self, table: pd.DataFrame, rows: Sequence[int], tokens: Sequence = (), step: int | None = None
    ) -> list[dict[str, Any]]:
        """Records of these rows of the table with their texts (`rm.visualize_samples.sample_records`)."""
        texts = [self.data.comparison_texts(row) for row in rows]
        return sample_records(table, rows, texts, tokens, step=step)

    def warn_of_nonfinite(self, table: pd.DataFrame) -> None:
        """Name the comparisons whose rewards are NaN or infinite."""
        bad = np.flatnonzero(~np.isfinite(table[["reward_chosen", "reward_rejected"]]).all(axis=1))
        if len(bad):
            ids = self.data.ids(self.data.comparisons["index"].to_numpy()[bad[:10]])
            names = ", ".join(ids) + (", ..." if len(bad) > 10 else "")
            logger.warning(f"the rewards of {len(bad)} of {len(table)} evaluation pairs are not finite: {names}")
