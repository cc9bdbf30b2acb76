"""Drawings as SVG for an HTML page: labelled axes, text that stays text, colours that follow the page's light or dark.

Every series has a line style, a marker or a hatch of its own besides its colour. Colours stand in the drawings as
placeholders, which `svg` replaces by CSS variables: `--ink`, `--muted`, `--grid`, `--paper`, `--c1` to `--c6`.
The module
imports matplotlib: import it only where something is drawn.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
COLOURS = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
VARIABLES = dict(zip((INK, MUTED, GRID, PAPER), ("ink", "muted", "grid", "paper"), strict=True))
VARIABLES |= {colour: f"c{i}" for i, colour in enumerate(COLOURS, 1)}
DASHES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (8, 3)))
MARKERS, HATCHES = ("o", "^", "s", "D", "v", "P"), ("////", "\\\\\\\\", "....", "xxxx", "----", "++++")
SIZE = (4.4, 3.1)  # inches: text of 10 points is then about 11 pixels on a telephone
MAX_POINTS = 1_000  # of a line, and of a scatter plot; more are averaged or binned
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same drawing has the same bytes
    "text.parse_math": False,  # names may hold dollars
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 2.6,
    "figure.constrained_layout.use": True,
}


@contextmanager
def style() -> Iterator[None]:
    """matplotlib as the drawings here want it, whatever the user's own settings are."""
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser's fonts have them
        yield


@dataclass(frozen=True)
class Line:
    """A curve over steps: `y` with its 95% interval if known. `look`: which colour, dashes and marker."""

    label: str
    y: pd.Series
    look: int = 0
    low: pd.Series | None = None
    high: pd.Series | None = None
    has_markers: bool = False
    dashes: int | None = None  # other than the look's


def curves(
    lines: Sequence[Line], ylabel: str, *, log: bool = False, references: Sequence[tuple[float, str]] = ()
) -> Figure:
    """Lines over optimizer steps, evaluations with markers and bars for intervals; references are horizontal lines."""
    figure, axes = _figure()
    for line in lines:
        y = thin(line.y)
        dashes = DASHES[(line.look if line.dashes is None else line.dashes) % len(DASHES)]
        options = dict(color=COLOURS[line.look % len(COLOURS)], label=line.label, linewidth=1.5, linestyle=dashes)
        if line.has_markers or len(y) < 3:
            options |= dict(marker=MARKERS[line.look % len(MARKERS)], markersize=5.5, markeredgewidth=0)
        if line.low is not None and line.high is not None and len(line.low):
            at = line.low.index.intersection(y.index)
            below, above = (y[at] - line.low[at]).clip(lower=0), (line.high[at] - y[at]).clip(lower=0)
            bars = dict(color=COLOURS[line.look % len(COLOURS)], linewidth=1, capsize=2.5, fmt="none")
            axes.errorbar(at, y[at], yerr=np.stack([below, above]), **bars)
        axes.plot(y.index, y.to_numpy(), **options)
    for i, (value, label) in enumerate(references):
        axes.axhline(value, color=INK, linewidth=1, linestyle=(":", (0, (1, 3)))[i % 2], label=label)
    everything = pd.concat([thin(line.y).dropna() for line in lines])
    if log and len(everything) and everything.min() > 0 and everything.max() > 30 * everything.min():
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    if len(lines) + len(references) > 1:
        _legend(figure, axes)
    return figure


def histogram(columns: Sequence[tuple[str, np.ndarray]], xlabel: str, ylabel: str, split: bool = False) -> Figure:
    """Overlaid histograms with the same bins, told apart by hatches and outlines. `split`: of the only column, what is
    below and above 0 look different."""
    figure, axes = _figure()
    columns = [(label, values[np.isfinite(values)]) for label, values in columns]
    both = np.concatenate([values for _, values in columns])
    count = min(30, max(8, round(2 * len(both) ** (1 / 3))))  # Rice's rule, within limits
    width = (np.ptp(both) if len(both) else 0) / count or 0.1
    low, high = (both.min(), both.max()) if len(both) else (0, 0)
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 2)  # one of them is 0
    for i, (label, values) in enumerate(columns):
        counts, _ = np.histogram(values, edges)
        looks = [(edges[:-1] < -width / 2, 1), (edges[:-1] > -width / 2, 0)] if split else [(counts >= 0, i)]
        for part, look in looks:
            colour = COLOURS[look]
            name = label if not split else ("rejected higher (wrong)", "chosen higher (right)")[1 - look]
            _hatched_bars(axes, edges[:-1][part], counts[part], width, look, label=name)
            outline = dict(color=colour, linewidth=1.4, linestyle=("-", "--")[look % 2])
            axes.stairs(np.where(part, counts, 0), edges, **outline)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend(figure, axes)
    return figure


def reliability_diagram(bins: Sequence[tuple[str, pd.DataFrame]]) -> Figure:
    """Accuracy against confidence with intervals, one series a run, and for a single one the pairs in each bin."""
    is_single = len(bins) == 1
    figure = Figure(figsize=(SIZE[0], SIZE[1] * (1.25 if is_single else 1.1)))
    axes, *rest = np.atleast_1d(figure.subplots(1 + is_single, 1, sharex=True, height_ratios=[3, 1][: 1 + is_single]))
    start = min(0.5 if (part["low"] >= 0.5).all() else 0.0 for _, part in bins)
    axes.plot([start, 1], [start, 1], color=INK, linewidth=1, linestyle=":", label="perfectly calibrated")
    for i, (label, part) in enumerate(bins):
        yerr = [part["accuracy"] - part["accuracy_low"], part["accuracy_high"] - part["accuracy"]]
        bars = dict(yerr=np.clip(yerr, 0, None), capsize=2.5, elinewidth=1, markersize=5, linewidth=1.5, label=label)
        look = dict(color=COLOURS[i % 6], linestyle=DASHES[i % 6], marker=MARKERS[i % 6], markeredgewidth=0)
        axes.errorbar(part["confidence"], part["accuracy"], **bars, **look)
    axes.set(ylabel="accuracy", xlim=(start - 0.02, 1.02), ylim=(min(start, axes.get_ylim()[0]), 1.03))
    for counts in rest:
        part = bins[0][1]
        _hatched_bars(counts, part["low"], part["pairs"], part["high"] - part["low"], 0)
        counts.set(ylabel="pairs")
        counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    figure.axes[-1].set_xlabel("confidence: predicted probability of being right")
    _legend(figure, axes)
    return figure


def accuracy_bins(bins: pd.DataFrame, what: str, references: Sequence[tuple[float, str]] = ()) -> Figure:
    """A row for each bin: accuracy as a dot, its 95% interval as a bar, the number of pairs at the right."""
    figure = Figure(figsize=(SIZE[0], 1.25 + 0.27 * max(2, len(bins))))
    axes, rows = figure.subplots(), np.arange(len(bins))
    xerr = [bins["accuracy"] - bins["accuracy_low"], bins["accuracy_high"] - bins["accuracy"]]
    bars = dict(xerr=np.clip(xerr, 0, None), fmt="o", color=COLOURS[0], capsize=3, markersize=5.5, elinewidth=1.4)
    axes.errorbar(bins["accuracy"], rows, **bars)
    for i, (value, label) in enumerate(references):
        axes.axvline(value, color=INK, linewidth=1, linestyle=(":", "--")[i % 2], label=label)
    axes.set_yticks(rows, distinct(bins["bin"], 28))
    axes.set(xlabel="accuracy", ylim=(len(bins) - 0.5, -0.5))
    axes.set_ylabel(what, labelpad=12)  # a browser's letters may be wider than those that were measured
    axes.set_xlim(left=min([axes.get_xlim()[0], *(value - 0.02 for value, _ in references)]))
    axes.xaxis.set_major_locator(MaxNLocator(5 if max((len(str(name)) for name in bins["bin"]), default=0) < 18 else 2))
    axes.grid(axis="y", visible=False)
    right = axes.secondary_yaxis("right")
    right.set_yticks(rows, [f"{count:,}" for count in bins["pairs"]])
    right.set_ylabel("pairs")
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    if references:
        _legend(figure, axes)
    return figure


def scatter(groups: Sequence[tuple[str, np.ndarray, np.ndarray]], xlabel: str, ylabel: str) -> tuple[Figure, bool]:
    """Points of each group (label, x, y), and their mean in bins of equal counts with its 95% interval. Many points
    become hexagons, the stronger the more points; returns whether they did."""
    figure, axes = _figure()
    points = [tuple(v[np.isfinite(x) & np.isfinite(y)] for v in (x, y)) for _, x, y in groups]
    all_x, all_y = (np.concatenate(side) for side in zip(*points, strict=True))
    are_many = len(all_x) > MAX_POINTS
    if are_many:
        cells = axes.hexbin(all_x, all_y, gridsize=(32, 18), mincnt=1, linewidth=0)
        strength = np.log1p(cells.get_array()) / np.log1p(cells.get_array().max())
        cells.set_array(None)
        cells.set_facecolor([to_rgba(MUTED, 0.08 + 0.5 * s) for s in strength])
    for i, ((label, _, _), (x, y)) in enumerate(zip(groups, points, strict=True)):
        look = dict(color=COLOURS[i], marker=MARKERS[i])
        if not are_many:
            axes.scatter(x, y, s=14, alpha=0.45, linewidth=0, **look)
        means = binned_means(x, y)
        bars = dict(capsize=2.5, linewidth=1.8, markersize=6, markeredgecolor=PAPER, linestyle=DASHES[i])
        axes.errorbar(means["x"], means["mean"], yerr=means["half"], label=f"{label}, mean", **bars, **look)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    _legend(figure, axes)
    return figure, are_many


def movement(chosen: pd.Series, rejected: pd.Series) -> Figure:
    """A small chart of one pair's two rewards over steps."""
    figure = Figure(figsize=(3.3, 1.5))
    axes = figure.subplots()
    for i, (label, values) in enumerate((("chosen", chosen), ("rejected", rejected))):
        look = dict(color=COLOURS[i], linestyle=DASHES[i], marker=MARKERS[i], markersize=4, linewidth=1.4)
        values = thin(values, 60)
        axes.plot(values.index, values.to_numpy(), **look, label=label, markeredgewidth=0)
    axes.set(xlabel="optimizer step", ylabel="reward")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    _legend(figure, axes)
    return figure


# ---------------------------------------------------------------- helpers


def thin(y: pd.Series, most: int = MAX_POINTS) -> pd.Series:
    """`y` by step, finite or a gap; more than `most` values become means of neighbours."""
    y = y.replace([np.inf, -np.inf], np.nan).astype(float)
    size = -(-len(y) // most) if len(y) else 1
    if size == 1:
        return y
    group = np.arange(len(y)) // size
    return pd.Series(y.groupby(group).mean().to_numpy(), index=y.index.to_series().groupby(group).last().to_numpy())


def binned_means(x: np.ndarray, y: np.ndarray) -> pd.DataFrame:
    """Mean `x` and `y` in 2 to 8 bins of about equal numbers, and half of the 95% interval of the mean of `y`
    (1.96 standard errors; 0 for a single value)."""
    if not len(x):
        return pd.DataFrame({"x": [], "mean": [], "half": []}, dtype=float)
    edges = np.unique(np.quantile(x, np.linspace(0, 1, min(8, max(2, len(x) // 12)) + 1)))
    place = np.searchsorted(edges[1:-1], x, side="left")  # equal values share a bin
    groups = pd.DataFrame({"x": x, "y": y}).groupby(place)
    half = 1.959964 * groups["y"].std() / np.sqrt(groups["y"].count())
    return pd.DataFrame({"x": groups["x"].mean(), "mean": groups["y"].mean(), "half": half.fillna(0)})


def short(text: str, most: int) -> str:
    """`text` in a line of at most `most` characters that a drawing can hold; what is too much goes from its middle."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= most else text[: most // 2] + "…" + text[len(text) - (most - 1) // 2 :]


def distinct(names: Sequence[Any], most: int) -> list[str]:
    """Labels for different names, `short` and never the same: a number stands before those that would be."""
    found = [short(str(name), most) for name in names]
    return [
        short(f"{i + 1}: {name}", most) if found.count(label) > 1 else label
        for i, (name, label) in enumerate(zip(names, found, strict=True))
    ]


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE)
    return figure, figure.subplots()


def _hatched_bars(axes: Any, left: Any, height: Any, width: Any, look: int, label: str | None = None) -> None:
    """Bars with a light fill under a hatch: in an SVG the opacity of a fill would be the hatch's too."""
    bars, colour = dict(width=width, align="edge", linewidth=0), COLOURS[look]
    axes.bar(left, height, facecolor=to_rgba(colour, 0.2), **bars)
    axes.bar(left, height, facecolor="none", edgecolor=colour, hatch=HATCHES[look], label=label, **bars)


def _legend(figure: Figure, axes: Any) -> None:
    """A legend above the axes, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [short(label, 44) for label in labels]
    columns = 1 if max(map(len, labels), default=0) > 24 else 2
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0.2, columnspacing=1.2)


def svg(figure: Figure, key: str, title: str) -> str:
    """`figure` as an <svg> element for a page: no sizes but the viewBox, no ids without "`key`-" in front."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    for prefix, uri in (("", "http://www.w3.org/2000/svg"), ("xlink", "http://www.w3.org/1999/xlink")):
        ET.register_namespace(prefix, uri)
    root = ET.fromstring(file.getvalue())
    space = "{http://www.w3.org/2000/svg}"
    for tag in ("metadata", "defs/style"):
        parent, _, tag = tag.rpartition("/")
        owner = root.find(space + parent) if parent else root
        owner.remove(owner.find(space + tag))
    xlink = "{http://www.w3.org/1999/xlink}href"
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w.-]+)", file.getvalue()))
    for element in root.iter():
        if element.attrib.get("id") not in used:
            element.attrib.pop("id", None)
        for name, value in list(element.attrib.items()):
            if name == "id":
                value = f"{key}-{value}"
            elif name == xlink:
                del element.attrib[name]
                name, value = "href", value.replace("#", f"#{key}-", 1)
            elif name in ("fill", "stroke") and value in VARIABLES:  # of a hatch; var() belongs into a style
                del element.attrib[name]
                name, value = "style", f"{name}: {value}; {element.attrib.get('style', '')}"
            if name == "style":
                value = re.sub(
                    r"#0[\da-f]{5}", lambda m: f"var(--{VARIABLES[m[0]]})" if m[0] in VARIABLES else m[0], value
                )
                value = re.sub(r"font-family: [^;]*;? ?", "", value)
            value = value.replace("url(#", f"url(#{key}-")
            if name in ("d", "x", "y"):
                value = re.sub(r"(\.\d\d)\d+", r"\1", value)  # of a point
            element.set(name, value)
        element.tail = None
        if element.tag != f"{space}text" and element.text is not None and not element.text.strip():
            element.text = None
    del root.attrib["width"], root.attrib["height"]
    label = ET.Element(space + "title", id=f"{key}-title")
    label.text = title
    root.insert(0, label)
    root.set("class", "plot")
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title")
    return ET.tostring(root, encoding="unicode")
