"""The evaluations of a training run: score the held-out prompts, log the metrics, show samples and results."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from torch import nn

from rm.config.files import finite, write_file
from rm.config.options import RewardConfig
from rm.data.dataset import PreferenceData
from rm.data.plan import Layout
from rm.data.tokenize import Tree
from rm.evaluate.metrics import find_metric
from rm.evaluate.table import evaluation_intervals, evaluation_metrics, evaluation_table, has_several, slices, worst
from rm.forward import without_autocast
from rm.model.reward_model import cast_weights, unwrapped
from rm.score.scorer import TreeList, score_prompts
from rm.visualize_samples import sample_records, visualize_samples, write_records

logger = logging.getLogger(__name__)

NUM_MISTAKES = 20  # prompts in mistakes.jsonl
MAX_TOKEN_REWARDS = 64  # prompts of one call with token rewards: showing all prompts costs no second evaluation

Intervals = Mapping[str, tuple[float, float]]
FINAL = (  # rows of the table at the end of a run
    "eval/accuracy eval/accuracy_ceiling eval/longer_answer_baseline_accuracy eval/best_of_n_accuracy eval/kendall_tau "
    "eval/loss eval/prompt_only_baseline_loss eval/ece eval/margin eval/comparisons eval/prompts train/steps "
    "train/best_step speed/train_seconds speed/pairs_per_second"
).split()


class Evaluator:
    """Scores the held-out prompts, logs the metrics and shows samples. All methods are collective.

    `run` (`rm.train.run_dir.Run`) and `log` (`rm.log.trackers.RunLog`) get tables, samples and metrics of a training.
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
        self.answers: pd.DataFrame | None = None  # of the evaluation that was last scored, or read by `details`

    def __call__(self, step: int) -> dict[str, float]:
        """Evaluate after optimizer step `step`; returns the metrics."""
        table = self.scored_table()  # collective
        metrics = evaluation_metrics(table, self.config)
        prompts = self.data.first_of_each(self.config.num_print_samples)
        rows = np.searchsorted(self.data.comparisons["index"], prompts).tolist()  # the first comparison of each
        records = self.records(table, rows, step)  # collective
        if self.accelerator.is_main_process:
            write_file(self.run.file(f"eval/step-{step}.parquet"), table.to_parquet(index=False))
            if has_several(table):
                write_file(self.run.file(f"eval/step-{step}-answers.parquet"), self.answers.to_parquet(index=False))
            self.log.log(metrics, step)
            if records:
                self.run.file(f"samples/step-{step}.jsonl")
            visualize_samples(records, step=step, output_dir=self.run.folder, run_log=self.log)
        return metrics

    def score(
        self, data: PreferenceData, rows: Sequence[int] | None = None, every_token: bool = False
    ) -> list[np.ndarray]:
        """Rewards of the N answers of each prompt of `data`, or of some (`rows`), float64 [N]; see `score_prompts`."""
        some = data if rows is None else TreeList(data.trees(rows))
        with cast_weights(self.model, self.config.eval_dtype):
            return score_prompts(self.model, some, self.layout, self.micro_batch_tokens, self.accelerator, every_token)

    def scored_table(self) -> pd.DataFrame:
        """The evaluation table with the model's rewards; `answers` is then the table of all answers. Warns of rewards
        that are not finite."""
        rewards, frame, table = self.score(self.data), self.data.comparisons, self.table.copy()
        prompts = table.drop_duplicates("index").set_index("index")[["id", "set", "prompt"]]
        self.answers = prompts.join(self.data.answers.set_index("index")).reset_index()
        self.answers["reward"] = np.concatenate(rewards)
        for side in ("chosen", "rejected"):
            table[f"reward_{side}"] = [rewards[i][n] for i, n in zip(frame["index"], frame[side], strict=True)]
        bad = np.flatnonzero(~np.isfinite(table[["reward_chosen", "reward_rejected"]]).all(axis=1))
        if len(bad) and self.accelerator.is_main_process:
            names = ", ".join(self.data.ids(frame["index"].iloc[bad[:10]])) + (", ..." if len(bad) > 10 else "")
            logger.warning(f"the rewards of {len(bad)} of {len(table)} evaluation comparisons are not finite: {names}")
        return table

    def details(self, step: int) -> dict[str, Any]:
        """Intervals and slices of the evaluation after `step` for results.json; writes mistakes.jsonl."""
        is_main, file = self.accelerator.is_main_process, self.run.folder / "eval" / f"step-{step}.parquet"
        (table,) = broadcast_object_list([pd.read_parquet(file) if is_main else None])  # collective
        if has_several(table):
            file = file.with_stem(f"{file.stem}-answers")
            (self.answers,) = broadcast_object_list([pd.read_parquet(file) if is_main else None])  # collective
        mistakes = self.records(table, worst(table, NUM_MISTAKES), step)  # collective
        if is_main:
            write_records(self.run.file("mistakes.jsonl"), mistakes)
        return {"intervals": finite(evaluation_intervals(table, self.config)), "slices": finite(slices(table))}

    def export_check(self) -> dict[str, Any]:
        """Token ids and rewards of the answers of some prompts without autocast, as transformers serves the model."""
        some = TreeList(self.data.trees(range(len(self.data))[:8]))
        with without_autocast(self.model):
            rewards = score_prompts(self.model, some, self.layout, self.micro_batch_tokens, self.accelerator)
        sequences = [ids.tolist() for tree in some for ids in tree.sequences()]
        return {"sequences": sequences, "rewards": np.concatenate(rewards).tolist()}

    def records(self, table: pd.DataFrame, rows: Sequence[int], step: int | None = None) -> list[dict[str, Any]]:
        """Records (`sample_records`) of these rows of the table, one per prompt; the first `MAX_TOKEN_REWARDS` of a
        causal model have token rewards. A prompt with several comparisons of more than two answers is a group."""
        frame, tokens = self.data.comparisons.iloc[rows], [None] * len(rows)
        is_group = (self.data.num_answers[frame["index"]] > 2) & (frame["share"] < 1).to_numpy()
        shown = zip(rows, frame["index"], is_group, strict=True)
        texts = [self.data.texts(i) if group else self.data.comparison_texts(row) for row, i, group in shown]
        if unwrapped(self.model).is_causal:
            frame = frame[:MAX_TOKEN_REWARDS]
            prompts = frame["index"].tolist()
            values = self.score(self.data, prompts, every_token=True)  # collective
            answers = map(partial(token_rewards, self.data.tokenizer), self.data.trees(prompts), values)
            for i, (found, *sides) in enumerate(zip(answers, frame["chosen"], frame["rejected"], strict=True)):
                tokens[i] = found if is_group[i] else [found[side] for side in sides]
        return sample_records(table, rows, texts, tokens, step, self.answers)


def token_rewards(tokenizer: Any, tree: Tree, values: np.ndarray) -> list[list[list[Any]]]:
    """[[piece of text, reward after it], ...] of every answer of a prompt, from where the answers part.

    `values` are the rewards of `score_prompts` with `every_token`. The first piece is empty, and its reward that of the
    common prefix. The last reward is the answer's own; the others are the head's values there, which no loss has
    trained. The pieces together are the rest of the sequence with its special tokens; characters that several tokens
    share are one piece.
    """
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    found, sequences, start = [], tree.sequences(), len(tree.prefix)
    while start and decode(tree.prefix[max(start - 4, 0) : start]).endswith("\ufffd"):  # inside a character
        start -= 1
    for ids, rewards in zip(sequences, np.split(values, np.cumsum(list(map(len, sequences)))[:-1]), strict=True):
        rewards = [round(float(reward), 6) for reward in rewards]
        pieces = [["", rewards[start - 1]]] if start else []
        before, done = max(start - 1, 0), start
        for i in range(start, len(ids)):
            # a token adds to the text of the piece before it, since tokenizers may drop a first space
            known, text = decode(ids[before:done]), decode(ids[before : i + 1])
            if (len(text) > len(known) and not text.endswith("\ufffd")) or i + 1 == len(ids):
                pieces.append([text[len(known) :], rewards[i]])
                before, done = done, i + 1
        found.append(pieces)
    return found


# ---------------------------------------------------------------- on the terminal
def evaluation_line(step: int, metrics: Mapping[str, float], best: Sequence[Any] | None = None) -> str:
    """Accuracies and loss after an evaluation; `best`: name, value and step of the best evaluation so far."""
    accuracy, low, high = (metrics[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
    line = f"step {step}: held-out accuracy {accuracy:.3f} (95% interval {low:.2f} to {high:.2f})"
    line += "".join(f", {name} {metrics[f'eval/{name}/accuracy']:.3f}" for name in sets_in(metrics))
    if "eval/best_of_n_accuracy" in metrics:
        line += f", best-of-N accuracy {metrics['eval/best_of_n_accuracy']:.3f}"
    line += f", loss {metrics['eval/loss']:.3f}"
    if best is not None:
        name = "" if best[0] == "eval/accuracy" else best[0].removeprefix("eval/") + " "
        line += f"; best {name}{best[1]:.3f} at step {best[2]}"
    return line


def final_table(summary: Mapping[str, Any], intervals: Intervals) -> Table:
    """About ten numbers of a run, and the accuracy of each evaluation set, in 80 columns."""
    names = [FINAL[0], *(f"eval/{name}/accuracy" for name in sets_in(summary)), *FINAL[1:]]
    return metrics_table("Results", {name: summary[name] for name in names if name in summary}, intervals)


def metrics_table(title: str, values: Mapping[str, Any], intervals: Intervals, with_meaning: bool = False) -> Table:
    """A row for each metric, by its logged name."""
    table = Table(title=Text(title), title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ["metric", "value", "95% interval", "unit", "meaning"][: 4 + with_meaning]:
        justify = "right" if column in ("value", "95% interval") else "left"
        table.add_column(column, justify=justify, no_wrap=justify == "right", overflow="fold")  # numbers stay whole
    for name, value in values.items():
        if name.endswith(("_low", "_high")):
            continue
        low, high = intervals.get(name, (values.get(f"{name}_low"), values.get(f"{name}_high")))
        ends = "" if low is None or math.isnan(low) else f"{number(low)} to {number(high)}"
        definition = find_metric(name)
        cells = [name, number(value), ends, definition.unit, definition.meaning]
        table.add_row(*map(Text, cells[: 4 + with_meaning]))
    return table


def number(value: Any) -> str:
    """Four significant digits; counts in full."""
    return f"{value:,}" if isinstance(value, int) else f"{float(value):.4g}"


def sets_in(names: Iterable[str]) -> list[str]:
    """The evaluation sets in names of metrics, if there are several."""
    return [found[1] for found in (re.fullmatch("eval/([^/]+)/loss", name) for name in names) if found]
