"""Read the directory of a run that is finished, running, stopped or damaged.

Files may have been edited. `Notes.attempt` is the one place that handles unusable content: what cannot be read or drawn
is left out of the page, and a note says so. Values of unknown type pass through `typed` before they are used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pydantic import TypeAdapter

from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.config.redact import safe_line

TABLE_NUMBERS = (  # numeric columns of an evaluation table
    "row prompt reward_chosen reward_rejected length_chosen length_rejected prefix_length share margin p_chosen weight"
).split()
UNUSABLE = (ValueError, ArithmeticError, OSError, RecursionError, yaml.YAMLError)  # pyarrow raises ValueErrors
_adapter = cache(TypeAdapter)


def typed(kind: Any, value: Any) -> Any:
    """`value` converted to the type `kind` by pydantic; raises `ValueError`."""
    return _adapter(kind).validate_python(value)


def number(value: Any) -> float:
    """A number of one of our files, where "NaN" and "Infinity" are strings; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


class Notes(list[str]):
    """Sentences for the top of the page: what is missing, and why."""

    def attempt(self, what: str, make: Callable, *arguments: Any) -> Any:
        """`make(*arguments)`; unusable content becomes a note that `what` is left out, and the result is None."""
        try:
            with np.errstate(all="ignore"):  # edited numbers may overflow
                return make(*arguments)
        except UNUSABLE as error:
            why = " ".join(str(error).split("[type=")[0].split())  # pydantic gives more
            self.append(safe_line(f"Left out: {what} ({type(error).__name__}: {why[:200]})."))


@dataclass
class Run:
    """The files of a run. What is missing or unusable is empty: results.json exists only after the end.

    `curves`: {metric: {step: value}} of metrics.jsonl; of several lines of one step the last counts. `config`: the
    options, as resolved at the start. `data`: data_report.json.
    """

    folder: Path
    name: str
    curves: dict[str, dict[int, float]]
    results: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]
    notes: Notes = field(default_factory=Notes)

    @cached_property
    def final(self) -> dict[str, float]:
        """The metrics of the summary; of a run without one, the last value of each."""
        last = {name: curve[max(curve)] for name, curve in self.curves.items()}
        return {k: number(v) for k, v in (mapping(self.results.get("summary")) or last).items() if "/" in k}

    @cached_property
    def last_step(self) -> int:
        return max(self.curves.get("step", {}), default=int(np.nan_to_num(self.final.get("train/steps", 0))))

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95% intervals of metrics of `final`: those of results.json, and those logged with a metric."""
        logged = [name.removesuffix("_low") for name in self.final if name.endswith("_low")]
        ends = {name: (self.final[f"{name}_low"], self.final.get(f"{name}_high")) for name in logged}
        ends |= mapping(self.results.get("intervals"))
        pairs = {k: self.notes.attempt(f"the interval of {k}", typed, tuple[float, float], v) for k, v in ends.items()}
        return {name: pair for name, pair in pairs.items() if pair and np.isfinite(pair).all()}

    def curve(self, name: str) -> pd.Series:
        """The values of a metric by step, float64; empty if it was never logged."""
        return pd.Series(self.curves.get(name, {}), dtype=float).sort_index()

    def interval_curve(self, name: str) -> tuple[pd.Series, pd.Series]:
        """The 95% intervals of a curve at the steps that have one: those logged with it, and that of `final`."""
        low, high = self.curve(f"{name}_low"), self.curve(f"{name}_high")
        if name in self.intervals and self.table_step in self.curves.get(name, {}):
            low.loc[self.table_step], high.loc[self.table_step] = self.intervals[name]
        return low, high

    @property
    def sets(self) -> list[str]:
        """The names of the evaluation sets, if there are several."""
        sets = list(mapping(mapping(self.data.get("test")).get("sets")))
        return sets if len(sets) > 1 else []

    @cached_property
    def table_step(self) -> int | None:
        """The step whose evaluation the final metrics are of: the last one, or the best one."""
        steps, best = [step for step, _ in self._numbered("eval/step-*.parquet")], self.final.get("train/best_step")
        is_best = self.config.get("load_best_model_at_end") and best in steps
        return int(best) if is_best else max(steps, default=None)

    @cached_property
    def table(self) -> pd.DataFrame | None:
        """The evaluation table of `table_step`, without comparisons whose rewards are not finite; None: unusable."""
        what = f"histograms, calibration and slices from eval/step-{self.table_step}.parquet"
        return self.notes.attempt(what, self._read_table) if self.table_step is not None else None

    def _read_table(self) -> pd.DataFrame:
        table = pd.read_parquet(self.folder / "eval" / f"step-{self.table_step}.parquet")
        names = {*TABLE_NUMBERS, *({"true_margin"} & set(table))}
        if wrong := sorted(name for name in names if name not in table or table[name].dtype.kind not in "iuf"):
            raise ValueError(f"no numbers in column {', '.join(wrong)}")
        for name in {"set", "subset"} & set(table):
            table[name] = table[name].map(str, na_action="ignore")
        finite = table[np.isfinite(table["reward_chosen"] - table["reward_rejected"])].reset_index(drop=True)
        if finite.empty:
            raise ValueError("its rewards are not finite")
        if len(finite) < len(table):
            self.notes.append(f"Left out: {len(table) - len(finite):,} of {len(table):,} rewards that are not finite.")
        return finite

    @cached_property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """The pairs shown at evaluations by id, each with its record of every step, in order."""
        shown: dict[str, list[dict]] = {}
        for step, path in self._numbered("samples/step-*.jsonl"):
            for record in read_records(path, self.notes):
                shown.setdefault(str(record.get("id")), []).append({**record, "step": step})
        return shown

    def _numbered(self, pattern: str) -> list[tuple[int, Path]]:
        """(step, file) in order; none past the last step: those are left from before a resume."""
        found = [(re.fullmatch(r"step-(\d{1,15})", path.stem), path) for path in self.folder.glob(pattern)]
        return sorted((int(m[1]), path) for m, path in found if m and int(m[1]) <= (self.last_step or math.inf))


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Read the directory of a run. Raises `InputError` without metrics.jsonl, which every run writes first."""
    folder, notes, curves = Path(folder), Notes(), {}
    if not (folder / "metrics.jsonl").is_file():
        problem = "contains no run (no metrics.jsonl)" if folder.is_dir() else "is not a directory"
        raise InputError(f"'{folder}' {problem}; give the output_dir of a run")
    for line in read_records(folder / "metrics.jsonl", notes):
        if isinstance(step := line.get("step"), int) and 0 <= step < 2**53:
            for key, value in line.items():
                curves.setdefault(key, {})[step] = number(value)
    results = _read_mapping(folder / "results.json", notes)
    config = mapping(results.get("config")) or _read_mapping(folder / "config.yaml", notes)
    data = mapping(results.get("data")) or _read_mapping(folder / "data_report.json", notes)
    return Run(folder, name or folder.resolve().name, curves, results, config, data, notes)


def _read_mapping(path: Path, notes: Notes) -> dict[str, Any]:
    """A file that holds one JSON or YAML mapping; {} if it is missing or unusable."""
    load = json.loads if path.suffix == ".json" else yaml.safe_load
    read = lambda: typed(dict[str, Any], load(path.read_text(encoding="utf-8")))  # noqa: E731
    return (notes.attempt(path.name, read) or {}) if path.is_file() else {}


def read_records(path: Path, notes: Notes) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a file; other lines, such as one cut by a crash, are counted in a note."""
    lines, unread = path.read_bytes().splitlines() if path.is_file() else [], Notes()
    records = [unread.attempt("", lambda line: typed(dict[str, Any], json.loads(line)), line) for line in lines]
    if unread:
        notes.append(f"Left out: {len(unread):,} unusable line{'s' * (len(unread) > 1)} of {path.name}.")
    return [record for record in records if record]


def changed_options(config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value, default) of the options in `config` that differ from their defaults."""
    defaults = vars(RewardConfig())
    return [(name, value, defaults.get(name)) for name, value in config.items() if value != defaults.get(name)]
