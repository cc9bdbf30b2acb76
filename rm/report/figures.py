"""The figures of report.html: what each one shows, and matplotlib drawings of it as inline SVG.

A figure is planned as (key, title, function, *arguments); the function returns (Figure, caption, table of the numbers
or None), or None without numbers to draw. Drawings have the colours of the light scheme; the style sheet of the page
replaces each by a CSS variable. Besides its colour every series has its own line style or marker.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rm.evaluate.slices import by_data_margin, by_length_difference, by_margin, by_set, by_subset, reliability
from rm.report.read_run import Notes, Run, number

PALETTE = {  # CSS variable: colour in the light scheme
    "paper": "#ffffff", "ink": "#1b1f24", "muted": "#59626e", "grid": "#dde1e6",
    "c1": "#0062a8", "c2": "#b8460a", "c3": "#00734f", "c4": "#8f3f87", "c5": "#7a6300", "c6": "#4a4f57",
}  # fmt: skip
PAPER, INK, MUTED, GRID, *COLOURS = PALETTE.values()
DASHES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (8, 3)))
MARKERS = ("o", "^", "s", "D", "v", "P")
NUM_LOOKS = len(COLOURS)  # series that can be told apart in one figure
SIZE, SMALL = (4.4, 3.1), (3.3, 1.5)  # inches; text of 10 points is then about 11 pixels on a phone
MAX_POINTS = 1_000  # of a line and of a scatter plot; more are averaged or binned
MAX_ROWS = 40  # slices in one figure
Made = tuple[Figure, str, pd.DataFrame | None] | None
BARS = " Bars are 95% intervals."


def draw(plans: Sequence[tuple], notes: Notes, prefix: str = "") -> list[dict[str, Any]]:
    """What the template needs of each figure that has numbers; what cannot be drawn becomes a note."""
    drawings = []
    for key, title, make, *arguments in plans:
        drawing = notes.attempt(f'the figure "{title}"', _draw, prefix + key, make, *arguments)
        drawings += [{"key": prefix + key, "title": title} | drawing] if drawing else []
    return drawings


def _draw(key: str, make: Callable[..., Made], *arguments: Any) -> dict[str, Any] | None:
    sheet, file = Path(__file__).with_suffix(".mplstyle"), io.StringIO()
    with matplotlib.style.context(["default", sheet, {"svg.hashsalt": key}]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the measuring font lacks, and of edited numbers that overflow
        if (made := make(*arguments)) is None:
            return None
        figure, caption, table = made
        figure.draw_without_rendering()  # makes ticks and layout
        figure.set_layout_engine("none")
        for i, artist in enumerate(figure.findobj()):
            artist.set_gid(f"{key}-{i}")  # ids are unique in a page
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    svg = file.getvalue()
    return {"svg": svg[svg.index("<svg") :], "caption": caption, "table": table}  # without the XML declaration


# ---------------------------------------------------------------- curves over optimizer steps


@dataclass(frozen=True)
class Line:
    """A curve. `ends`: its 95% interval at some steps. `look`, `dashes`: which colour and marker, which line style."""

    label: str
    y: pd.Series
    look: int
    dashes: int
    ends: tuple[pd.Series, pd.Series] | None = None
    is_evaluation: bool = False


def line(run: Run, label: str, metric: str, look: int, dashes: int | None = None) -> Line:
    is_evaluation = metric.startswith("eval/")
    ends = run.interval_curve(metric) if is_evaluation else None
    return Line(label, run.curve(metric), look, look if dashes is None else dashes, ends, is_evaluation)


def training(run: Run) -> list[tuple]:
    """Curves of one run, with those of its evaluations."""
    means = "Training values are means over the pairs since the previous log line."
    both, once = f"{means}{BARS}", "Values at each log line."
    drift = f"{both} Only differences of rewards are trained: both may drift together."
    speed = "Training pairs per second on all processes since the previous log line, without evaluation and saving."
    ceiling, clip = run.final.get("eval/accuracy_ceiling", math.nan), number(run.config.get("max_grad_norm"))
    known = [(0.5, "guessing"), (ceiling, f"best possible, {ceiling:.3f}")][: 1 + math.isfinite(ceiling)]
    names = ("loss", "accuracy", "margin")
    loss, accuracy, margin = ([("training", f"train/{n}", 0), ("held out", f"eval/{n}", 1)] for n in names)
    rewards = [
        ("chosen, training", "train/reward_chosen", 0, 0),
        ("rejected, training", "train/reward_rejected", 1, 0),
        ("chosen, held out", "eval/reward_chosen", 0, 1),
        ("rejected, held out", "eval/reward_rejected", 1, 1),
    ]
    sets = [(name, f"eval/{name}/accuracy", i) for i, name in enumerate(run.sets[:NUM_LOOKS])]
    rates = [("all other weights", "optim/learning_rate", 0), ("reward head", "optim/head_learning_rate", 1)]
    norm = {"log": True, "references": [(clip, f"clipped to {clip:g}")] if clip > 0 else []}
    plans = [
        ("loss", "Loss", "loss (nats)", loss, f"{both} Guessing costs 0.693.", {}),
        ("accuracy", "Accuracy", "accuracy", accuracy, both, {"references": known}),
        ("margin", "Margin: reward of chosen minus reward of rejected", "reward", margin, both, {}),
        ("rewards", "Mean reward of chosen and rejected answers", "reward", rewards, drift, {}),
        ("set-curves", "Accuracy of each evaluation set", "accuracy", sets, f"{NUM_LOOKS} at most.{BARS}", {}),
        ("learning-rate", "Learning rate", "learning rate", rates, once, {}),
        ("grad-norm", "Gradient norm", "norm before clipping", [("norm", "optim/grad_norm", 0)], once, norm),
        ("speed", "Speed", "pairs per second", [("speed", "speed/pairs_per_second", 0)], speed, {}),
    ]  # fmt: skip
    return [
        (key, title, curves, [line(run, *one) for one in series], ylabel, caption, options)
        for key, title, ylabel, series, caption, options in plans
    ]


def comparison(runs: Sequence[Run]) -> list[tuple]:
    """Curves of several runs, and their calibration."""
    half, ln2 = {"references": [(0.5, "guessing")]}, {"references": [(math.log(2), "guessing")]}
    plans = [
        ("Held-out accuracy", "eval/accuracy", "accuracy", half),
        ("Held-out loss", "eval/loss", "loss (nats)", ln2),
        ("Training loss", "train/loss", "loss (nats)", ln2),
        ("Learning rate", "optim/learning_rate", "learning rate", {}),
        ("Gradient norm", "optim/grad_norm", "norm before clipping", {"log": True}),
    ]
    tables, found = [(run.name, run.table) for run in runs if run.table is not None], []
    for title, metric, ylabel, options in plans:
        lines = [line(run, run.name, metric, i) for i, run in enumerate(runs)]
        caption = f"At each evaluation.{BARS}" if metric.startswith("eval/") else "At each log line."
        found.append((f"cmp-{metric.replace('/', '-')}", title, curves, lines, ylabel, caption, options))
    return [*found, ("cmp-reliability", "Calibration", calibration, tables)]


def movement(steps: Sequence[int], chosen: Sequence[float], rejected: Sequence[float]) -> Made:
    """A small chart of the rewards of one pair."""
    sides = enumerate((("chosen", chosen), ("rejected", rejected)))
    lines = [Line(side, pd.Series(y, steps, dtype=float), i, i, None, True) for i, (side, y) in sides]
    return curves(lines, "reward", "", {}, SMALL)


def curves(lines: Sequence[Line], ylabel: str, caption: str, options: dict, size: tuple[float, float] = SIZE) -> Made:
    """Lines over optimizer steps, evaluations with markers and bars for intervals.

    `options`: `references`, horizontal lines [(value, label), ...]; `log`: a logarithmic axis where values spread.
    """
    lines, references = [line for line in lines if np.isfinite(line.y).any()], options.get("references", [])
    if not lines:
        return None
    figure = Figure(figsize=size)
    axes, everything = figure.subplots(), pd.concat([line.y for line in lines])
    for one in lines:
        y, colour, size_of_mark = thin(one.y), COLOURS[one.look], 4 if size == SMALL else 5.5
        look = dict(color=colour, linestyle=DASHES[one.dashes], linewidth=1.5, label=short(one.label, 44))
        if one.is_evaluation or len(y) < 3:
            look |= dict(marker=MARKERS[one.look], markersize=size_of_mark, markeredgewidth=0)
        axes.plot(y.index, y, **look)
        if one.ends is not None:
            ends = pd.concat([one.y, *one.ends], axis=1, join="inner").dropna()
            middle, low, high = ends.to_numpy().T
            yerr = np.stack([middle - low, high - middle]).clip(0)
            axes.errorbar(ends.index, middle, yerr=yerr, color=colour, linewidth=1, capsize=2.5, fmt="none")
    for i, (value, label) in enumerate(references):
        axes.axhline(value, color=INK, linewidth=1, linestyle=(":", (0, (1, 3)))[i % 2], label=label)
    if options.get("log") and 0 < 30 * everything.min() < everything.max():
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    elif size == SMALL:
        axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    if len(lines) + len(references) > 1:
        legend(figure)
    gaps = int((~np.isfinite(everything)).sum())
    return figure, caption + f" Left out: {gaps} that are not finite." * (gaps > 0), None


# ---------------------------------------------------------------- one evaluation


def evaluation(run: Run, table: pd.DataFrame, accuracy: float = math.nan) -> list[tuple]:
    """Figures of an evaluation table, or of its part for one set; `accuracy` of the whole table."""
    rewards = {side: table[f"reward_{side}"] for side in ("chosen", "rejected")}
    lengths = {side: table[f"length_{side}"] - table["prefix_length"] for side in ("chosen", "rejected")}
    margin, longer = rewards["chosen"] - rewards["rejected"], lengths["chosen"] - lengths["rejected"]
    halves = {"chosen higher (right)": margin[margin >= 0], "rejected higher (wrong)": margin[margin < 0]}
    true = table.get("true_margin", pd.Series(math.nan, table.index))
    count, tokens = f"{len(table):,} pair{'s' * (len(table) != 1)}", "chosen - rejected (tokens)"
    signs = f"{count}: {(margin > 0).sum():,} right, {(margin < 0).sum():,} wrong, {(margin == 0).sum():,} ties."
    answers, pairs = [(side, lengths[side], rewards[side]) for side in rewards], [("pairs", longer, margin)]
    metrics = ("eval/reward_length_spearman", "eval/margin_length_spearman", "eval/spearman_true_margin")
    length, difference, known = ((run.final.get(name), run.intervals.get(name), name) for name in metrics)
    plans = [
        ("reward-histogram", "Rewards of chosen and rejected answers", histogram, rewards, "reward", count),
        ("margin-histogram", "Margins", histogram, halves, "reward of chosen - reward of rejected", signs),
        ("reliability", "Calibration", calibration, [("model", table)]),
        ("by-set", "Accuracy by evaluation set", slices, by_set, table, "set", accuracy),
        ("by-subset", "Accuracy by subset", slices, by_subset, table, "subset", accuracy),
        ("by-margin", "Accuracy by size of the margin", slices, by_margin, table, "|margin| (reward)", accuracy),
        ("by-data-margin", "Accuracy by margin of the data", slices, by_data_margin, table, "margin", accuracy),
        ("by-length", "Accuracy by length difference", slices, by_length_difference, table, tokens, accuracy),
        ("length", "Reward against length", scatter, answers, "length of the answer (tokens)", "reward", length),
        ("length-difference", "Margin against length difference", scatter, pairs, tokens, "margin", difference),
        ("true-margin", "Learned and true margin", scatter, [("pairs", true, margin)], "true margin", "margin", known),
    ]
    return [plan for plan in plans if plan[0] != "by-set" or table["set"].nunique() > 1]


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
    legend(figure)
    return figure, caption, None


def calibration(tables: Sequence[tuple[str, pd.DataFrame]]) -> Made:
    """Accuracy against confidence, one series per model; below it the pairs in each bin of a single model."""
    found = [(name, bins) for name, table in tables if len(bins := reliability(table))]
    if not found:
        return None
    figure = Figure(figsize=(SIZE[0], SIZE[1] * 1.25))
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, linestyle=":", label="perfectly calibrated")
    for i, (name, bins) in enumerate(found):
        look = dict(color=COLOURS[i], linestyle=DASHES[i], marker=MARKERS[i], markersize=5, markeredgewidth=0)
        axes.errorbar(bins["confidence"], bins["accuracy"], yerr=bars(bins), label=short(name, 44), capsize=2.5, **look)
        fill = dict(facecolor=to_rgba(COLOURS[i], 0.25 / len(found)), edgecolor=COLOURS[i], align="edge")
        counts.bar(bins["low"], bins["pairs"], width=bins["high"] - bins["low"], **fill)
    axes.set(ylabel="accuracy", xlim=(0.48, 1.02), ylim=(min(0.48, axes.get_ylim()[0]), 1.03))
    counts.set(xlabel="confidence: predicted probability of being right", ylabel="pairs")
    counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    legend(figure)
    confidence = "sigmoid(|margin|), the probability that the model gives to the answer it prefers"
    caption = f"Confidence is {confidence}. Below the dotted line it is overconfident.{BARS}"
    return figure, caption, found[0][1] if len(found) == 1 else None


def slices(by: Callable[[pd.DataFrame], pd.DataFrame], table: pd.DataFrame, ylabel: str, accuracy: float) -> Made:
    """One row per slice: accuracy as a dot, its 95% interval as a bar, the number of pairs in the label."""
    if not len(every := by(table)):
        return None
    bins = every.loc[every["pairs"].nlargest(MAX_ROWS).sort_index().index]
    labels = [f"{short(name, 30)}: {pairs:,}" for name, pairs in zip(bins["bin"], bins["pairs"], strict=True)]
    figure, rows = Figure(figsize=(SIZE[0], 1.25 + 0.27 * max(2, len(bins)))), np.arange(len(bins))
    axes = figure.subplots()
    axes.errorbar(bins["accuracy"], rows, xerr=bars(bins), fmt="o", color=COLOURS[0], markersize=5.5, capsize=3)
    axes.axvline(0.5, color=INK, linewidth=1, linestyle=":", label="guessing")
    axes.axvline(accuracy, color=INK, linewidth=1, linestyle="--", label="all pairs")
    axes.set_yticks(rows, labels)
    axes.set(xlabel="accuracy", ylim=(len(bins) - 0.5, -0.5), xlim=(min(0.48, axes.get_xlim()[0]), None))
    axes.set_ylabel(ylabel, labelpad=12)  # a browser's letters may be wider than those that were measured
    axes.xaxis.set_major_locator(MaxNLocator(5 if max(map(len, labels)) < 18 else 2))
    axes.grid(axis="y", visible=False)
    legend(figure)
    most = f" The {MAX_ROWS} largest of {len(every)}; all are in the table." if len(bins) < len(every) else ""
    return figure, f"Labels end with the number of pairs.{BARS}{most}", every


def scatter(groups: Sequence[tuple[str, pd.Series, pd.Series]], xlabel: str, ylabel: str, spearman: tuple) -> Made:
    """Points of each group (label, x, y) with means in bins of equal counts; many points become hexagons.

    `spearman`: their rank correlation as logged, (value or None, 95% interval or None, name).
    """
    groups = [(label, x[np.isfinite(x)], y[np.isfinite(x)]) for label, x, y in groups]
    every_x, every_y = (pd.concat([group[i] for group in groups]) for i in (1, 2))
    if not len(every_x):
        return None
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    if len(every_x) > MAX_POINTS:
        cells = axes.hexbin(every_x, every_y, gridsize=(32, 18), mincnt=1, linewidth=0)
        strength = np.log1p(cells.get_array()) / np.log1p(cells.get_array().max())
        cells.set_array(None)
        cells.set_facecolor([to_rgba(MUTED, 0.08 + 0.5 * s) for s in strength])
    for i, (label, x, y) in enumerate(groups):
        look = dict(color=COLOURS[i], marker=MARKERS[i], label=f"{label}, mean", linestyle=DASHES[i], linewidth=1.8)
        if len(every_x) <= MAX_POINTS:
            axes.scatter(x, y, s=14, alpha=0.45, linewidth=0, color=COLOURS[i], marker=MARKERS[i])
        bins = pd.qcut(x, min(8, max(2, len(x) // 12)), duplicates="drop", labels=False)
        axes.plot(x.groupby(bins).mean(), y.groupby(bins).mean(), markersize=6, markeredgecolor=PAPER, **look)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    legend(figure)
    value, ends, name = spearman
    interval = f", 95% interval {ends[0]:.2f} to {ends[1]:.2f}" if ends else ""
    known = f" Spearman's rank correlation {value:.2f}{interval} ({name})." if value is not None else ""
    return figure, f"Lines are means in bins of equal counts.{known}", None


# ---------------------------------------------------------------- helpers


def bars(bins: pd.DataFrame) -> np.ndarray:
    """The lengths of the bars below and above the accuracy of each bin."""
    return np.stack([bins["accuracy"] - bins["accuracy_low"], bins["accuracy_high"] - bins["accuracy"]]).clip(0)


def thin(y: pd.Series) -> pd.Series:
    """`y` by step, finite or a gap; more than `MAX_POINTS` values become means of neighbours."""
    group, steps = np.arange(len(y)) // math.ceil(len(y) / MAX_POINTS), y.index.to_series()
    return y.replace([math.inf, -math.inf], math.nan).groupby(group).mean().set_axis(steps.groupby(group).last())


def short(text: str, most: int) -> str:
    """`text` in at most `most` characters; what is too much is cut from the middle."""
    return text if len(text) <= most else text[: most // 2] + "…" + text[len(text) - (most - 1) // 2 :]


def legend(figure: Figure) -> None:
    """A legend above the axes, where it hides no data."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 24 else 2
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0.2, columnspacing=1.2)
