"""Read the directory of a run that is finished, running, stopped or damaged.

Files may have been edited. `Notes.attempt` is the one place that handles unusable content: what cannot be read or drawn
is left out of the page, and a note says so. Values have the types that are declared here.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from rm.config.cli import load_yaml
from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.config.redact import safe_line

TABLE_NUMBERS = (  # numeric columns of an evaluation table
    "row prompt reward_chosen reward_rejected length_chosen length_rejected prefix_length share margin p_chosen weight"
).split()


class Results(BaseModel):
    """What the report and a restart read of results.json."""

    summary: dict[str, Any] = {}
    intervals: dict[str, tuple[float, float]] = {}
    config: dict[str, Any] = {}
    command: list[str] = []
    git_commit: str | None = None
    git_diff: str | None = None
    layout: str = ""
    packages: dict[str, str] = {}
    machine: dict[str, Any] = {}
    adapter: dict[str, Any] | None = None
    normalization: dict[str, float] | None = None


class Audit(BaseModel, extra="allow"):
    """What the report shows of a split in data_report.json, or of one of its sets."""

    __pydantic_extra__: dict[str, float]  # the counts
    source: str | None = None
    format: str | None = None
    layout: str | None = None
    fingerprint: str | None = None
    columns: dict[str, Any] = {}
    sets: dict[str, "Audit"] = {}


class Pair(BaseModel):
    """What the report shows of a pair in samples/ or mistakes.jsonl (`rm.visualize_samples.sample_records`)."""

    id: str
    step: int
    prompt: str
    chosen: str
    rejected: str
    reward_chosen: float
    reward_rejected: float
    p_chosen: float
    margin: float
    correct: str
    token_rewards_chosen: list[tuple[str, float]] = []
    token_rewards_rejected: list[tuple[str, float]] = []


class Answer(BaseModel):
    """An answer of a `Group`."""

    text: str
    score: float | None
    win_share: float | None
    reward: float
    rank: int | None
    is_inverted: bool
    token_rewards: list[tuple[str, float]] = []


class Group(BaseModel):
    """What the report shows of a group there."""

    id: str
    step: int
    prompt: str
    accuracy: float
    correct: str
    answers: list[Answer] = Field(min_length=1)


class Notes(list[str]):
    """Sentences for the top of the page: what is missing, and why."""

    def attempt(self, what: str, make: Callable, *arguments: Any) -> Any:
        """`make(*arguments)`; unusable content becomes a note that `what` is left out, and the result is None."""
        try:
            with np.errstate(all="ignore"):  # edited numbers may overflow
                return make(*arguments)
        except (ValueError, ArithmeticError, OSError) as error:
            why = " ".join(str(error).split("[type=")[0].split())  # pydantic gives more
            self.append(safe_line(f"Left out: {what} ({type(error).__name__}: {why[:200]})."))

    def validate(self, what: str, kind: TypeAdapter, value: Any) -> Any:
        """`value` as the type `kind`, without the entries of its dicts that have a wrong type; these are noted."""
        try:
            return kind.validate_python(value)
        except ValidationError as error:
            problems, wrong = error.errors(), {}
        for problem in problems:
            parent, inner, keys = {}, value, []
            for key in problem["loc"]:
                if isinstance(inner, dict) and key in inner:
                    parent, inner, keys = inner, inner[key], [*keys, key]
            wrong[tuple(keys)] = parent, problem["msg"]
        if () in wrong:
            return self.attempt(what, kind.validate_python, value)
        for keys, (parent, problem) in wrong.items():
            self.append(safe_line(f"Left out: {'.'.join(map(str, keys))} of {what} ({problem})."))
            del parent[keys[-1]]
        return self.validate(what, kind, value)

    def read_lines(self, path: Path, kind: Any) -> list[Any]:
        """The lines of a JSON Lines file as the type `kind`; unusable ones, such as one cut by a crash, are noted."""
        validate, unread = TypeAdapter(kind).validate_json, Notes()
        lines = path.read_bytes().splitlines() if path.is_file() else []
        found = [unread.attempt("", validate, line) for line in lines]
        if unread:
            self.append(f"Left out: {len(unread):,} unusable line{'s' * (len(unread) > 1)} of {path.name}.")
        return [value for value in found if value is not None]


class Run:
    """The files of a run. What is missing or unusable is empty: results.json exists only after the end.

    `curves`: {metric: {step: value}} of metrics.jsonl; of several lines of one step the last counts. `config`: the
    options, as resolved at the start. `data`: data_report.json. `sets`: the evaluation sets, if there are several.
    `final`: the metrics of the summary; of a run that is not finished, the last value of each. `intervals`: their 95%
    intervals. `table_step`: the step whose evaluation these are of: the last one, or the best one.
    """

    def __init__(self, folder: Path, name: str):
        """Raises `InputError` without metrics.jsonl, which every run writes first."""
        self.folder, self.name, self.notes, self.curves = folder, name, Notes(), {}
        if not (folder / "metrics.jsonl").is_file():
            problem = "contains no run (no metrics.jsonl)" if folder.is_dir() else "is not a directory"
            raise InputError(f"'{folder}' {problem}; give the output_dir of a run")
        for line in self.notes.read_lines(folder / "metrics.jsonl", dict[str, float]):
            if 0 <= (step := line.get("step", math.nan)) < 2**53:
                for key, value in line.items():
                    self.curves.setdefault(key, {})[int(step)] = value
        self.last_step = max(self.curves.get("step", {0: 0}))
        self.results: Results = self._read("results.json", from_json, Results) or Results()
        self.config = self.results.config or self._read("config.yaml", load_yaml, dict[str, Any]) or {}
        audits = self._read("data_report.json", from_json, dict[str, Audit]) or {}
        self.data = {split: audit.model_dump(exclude_unset=True) for split, audit in audits.items()}
        self.sets = list(self.data.get("test", {}).get("sets", {}))
        last = {name: curve[max(curve)] for name, curve in self.curves.items()}
        values = pd.Series(self.results.summary or last, dtype=object).filter(like="/")
        self.final = pd.to_numeric(values, errors="coerce").astype(float).to_dict()
        lows = {name.removesuffix("_low"): low for name, low in self.final.items() if name.endswith("_low")}
        ends = {name: (low, self.final.get(f"{name}_high", math.nan)) for name, low in lows.items()}
        self.intervals = {k: pair for k, pair in (ends | self.results.intervals).items() if np.isfinite(pair).all()}
        steps, best = [step for step, _ in self.numbered("eval/step-*.parquet")], self.final.get("train/best_step")
        is_best = self.config.get("load_best_model_at_end") and best in steps
        self.table_step = int(best) if is_best else max(steps, default=None)

    def _read(self, name: str, load: Callable[[str], Any], kind: Any) -> Any:
        """The content of a file as the type `kind`, without what has another type; None if there is none."""
        path = self.folder / name
        value = self.notes.attempt(name, lambda: load(path.read_text("utf-8"))) if path.is_file() else None
        return None if value is None else self.notes.validate(name, TypeAdapter(kind), value)

    def numbered(self, pattern: str) -> list[tuple[int, Path]]:
        """(step, file) in order; none past the last step: those are left from before a resume."""
        steps = [(path.stem.removeprefix("step-"), path) for path in self.folder.glob(pattern)]
        return sorted((int(step), path) for step, path in steps if step.isdecimal() and int(step) <= self.last_step)

    def curve(self, name: str) -> pd.DataFrame:
        """A metric by step, NaN if it is not finite: columns value, value_low and value_high (95% interval or NaN)."""
        ends = {f"value{end}": self.curves.get(f"{name}{end}", {}) for end in ("", "_low", "_high")}
        curve = pd.DataFrame(ends, dtype=float).sort_index().replace([math.inf, -math.inf], math.nan)
        if name in self.intervals and self.table_step in curve.index:
            curve.loc[self.table_step, ["value_low", "value_high"]] = self.intervals[name]
        return curve


def read_table(path: Path, notes: Notes) -> pd.DataFrame:
    """An evaluation table without comparisons whose rewards are not finite. Raises `ValueError` if it is unusable."""
    table = pd.read_parquet(path)
    names = {*TABLE_NUMBERS, *({"true_margin"} & set(table))}
    if wrong := sorted(names - set(table.select_dtypes("number"))):
        raise ValueError(f"no numbers in column {', '.join(wrong)}")
    finite = table[np.isfinite(table["reward_chosen"] - table["reward_rejected"])].reset_index(drop=True)
    if finite.empty:
        raise ValueError("its rewards are not finite")
    if len(finite) < len(table):
        notes.append(f"Left out: {len(table) - len(finite):,} of {len(table):,} rewards that are not finite.")
    return finite


def changed_options(config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value, default) of the options in `config` that differ from their defaults."""
    defaults = vars(RewardConfig())
    return [(name, value, defaults.get(name)) for name, value in config.items() if value != defaults.get(name)]
