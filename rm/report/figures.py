"""The figures of report.html: what each one shows, and matplotlib drawings of it as inline SVG.

A figure is planned as (key, title, function, *arguments); the function returns (Figure, caption, table of the numbers
or None), or None without numbers to draw. Drawings have the colours of the light scheme; the style sheet of the page
replaces each by a CSS variable. Besides its colour every series has its own line style or marker.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rm.evaluate.table import by_data_margin, by_length_difference, by_margin, by_set, by_subset, reliability
from rm.report.read_run import Notes, Run

PALETTE = {  # CSS variable: colour in the light scheme
    "paper": "#ffffff", "ink": "#1b1f24", "muted": "#59626e", "grid": "#dde1e6",
    "c1": "#0062a8", "c2": "#b8460a", "c3": "#00734f", "c4": "#8f3f87", "c5": "#7a6300", "c6": "#4a4f57",
}  # fmt: skip
PAPER, INK, MUTED, GRID, *COLOURS = PALETTE.values()
DASHES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (8, 3)))
MARKERS = ("o", "^", "s", "D", "v", "P")
NUM_LOOKS = len(COLOURS)  # series that can be told apart in one figure
SIZE, SMALL = (4.4, 3.1), (3.3, 1.5)  # inches; text of 10 points is then about 11 pixels on a phone
MAX_MARKERS, MAX_POINTS = 50, 1_000  # of a curve; of a scatter plot
MAX_ROWS = 40  # slices in one figure
SIDES = ("chosen", "rejected")
Made = tuple[Figure, str, pd.DataFrame | None] | None
BARS, LINES = " Bars are 95% intervals.", "Values at each log line."


def draw(plans: Sequence[tuple], notes: Notes, prefix: str = "") -> list[dict[str, Any]]:
    """What the template needs of each figure that has numbers; what cannot be drawn becomes a note."""
    drawings = [notes.attempt(f'the figure "{plan[1]}"', _draw, prefix + plan[0], *plan[1:]) for plan in plans]
    return [drawing for drawing in drawings if drawing]


def _draw(key: str, title: str, make: Callable[..., Made], *arguments: Any) -> dict[str, Any] | None:
    sheet, file = Path(__file__).with_suffix(".mplstyle"), io.StringIO()
    with matplotlib.style.context(["default", sheet, {"svg.hashsalt": key}]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the measuring font lacks, and of edited numbers that overflow
        if (made := make(*arguments)) is None:
            return None
        figure, caption, table = made
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if len(labels) > 1:  # above the axes, where the legend hides no data
            look = dict(ncols=1 if max(map(len, labels)) > 24 else 2, borderaxespad=0.2, columnspacing=1.2)
            figure.legend(handles, labels, loc="outside upper left", **look)
        figure.draw_without_rendering()  # makes ticks and layout
        figure.set_layout_engine("none")
        for i, artist in enumerate(figure.findobj()):
            artist.set_gid(f"{key}-{i}")  # ids are unique in a page
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()[file.getvalue().index("<svg") :]  # without the XML declaration
    return {"key": key, "title": title, "svg": svg, "caption": caption, "table": table}


# ---------------------------------------------------------------- curves over optimizer steps
def training(run: Run) -> list[tuple]:
    """Curves of one run, with those of its evaluations."""
    splits, names = {"training": "train", "held out": "eval"}.items(), ("loss", "accuracy", "margin")
    loss, accuracy, margin = ({split: f"{part}/{name}" for split, part in splits} for name in names)
    rewards = {f"{side}, {split}": f"{part}/reward_{side}" for split, part in splits for side in SIDES}
    sets = {name: f"eval/{name}/accuracy" for name in run.sets[:NUM_LOOKS]}
    rates = {"all other weights": "optim/learning_rate", "reward head": "optim/head_learning_rate"}
    ceiling, clip = run.final.get("eval/accuracy_ceiling"), run.config.get("max_grad_norm")
    known = [(0.5, "guessing")] + ([(ceiling, f"best possible, {ceiling:.3f}")] if ceiling else [])
    clipped = [(clip, f"clipped to {clip}")] if clip else []
    means = f"Training values are means since the previous log line.{BARS}"
    drift = f"{means} Only differences of rewards are trained: both may drift together."
    speed = "Comparisons per second of all processes since the previous log line, without evaluation and saving."
    plans = [
        ("loss", "Loss", loss, "loss (nats)", means, guessing([run])),
        ("accuracy", "Accuracy", accuracy, "accuracy", means, known),
        ("margin", "Margin: reward of chosen minus reward of rejected", margin, "reward", means),
        ("rewards", "Mean reward of chosen and rejected answers", rewards, "reward", drift),
        ("set-curves", "Accuracy of each evaluation set", sets, "accuracy", f"{NUM_LOOKS} at most.{BARS}"),
        ("learning-rate", "Learning rate", rates, "learning rate", LINES),
        ("grad-norm", "Gradient norm", {"norm": "optim/grad_norm"}, "norm before clipping", LINES, clipped, True),
        ("speed", "Speed", {"speed": "speed/pairs_per_second"}, "comparisons per second", speed),
    ]
    return [
        (key, title, curves, {label: run.curve(metric) for label, metric in metrics.items()}, *more)
        for key, title, metrics, *more in plans
    ]


def comparison(runs: Sequence[Run]) -> list[tuple]:
    """Curves of several runs."""
    half, guess = [(0.5, "guessing")], guessing(runs)
    plans = [
        ("cmp-eval-accuracy", "Held-out accuracy", "eval/accuracy", "accuracy", f"At each evaluation.{BARS}", half),
        ("cmp-eval-loss", "Held-out loss", "eval/loss", "loss (nats)", f"At each evaluation.{BARS}", guess),
        ("cmp-train-loss", "Training loss", "train/loss", "loss (nats)", LINES, guess),
    ]
    return [(key, title, curves, {run.name: run.curve(of) for run in runs}, *more) for key, title, of, *more in plans]


def guessing(runs: Sequence[Run]) -> list[tuple[float, str]]:
    """The loss of equal rewards as a reference line, if it is known and about the same in all runs."""
    losses = {run.final.get("eval/prompt_only_baseline_loss", math.nan) for run in runs}
    return [(min(losses), f"guessing, {min(losses):.3f}")] if np.ptp(list(losses)) < 5e-4 else []


def curves(
    lines: dict[str, pd.DataFrame], ylabel: str, caption: str, references: Sequence = (), log: bool = False, size=SIZE
) -> Made:
    """A line for each `Run.curve` by label, with bars for intervals.

    `references`: horizontal lines, (value, label). `log`: a logarithmic axis where values spread.
    """
    figure, values = Figure(figsize=size), np.concatenate([[], *(curve["value"] for curve in lines.values())])
    axes, finite = figure.subplots(), values[np.isfinite(values)]
    if not len(finite):
        return None
    for i, (label, curve) in enumerate(lines.items()):
        marker, known = MARKERS[i] if len(curve) <= MAX_MARKERS else "", curve.dropna()
        if curve["value"].notna().any():
            axes.plot(curve["value"], marker=marker, color=COLOURS[i], linestyle=DASHES[i], label=short(label, 44))
        axes.errorbar(known.index, known["value"], bars(known, "value"), color=COLOURS[i], linewidth=1, fmt="none")
    for i, (value, label) in enumerate(references):
        axes.axhline(value, color=INK, linewidth=1, linestyle=(":", (0, (1, 3)))[i], label=label)
    if log and 0 < 30 * finite.min() < finite.max():
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    gaps = len(values) - len(finite)
    return figure, caption + f" Left out: {gaps} that are not finite." * (gaps > 0), None


# ---------------------------------------------------------------- one evaluation
def evaluation(run: Run, table: pd.DataFrame) -> list[tuple]:
    """Figures of an evaluation table, or of its part for one set."""
    rewards = {side: table[f"reward_{side}"] for side in SIDES}
    lengths = {side: table[f"length_{side}"] - table["prefix_length"] for side in SIDES}
    margin, longer = rewards["chosen"] - rewards["rejected"], lengths["chosen"] - lengths["rejected"]
    halves = {"chosen higher (right)": margin[margin >= 0], "rejected higher (wrong)": margin[margin < 0]}
    answers, pairs = {side: (lengths[side], rewards[side]) for side in SIDES}, {"comparisons": (longer, margin)}
    true = {"comparisons": (table["true_margin"], margin)} if "true_margin" in table else {}
    count, tokens = f"{len(table):,} comparison{'s' * (len(table) != 1)}", "chosen - rejected (tokens)"
    signs = f"{count}: {(margin > 0).sum():,} right, {(margin < 0).sum():,} wrong, {(margin == 0).sum():,} ties."
    accuracy = run.final.get("eval/accuracy", math.nan)
    length, difference, known = (
        f" Spearman's rank correlation {run.final[name]:.2f} ({name})." if name in run.final else ""
        for name in ("eval/reward_length_spearman", "eval/margin_length_spearman", "eval/spearman_true_margin")
    )
    plans = [
        ("reward-histogram", "Rewards of chosen and rejected answers", histogram, rewards, "reward", count),
        ("margin-histogram", "Margins", histogram, halves, "reward of chosen - reward of rejected", signs),
        ("reliability", "Calibration", calibration, table),
        ("by-set", "Accuracy by evaluation set", slices, by_set, table, "set", accuracy),
        ("by-subset", "Accuracy by subset", slices, by_subset, table, "subset", accuracy),
        ("by-margin", "Accuracy by size of the margin", slices, by_margin, table, "|margin| (reward)", accuracy),
        ("by-data-margin", "Accuracy by margin of the data", slices, by_data_margin, table, "margin", accuracy),
        ("by-length", "Accuracy by length difference", slices, by_length_difference, table, tokens, accuracy),
        ("length", "Reward against length", scatter, answers, "length of the answer (tokens)", "reward", length),
        ("length-difference", "Margin against length difference", scatter, pairs, tokens, "margin", difference),
        ("true-margin", "Learned and true margin", scatter, true, "true margin", "margin", known),
    ]
    return [plan for plan in plans if plan[0] != "by-set" or run.sets]


def histogram(columns: dict[str, pd.Series], xlabel: str, caption: str) -> Made:
    """Overlaid histograms with the same bins; 0 is the edge of a bin."""
    figure = Figure(figsize=SIZE)
    axes, values = figure.subplots(), np.concatenate(list(columns.values()))
    width = np.ptp(values) / min(30, max(8, round(2 * len(values) ** (1 / 3)))) or 0.1  # Rice's rule, within limits
    edges = width * np.arange(np.floor(values.min() / width), np.ceil(values.max() / width) + 2)
    for i, (label, column) in enumerate(columns.items()):
        counts, _ = np.histogram(column, edges)
        axes.stairs(counts, edges, fill=True, facecolor=to_rgba(COLOURS[i], 0.25), linewidth=0)
        axes.stairs(counts, edges, color=COLOURS[i], linewidth=1.6, linestyle=DASHES[i], label=label)
    axes.set(xlabel=xlabel, ylabel="count")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure, caption, None


def calibration(table: pd.DataFrame) -> Made:
    """Accuracy against confidence; below it the number of comparisons in each bin."""
    bins, figure = reliability(table), Figure(figsize=(SIZE[0], SIZE[1] * 1.25))
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, linestyle=":", label="perfectly calibrated")
    yerr, fill = bars(bins, "accuracy"), dict(facecolor=to_rgba(COLOURS[0], 0.25), edgecolor=COLOURS[0], align="edge")
    axes.errorbar(bins["confidence"], bins["accuracy"], yerr, color=COLOURS[0], marker=MARKERS[0], label="model")
    counts.bar(bins["low"], bins["comparisons"], bins["high"] - bins["low"], **fill)
    axes.set(ylabel="accuracy", xlim=(0.48, 1.02), ylim=(min(0.48, axes.get_ylim()[0]), 1.03))
    counts.set(xlabel="confidence: predicted probability of being right", ylabel="count")
    counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    caption = "Confidence is sigmoid(|margin|), the probability that the model gives to the answer it prefers."
    return figure, f"{caption} Below the dotted line it is overconfident.{BARS}", bins


def slices(by: Callable[[pd.DataFrame], pd.DataFrame], table: pd.DataFrame, ylabel: str, accuracy: float) -> Made:
    """One row per slice: accuracy as a dot, its 95% interval as a bar, the number of comparisons in the label."""
    every = by(table)
    if every.empty:
        return None
    bins = every.nlargest(MAX_ROWS, "comparisons").sort_index()
    labels = [f"{short(name, 30)}: {pairs:,}" for name, pairs in zip(bins["bin"], bins["comparisons"], strict=True)]
    figure, rows = Figure(figsize=(SIZE[0], 1.25 + 0.27 * max(2, len(bins)))), np.arange(len(bins))
    axes = figure.subplots()
    axes.errorbar(bins["accuracy"], rows, xerr=bars(bins, "accuracy"), fmt="o", color=COLOURS[0])
    axes.axvline(0.5, color=INK, linewidth=1, linestyle=":", label="guessing")
    axes.axvline(accuracy, color=INK, linewidth=1, linestyle="--", label="all")
    axes.set_yticks(rows, labels)
    axes.set(xlabel="accuracy", ylim=(len(bins) - 0.5, -0.5), xlim=(min(0.48, axes.get_xlim()[0]), None))
    axes.set_ylabel(ylabel, labelpad=12)  # a browser's letters may be wider than those that were measured
    axes.xaxis.set_major_locator(MaxNLocator(5 if max(map(len, labels)) < 18 else 2))
    axes.grid(axis="y", visible=False)
    most = f" The {MAX_ROWS} largest of {len(every)}; all are in the table." if len(bins) < len(every) else ""
    return figure, f"Labels end with the number of comparisons.{BARS}{most}", every


def scatter(groups: dict[str, tuple[pd.Series, pd.Series]], xlabel: str, ylabel: str, caption: str) -> Made:
    """Points (x, y) of each group, with means in bins of equal counts."""
    if not groups:
        return None
    figure, every = Figure(figsize=SIZE), math.ceil(sum(len(x) for x, _ in groups.values()) / MAX_POINTS)
    axes = figure.subplots()
    for i, (label, (x, y)) in enumerate(groups.items()):
        look, x = dict(color=COLOURS[i], marker=MARKERS[i]), x.dropna()
        axes.scatter(x[::every], y[x.index][::every], s=12, alpha=0.25, linewidth=0, **look)
        bins = pd.qcut(x, min(8, max(2, len(x) // 12)), duplicates="drop", labels=False)
        look |= dict(label=f"{label}, mean", linestyle=DASHES[i], markeredgecolor=PAPER, markersize=7)
        axes.plot(x.groupby(bins).mean(), y.groupby(bins).mean(), **look)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    some = f" One in {every} points is drawn." if every > 1 else ""
    return figure, f"Lines are means in bins of equal counts.{some}{caption}", None


# ---------------------------------------------------------------- helpers
def bars(bins: pd.DataFrame, name: str) -> np.ndarray:
    """The lengths of the bars below and above the values of a column, from the ends of their intervals."""
    return np.stack([bins[name] - bins[f"{name}_low"], bins[f"{name}_high"] - bins[name]]).clip(0)


def short(text: str, most: int) -> str:
    """`text` in at most `most` characters; what is too much is cut from the middle."""
    return text if len(text) <= most else text[: most // 2] + "…" + text[len(text) - (most - 1) // 2 :]
