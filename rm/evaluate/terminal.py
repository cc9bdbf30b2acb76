"""What an evaluation says, as tables for the terminal: every number with its unit and its 95% interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

MEANING = {  # of `rm.evaluate.metrics.evaluation_metrics`, in the order of the table: (unit, what it is)
    "pairs": ("pairs", "pairs evaluated, each once"),
    "prompts": ("prompts", "different prompts among them, which the intervals are drawn over"),
    "accuracy": ("fraction", "chosen has the higher reward; a tie counts half"),
    "accuracy_ceiling": ("fraction", "the best possible accuracy, where the true reward is known"),
    "null_length_accuracy": ("fraction", "accuracy of a null model: the longer answer wins"),
    "ties": ("fraction", "both answers have the same reward"),
    "loss": ("nats", "the training loss on these pairs"),
    "null_prompt_loss": ("nats", "loss of a null model that sees the prompt alone (its accuracy is 0.5)"),
    "prompt_share": ("fraction", "share of the rewards' variance that is the prompt's (ICC)"),
    "brier": ("", "mean of (1 - p)^2, p = sigmoid(margin); a coin has 0.25"),
    "ece": ("fraction", "expected calibration error: |accuracy - confidence|, ten bins"),
    "temperature": ("", "T that fits sigmoid(margin / T) best; above 1: too sure; inf: no better than chance"),
    "margin": ("reward", "mean of r_chosen - r_rejected"),
    "margin_q05": ("reward", "its quantiles: 5%"),
    "margin_q25": ("reward", "25%"),
    "margin_q50": ("reward", "50%, the median"),
    "margin_q75": ("reward", "75%"),
    "margin_q95": ("reward", "95%"),
    "spearman_true_margin": ("", "rank correlation of the margin with the true one"),
    "margin_length_spearman": ("", "rank correlation of the margin with the difference in length"),
    "reward_length_spearman": ("", "rank correlation of the reward with the answer's length"),
    "reward_chosen": ("reward", "mean reward of the chosen answers"),
    "reward_rejected": ("reward", "mean reward of the rejected answers"),
    "reward_mean": ("reward", "mean of all rewards"),
    "reward_std": ("reward", "their standard deviation"),
    "reward_min": ("reward", "the smallest"),
    "reward_max": ("reward", "the largest"),
}
PARTS = {  # of `rm.breakdown`
    "by_set": "evaluation set",
    "by_subset": "subset",
    "by_margin": "|margin| (reward)",
    "by_data_margin": "margin in the data",
    "by_length_difference": "length chosen - rejected (tokens)",
    "reliability": "confidence max(p, 1 - p)",
}


WIDE = 110  # columns of a terminal


def number(value: float) -> str:
    """Four significant digits, counts in full."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None or any(map(math.isnan, ends)) else f"{number(ends[0])} to {number(ends[1])}"


def metrics_table(
    metrics: Mapping[str, float], intervals: Mapping[str, tuple], prefix: str, title: str, width: int = WIDE
) -> Table:
    """The metrics `prefix/…` that `MEANING` knows; what they mean where the terminal is wide enough."""
    columns = ("metric", "value", "95% interval", "unit", *["meaning"] * (width >= WIDE))
    table = _table(title, columns, right=(1, 2))
    for name, (unit, meaning) in MEANING.items():
        if (key := f"{prefix}/{name}") in metrics:
            ends = intervals.get(key)
            if ends is None and f"{key}_low" in metrics:  # of one prompt the accuracy alone has an interval
                ends = (metrics[f"{key}_low"], metrics[f"{key}_high"])
            cells = [name, number(metrics[key]), interval(ends), unit, Text(meaning, "dim")]
            table.add_row(*cells[: len(columns)])
    return table


def score_table(metrics: Mapping[str, float], intervals: Mapping[str, tuple], title: str) -> Table:
    """All metrics that `intervals` has, fractions, by their whole names."""
    table = _table(title, ("score", "value", "95% interval", "prompts or pairs"), right=(1, 2, 3))
    for name, ends in intervals.items():
        group = name.rpartition("/")[0]
        count = next((metrics[key] for key in (f"{group}/prompts", f"{group}/pairs") if key in metrics), None)
        table.add_row(Text(name), number(metrics[name]), interval(ends), "" if count is None else number(count))
    return table


def breakdown_table(name: str, part: Sequence[Mapping]) -> Table:
    """One of the parts that `rm.evaluate.slices.breakdowns` returns."""
    columns = (
        PARTS[name],
        "pairs",
        "accuracy (fraction)",
        "95% interval",
        *(["mean confidence"] if name == "reliability" else []),
    )
    table = _table("Accuracy by " + PARTS[name], columns, right=(1, 2, 3, 4))
    for row in part:
        cells = [number(row["pairs"]), number(row["accuracy"]), interval((row["accuracy_low"], row["accuracy_high"]))]
        cells += [number(row["confidence"])] if name == "reliability" else []
        table.add_row(Text(row["bin"]), *cells)
    return table


def comparison_table(values: Mapping[str, float], intervals: Mapping[str, tuple], names: tuple[str, str]) -> Table:
    """What `rm.evaluate.compare.compare_tables` returns, of the models `names`."""
    title = f"{names[0]} (this) and {names[1]} (other) on the {values['compare/pairs']:,} pairs that both have"
    table = _table(title, ("metric", "this", "other", "this - other", "95% interval", "unit"), right=(1, 2, 3, 4))
    for key in values:
        if key.endswith("_difference"):
            name = key.removeprefix("compare/").removesuffix("_difference")
            cells = (values[f"compare/{name}"], values[f"compare/other_{name}"], values[key])
            table.add_row(name, *map(number, cells), interval(intervals.get(key)), MEANING[name][0])
    for name in ("agreement", "only_this_right", "only_other_right"):
        value, ends = values[f"compare/{name}"], intervals.get(f"compare/{name}")
        table.add_row(name, number(value), "", "", interval(ends), "fraction")
    table.caption = "agreement, only_…_right: shares of pairs that both order alike, that one alone has right"
    table.caption_justify = "left"
    return table


def _table(title: str, columns: tuple[str, ...], right: tuple[int, ...]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        is_text = 0 < i == len(columns) - 1 and i not in right
        table.add_column(column, justify="right" if i in right else "left", no_wrap=not is_text, overflow="fold")
    return table
