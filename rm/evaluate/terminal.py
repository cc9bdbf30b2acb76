"""Evaluations on the terminal: a line after each one, and a table with 95% intervals, units and meanings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from rm.evaluate.metrics import find_metric

Intervals = Mapping[str, tuple[float, float]]
FINAL = (  # rows of the table at the end of a run
    "eval/accuracy eval/accuracy_ceiling eval/longer_answer_baseline_accuracy eval/loss eval/prompt_only_baseline_loss "
    "eval/ece eval/margin eval/pairs train/steps train/best_step speed/train_seconds speed/pairs_per_second"
).split()


def evaluation_line(step: int, metrics: Mapping[str, float], best: Sequence[Any] | None = None) -> str:
    """Accuracy and loss after an evaluation; `best`: name, value and step of the best evaluation so far."""
    accuracy, low, high = (metrics[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
    line = f"step {step}: held-out accuracy {accuracy:.3f} (95% interval {low:.2f} to {high:.2f})"
    line += "".join(f", {name} {metrics[f'eval/{name}/accuracy']:.3f}" for name in sets_in(metrics))
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
        table.add_column(column, justify=justify, no_wrap=column != "meaning", overflow="fold")
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
