"""What lies in a run's folder, whole or not: of a run that is going on, was stopped, or is of an older version."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

TABLE_COLUMNS = frozenset(  # of a per-pair table (`rm.evaluate.table.pair_table`); one without all of them is not read
    "id set prompt reward_chosen reward_rejected data_margin length_chosen length_rejected prefix_length".split()
)


class ReadError(ValueError):
    """The folder holds no run; one line that names it."""


@dataclass(frozen=True)
class Run:
    """A run's files as they are. What is missing or damaged is empty: there may be no results.json yet.

    Attributes:
        name: the folder's name, longer where several runs would have the same one.
        metrics: the lines of metrics.jsonl, a row a line, float64; NaN where a line lacks a name.
        config: the options, as resolved at the run's start.
        results: results.json; {} while the run is not finished.
        data: data_report.json.
        mistakes: the records of mistakes.jsonl, the worst first.
    """

    folder: Path
    name: str
    metrics: pd.DataFrame
    config: dict[str, Any]
    results: dict[str, Any]
    data: dict[str, Any]
    mistakes: list[dict[str, Any]]

    @property
    def last_step(self) -> int:
        return int(self.metrics["step"].max()) if len(self.metrics) else 0

    def curve(self, name: str) -> pd.Series:
        """The values of a metric by step, the last one of each step; empty if it was never logged."""
        if name not in self.metrics:
            return pd.Series(dtype=float)
        logged = self.metrics[self.metrics["logged"].map(lambda names: name in names)]
        return logged.groupby("step")[name].last()

    @cached_property
    def final(self) -> dict[str, float]:
        """The metrics of the summary; of a run without one, the last value of each."""
        summary = self.results.get("summary")
        if isinstance(summary, dict):
            return {name: number(value) for name, value in summary.items() if is_number(value)}
        curves = {name: self.curve(name) for name in self.metrics.columns if "/" in name}
        return {name: float(curve.iloc[-1]) for name, curve in curves.items()}

    def interval(self, name: str) -> tuple[float, float] | None:
        """The 95% interval of a metric of `final`; None where none is known."""
        intervals = self.results.get("intervals")
        pair = intervals.get(name) if isinstance(intervals, dict) else None
        if pair is None:
            pair = [self.final.get(f"{name}_low"), self.final.get(f"{name}_high")]
        low, high = (number(end) for end in pair)
        return (low, high) if np.isfinite([low, high]).all() else None

    def table_steps(self) -> list[int]:
        """The steps of which a per-pair table is there."""
        return [step for step, _ in self._numbered("eval/step-*.parquet")]

    @property
    def table_step(self) -> int | None:
        """The step of the per-pair table that the final metrics are of: the last one, or the best evaluation's."""
        steps, best = self.table_steps(), self.final.get("train/best_step")
        is_best = self.config.get("load_best_model_at_end") and best in steps
        return int(best) if is_best else steps[-1] if steps else None

    def table(self, step: int | None = None) -> pd.DataFrame | None:
        """The per-pair table after `step`, or that of `table_step`; None where none can be read."""
        step = self.table_step if step is None else step
        try:
            table = pd.read_parquet(self.folder / "eval" / f"step-{step}.parquet")
        except (OSError, ValueError):  # pyarrow's errors are these
            return None
        return table if len(table) and TABLE_COLUMNS <= set(table) else None

    @cached_property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """The pairs shown at evaluations by id, each with its record of every step, in order."""
        shown: dict[str, list[dict]] = {}
        for step, path in self._numbered("samples/step-*.jsonl"):
            for record in _records(path):
                shown.setdefault(str(record.get("id")), []).append({**record, "step": step})
        return shown

    def _numbered(self, pattern: str) -> list[tuple[int, Path]]:
        """(step, file) in order; none past the last step, which a run that went back to a checkpoint has left."""
        found = [(re.fullmatch(r"step-(\d+)", path.stem), path) for path in self.folder.glob(pattern)]
        steps = [(int(match[1]), path) for match, path in found if match]
        return sorted(pair for pair in steps if pair[0] <= self.last_step)


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Read a run's folder. Raises `ReadError` if it is none: it has no metrics.jsonl, which every run begins with."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        there = "holds no run (no metrics.jsonl)" if folder.is_dir() else "is no folder"
        raise ReadError(f"'{folder}' {there}; give the output_dir of a run")
    lines = [line for line in _records(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]
    rows = [{key: number(value) for key, value in line.items()} | {"logged": frozenset(line)} for line in lines]
    metrics = pd.DataFrame(rows) if rows else pd.DataFrame({"step": [], "logged": []})
    results = _json(folder / "results.json")
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        metrics=metrics.assign(step=metrics["step"].astype(int)),
        config=_dict(results.get("config")) or _yaml(folder / "config.yaml"),
        results=results,
        data=_dict(results.get("data")) or _json(folder / "data_report.json"),
        mistakes=list(_records(folder / "mistakes.jsonl")),
    )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) or value in ("NaN", "Infinity", "-Infinity")


def number(value: Any) -> float:
    """A number of one of our files, where "NaN" and "Infinity" are strings; NaN for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in the lines of a file; other lines (a crash tears the last one) are left out."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict):
                    yield record
    except OSError:
        return


def _json(path: Path) -> dict[str, Any]:
    try:
        return _dict(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    except (OSError, ValueError, RecursionError):
        return {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return _dict(yaml.safe_load(path.read_text(encoding="utf-8", errors="replace")))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
