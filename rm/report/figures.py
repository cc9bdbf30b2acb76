"""Which pictures a report has: of one run's training, of an evaluation's table, of several runs together.

Each is there if its numbers are. The functions import `rm.plots`, and with it matplotlib, when they draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from rm.evaluate.slices import by_data_margin, by_length_difference, by_margin, by_set, by_subset, reliability
from rm.evaluate.statistics import accuracy
from rm.loss import pairwise_loss
from rm.report.read_run import Run, number

MAX_INTERVALS = 40  # evaluations whose tables are read for the intervals on the curves
MAX_ROWS = 40  # of a figure of subsets
Z = 1.959964  # standard errors in half of a 95% interval
INTERVAL = "Bars are 95% intervals"
Intervals = dict[str, tuple[pd.Series, pd.Series]]  # {metric without eval/: (low, high) by step}
BY_PROMPT = "the mean ± 1.96 standard errors, pairs of one prompt taken together"


@dataclass(frozen=True)
class Picture:
    """A drawing with what stands around it. `table`: the numbers in it, where they are few."""

    key: str
    title: str
    caption: str
    svg: str
    table: pd.DataFrame | None = field(default=None, repr=False)


def training_pictures(run: Run, intervals: Intervals) -> Iterator[Picture]:
    """Curves over the steps of one run, with its evaluations and their `evaluation_intervals` on them."""
    from rm.report.plots import Line, curves, svg

    def lines(*names: str) -> list[Line]:
        """Training and evaluation lines of each metric, those that were logged."""
        found = []
        for i, name in enumerate(names):
            prefix = f"{name.removeprefix('reward_')}, " if len(names) > 1 else ""
            if (y := run.curve(f"train/{name}")).notna().any():
                look = dict(look=i, dashes=0) if len(names) > 1 else dict(look=0)
                found.append(Line(f"{prefix}training", y, **look))
            if (y := run.curve(f"eval/{name}")).notna().any():
                low, high = intervals.get(name, (None, None))
                look = dict(look=i, dashes=1) if len(names) > 1 else dict(look=1)
                found.append(Line(f"{prefix}held out", y, low=low, high=high, has_markers=True, **look))
        return found

    every = "Training values are means over the pairs since the log line before"
    held_out = f"held-out values are of the whole evaluation set. {INTERVAL}"
    wanted = [
        ("loss", "Loss", "loss (nats)", ("loss",), f"{every}; {held_out}: {BY_PROMPT}. Guessing costs 0.693."),
        ("accuracy", "Accuracy", "accuracy (fraction of pairs)", ("accuracy",), f"{every}; {held_out}."),
        (
            "margin",
            "Margin: reward of chosen minus reward of rejected",
            "margin (reward)",
            ("margin",),
            f"{every}; {held_out}: {BY_PROMPT}.",
        ),
        (
            "rewards",
            "Mean reward of chosen and of rejected answers",
            "reward",
            ("reward_chosen", "reward_rejected"),
            f"{every}; {held_out}: {BY_PROMPT}. Only differences of rewards mean something, "
            "so both may drift together.",
        ),
    ]
    ceiling = run.curve("eval/accuracy_ceiling").dropna()
    for key, title, ylabel, names, caption in wanted:
        references = []
        if key == "accuracy":
            references = [(0.5, "guessing")]
            references += [(ceiling.iloc[-1], f"best possible, {ceiling.iloc[-1]:.3f}")] if len(ceiling) else []
        found = lines(*names)
        if found:
            drawing = svg(curves(found, ylabel, references=references), key, title)
            yield Picture(key, title, caption + _gaps(line.y for line in found), drawing)

    sets = [name for name in sets_of(run) if run.curve(f"eval/{name}/accuracy").notna().any()]
    if len(sets) > 1:
        found = [
            Line(
                name,
                run.curve(f"eval/{name}/accuracy"),
                look=i,
                low=run.curve(f"eval/{name}/accuracy_low"),
                high=run.curve(f"eval/{name}/accuracy_high"),
                has_markers=True,
            )
            for i, name in enumerate(sets[:6])
        ]
        caption = f"Held-out accuracy of each set at every evaluation. {INTERVAL}."
        caption += f" The first 6 of {len(sets)} sets." if len(sets) > 6 else ""
        drawing = svg(curves(found, "accuracy (fraction of pairs)"), "set-curves", "Accuracy of each evaluation set")
        yield Picture("set-curves", "Accuracy of each evaluation set", caption, drawing)

    clip = number(run.config.get("max_grad_norm"))
    one = "At the step of each log line"
    for key, title, ylabel, names, caption in [
        ("learning-rate", "Learning rate", "learning rate", ("learning_rate", "head_learning_rate"), f"{one}."),
        ("grad-norm", "Gradient norm", "norm before clipping", ("grad_norm",), f"{one}, of the whole gradient."),
    ]:
        labels = {"head_learning_rate": "the reward head", "learning_rate": "all else", "grad_norm": "gradient norm"}
        found = [(labels[name], run.curve(f"optim/{name}")) for name in names]
        found = [Line(label, y, look=i) for i, (label, y) in enumerate(found) if y.notna().any()]
        references = [(clip, f"clipped to {clip:g}")] if key == "grad-norm" and clip > 0 else []
        if found:
            drawing = svg(curves(found, ylabel, log=key == "grad-norm", references=references), key, title)
            yield Picture(key, title, caption + _gaps(line.y for line in found), drawing)
    if (y := run.curve("speed/pairs_per_second")).notna().any():
        caption = (
            "Pairs of all processes per second of training since the log line before, without evaluation and saving."
        )
        drawing = svg(curves([Line("speed", y)], "pairs per second"), "speed", "Speed")
        yield Picture("speed", "Speed", caption, drawing)


def evaluation_pictures(table: pd.DataFrame, key: str = "", run: Run | None = None) -> Iterator[Picture]:
    """Pictures of one evaluation from its per-pair table. `key` goes in front of their keys, to tell sets apart.

    `run`: whose final metrics the table is of; they stand in the captions.
    """
    from rm.report.plots import accuracy_bins, histogram, reliability_diagram, scatter, svg

    num_pairs, table = len(table), with_finite_rewards(table)
    if table.empty:
        return
    left_out = f" Left out: {num_pairs - len(table):,} of {num_pairs:,} pairs, whose rewards are not finite."
    left_out = left_out if len(table) < num_pairs else ""
    chosen, rejected = table["reward_chosen"].to_numpy(), table["reward_rejected"].to_numpy()
    margin = chosen - rejected
    count = f"{len(table):,} pair{'s' if len(table) != 1 else ''}"

    def picture(name: str, title: str, caption: str, figure: Any, numbers: pd.DataFrame | None = None) -> Picture:
        return Picture(key + name, title, caption + left_out, svg(figure, key + name, title), numbers)

    title = "Rewards of chosen and of rejected answers"
    columns = [("chosen", chosen), ("rejected", rejected)]
    caption = f"{count}. The more the two overlap, the less reward tells them apart (pairs of different prompts too)."
    yield picture("reward-histogram", title, caption, histogram(columns, "reward", "answers"))
    caption = f"{count}: {np.sum(margin > 0):,} right, {np.sum(margin < 0):,} wrong, {np.sum(margin == 0):,} ties."
    figure = histogram([("margin", margin)], "margin: reward of chosen - reward of rejected", "pairs", split=True)
    yield picture("margin-histogram", "Margins", caption, figure)
    bins = reliability(table)
    if len(bins):
        caption = (
            "Can the probabilities be believed? Confidence is sigmoid(|margin|), the probability that the model gives "
            f"to the answer it prefers; dots below the dotted line are overconfident. {INTERVAL}."
        )
        yield picture("reliability", "Calibration", caption, reliability_diagram([("model", bins)]), bins)
    guess = [(0.5, "guessing"), (float(accuracy(margin)), "all pairs")]
    tokens = "chosen - rejected (tokens)"
    breakdowns = [
        ("by-set", "Accuracy by evaluation set", "set", by_set, ""),
        ("by-subset", "Accuracy by subset", "subset", by_subset, "By the data's column subset."),
        ("by-margin", "Accuracy by size of the margin", "|margin| (reward)", by_margin, "How sure the model is."),
        ("by-data-margin", "Accuracy by the data's margin", "margin", by_data_margin, "How clear the preference is."),
        ("by-length", "Accuracy by length difference", tokens, by_length_difference, "Does the longer answer win?"),
    ]
    for name, title, what, make, caption in breakdowns[0 if table["set"].nunique() > 1 else 1 :]:
        bins = make(table)
        if not len(bins):
            continue
        shown = bins if len(bins) <= MAX_ROWS else bins.loc[bins["pairs"].nlargest(MAX_ROWS).sort_index().index]
        caption += f" {INTERVAL}; the number of pairs stands at the right."
        caption += f" The {MAX_ROWS} largest of {len(bins)}; all are in the table." if len(shown) < len(bins) else ""
        yield picture(name, title, caption.strip(), accuracy_bins(shown, what, guess), bins)

    lengths = [(table[f"length_{side}"] - table["prefix_length"]).to_numpy(float) for side in ("chosen", "rejected")]
    groups = [("chosen", lengths[0], chosen), ("rejected", lengths[1], rejected)]
    what = "means in bins of equal counts with 95% intervals (1.96 standard errors)"
    for name, title, points, xlabel, ylabel in (
        ("length", "Reward against length", groups, "length of the answer (tokens)", "reward"),
        (
            "length-difference",
            "Margin against length difference",
            [("pairs", lengths[0] - lengths[1], margin)],
            "tokens of chosen - tokens of rejected",
            "margin (reward)",
        ),
    ):
        figure, are_many = scatter(points, xlabel, ylabel)
        points_are = "each point an answer" if name == "length" else "each point a pair"
        cells = "the stronger a cell, the more points in it" if are_many else points_are
        metric = "eval/reward_length_spearman" if name == "length" else "eval/margin_length_spearman"
        caption = f"{count}; {cells}; lines are {what}. {rank_correlation(run, metric)}"
        yield picture(name, title, caption.strip(), figure)
    if "true_margin" in table and table["true_margin"].notna().any():
        true = table["true_margin"].to_numpy(dtype=float)
        figure, _ = scatter([("pairs", true, margin)], "true margin (log-odds)", "learned margin")
        caption = (
            f"{np.isfinite(true).sum():,} pairs whose labels were drawn from a known reward: the margin should grow "
        )
        caption += f"with the true one, one for one. {rank_correlation(run, 'eval/spearman_true_margin')}"
        yield picture("true-margin", "Learned against true margin", caption.strip(), figure)


def comparison_pictures(runs: Sequence[Run], intervals: Sequence[Intervals]) -> Iterator[Picture]:
    """The curves of several runs in one drawing each, and their calibration."""
    from rm.report.plots import Line, curves, reliability_diagram, svg

    guessing = {"loss (nats)": math.log(2), "accuracy (fraction of pairs)": 0.5}
    for name, title, ylabel in (
        ("eval/loss", "Held-out loss", "loss (nats)"),
        ("eval/accuracy", "Held-out accuracy", "accuracy (fraction of pairs)"),
        ("eval/margin", "Held-out margin", "margin (reward)"),
        ("train/loss", "Training loss", "loss (nats)"),
        ("train/accuracy", "Training accuracy", "accuracy (fraction of pairs)"),
        ("optim/learning_rate", "Learning rate", "learning rate"),
        ("optim/grad_norm", "Gradient norm", "norm before clipping"),
        ("speed/pairs_per_second", "Speed", "pairs per second"),
    ):
        found, is_held_out = [], name.startswith("eval/")
        for i, run in enumerate(runs):
            if (y := run.curve(name)).notna().any():
                low, high = intervals[i].get(name.removeprefix("eval/"), (None, None)) if is_held_out else (None, None)
                found.append(Line(run.name, y, look=i, low=low, high=high, has_markers=is_held_out))
        if found:
            guess = [(guessing[ylabel], "guessing")] if ylabel in guessing else []
            figure = curves(found, ylabel, log=name == "optim/grad_norm", references=guess)
            key = "cmp-" + name.replace("/", "-")
            caption = f"At every evaluation. {INTERVAL}." if is_held_out else "At every log line."
            yield Picture(key, title, caption + _gaps(line.y for line in found), svg(figure, key, title))
    tables = [(run.name, run.table()) for run in runs]
    bins = [(name, reliability(with_finite_rewards(table))) for name, table in tables if table is not None]
    bins = [(name, part) for name, part in bins if len(part)]
    if bins:
        caption = f"Accuracy against the probability that the model gives to the answer it prefers. {INTERVAL}."
        drawing = svg(reliability_diagram(bins), "cmp-reliability", "Calibration")
        yield Picture("cmp-reliability", "Calibration", caption, drawing)


# ---------------------------------------------------------------- numbers


def with_finite_rewards(table: pd.DataFrame) -> pd.DataFrame:
    """The pairs of a per-pair table whose two rewards are finite."""
    return table[np.isfinite(table[["reward_chosen", "reward_rejected"]].to_numpy(dtype=float)).all(axis=1)]


def sets_of(run: Run) -> list[str]:
    """The names of the evaluation sets, if there are several."""
    sets = (run.data.get("test") or {}).get("sets")
    return list(sets) if isinstance(sets, dict) and len(sets) > 1 else []


def mean_interval(values: np.ndarray, prompt: np.ndarray | None = None) -> tuple[float, float]:
    """95% interval of a mean, 1.96 standard errors to each side, with the values of one prompt as one observation
    (Liang and Zeger 1986); NaN for a single observation."""
    groups = np.arange(len(values)) if prompt is None else prompt
    mean = values.mean()
    sums = pd.Series(values - mean).groupby(groups).sum()
    half = math.nan
    if len(sums) > 1:
        half = Z * math.sqrt(float((sums**2).sum()) * len(sums) / (len(sums) - 1)) / len(values)
    return mean - half, mean + half


def evaluation_intervals(run: Run) -> Intervals:
    """95% intervals of the held-out metrics: of accuracy as logged, of the others from the per-pair tables."""
    found = {"accuracy": (run.curve("eval/accuracy_low").dropna(), run.curve("eval/accuracy_high").dropna())}
    rows: dict[str, dict[int, tuple[float, float]]] = {}
    steps = run.table_steps()
    logged = run.curve("eval/loss")
    for step in steps[:: -(-len(steps) // MAX_INTERVALS) or 1]:
        table = run.table(step)
        if table is None or not np.isfinite(table[["reward_chosen", "reward_rejected"]].to_numpy(dtype=float)).all():
            continue
        prompt = table["prompt"].to_numpy()
        values = {name: table[name].to_numpy(dtype=float) for name in ("reward_chosen", "reward_rejected")}
        values["margin"] = values["reward_chosen"] - values["reward_rejected"]
        values["loss"] = _losses(table, run.config)
        if abs(values["loss"].mean() - logged.get(step, math.nan)) > 1e-4:  # it was computed in another way
            del values["loss"]
        for name, column in values.items():
            rows.setdefault(name, {})[step] = mean_interval(column, prompt)
    for name, by_step in rows.items():
        low, high = (pd.Series({step: ends[i] for step, ends in by_step.items()}) for i in range(2))
        found[name] = (low.dropna(), high.dropna())
    return found


def _losses(table: pd.DataFrame, config: dict[str, Any]) -> np.ndarray:
    columns = [table[name].to_numpy(dtype=float) for name in ("reward_chosen", "reward_rejected")]
    columns.append(table["data_margin"].to_numpy(dtype=float))
    loss = pairwise_loss(
        *(torch.from_numpy(np.array(column)) for column in columns),
        center_rewards_coefficient=config.get("center_rewards_coefficient"),
        label_smoothing=config.get("label_smoothing_factor") or 0.0,
    )
    return loss.numpy()


def rank_correlation(run: Run | None, name: str) -> str:
    """A rank correlation among the final metrics of `run` with its 95% interval, as a sentence; empty if unknown."""
    value = math.nan if run is None else run.final.get(name, math.nan)
    if not math.isfinite(value):
        return ""
    ends = run.interval(name)
    interval = f", 95% interval {ends[0]:.2f} to {ends[1]:.2f}" if ends else ""
    return f"Spearman's rank correlation {value:.2f}{interval} ({name})."


def _gaps(curves: Any) -> str:
    """A sentence on the values that are NaN or infinite, if there are any."""
    missing = sum(int((~np.isfinite(y.to_numpy(dtype=float))).sum()) for y in curves)
    return (
        f" Left out: {missing} value{'s' if missing > 1 else ''} that {'are' if missing > 1 else 'is'} not finite."
        * (missing > 0)
    )
