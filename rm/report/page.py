"""The numbers and texts of report.html, for one run or for several runs (a leaderboard)."""

import difflib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from rm.config.errors import InputError
from rm.data.audit import MEANING
from rm.evaluate.metrics import find_metric
from rm.log.token_html import CSS, NOTE, answers_of, token_rewards_html
from rm.report import figures
from rm.report.read_run import Group, Notes, Pair, Run, changed_options, read_table

MAX_SETS = 6  # evaluation sets that have their own figures
MAX_SAMPLES, MAX_MISTAKES = 12, 20  # prompts that are shown
MAX_TOKENS = 1_000  # no token rewards are shown if an answer is longer
CARDS = {
    "eval/accuracy": "Accuracy", "eval/accuracy_ceiling": "Best possible accuracy",
    "eval/longer_answer_baseline_accuracy": "Longer-answer baseline", "eval/best_of_n_accuracy": "Best-of-N accuracy",
    "eval/loss": "Loss", "eval/ece": "Calibration error", "eval/margin": "Margin",
}  # fmt: skip
SIGNED = "{:+.3f}".format
COLUMNS = (*CARDS, "train/loss", "train/steps", "speed/pairs_per_second", "speed/peak_memory_gb")  # of the leaderboard
# characters that HTML forbids, and bidirectional controls, which reorder text; tab and line ends are allowed
INVISIBLE = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"


def report_html(folders: Sequence[str | os.PathLike], by: str = "eval/accuracy") -> str:
    """The page of one run, or of several, sorted by the metric `by`. Raises `InputError` if a directory has no run."""
    paths = [Path(folder).resolve() for folder in folders]
    shared = os.path.commonpath([path.parent for path in paths])
    empty = [path for path in paths if path.is_dir() and not (path / "metrics.jsonl").is_file()]
    known = [path for path in paths if path not in empty] or paths
    runs = [Run(path, str(path.relative_to(shared))) for path in known]
    page = run_page(runs[0]) if len(paths) == 1 else leaderboard_page(runs, by)
    page["notes"] += [f"Left out: {path.name} has no metrics.jsonl (yet)." for path in empty]
    page |= {"signed": SIGNED, "spelled": spelled, "plain": plain, "find_metric": find_metric, "cards": CARDS}
    page |= {"look": figures, "tokens_css": CSS, "tokens_note": Markup(NOTE), "audit_counts": MEANING}
    env = Environment(loader=PackageLoader("rm", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = env.get_template("report.html.jinja").render(page)
    return re.sub(INVISIBLE, lambda found: f"⟨U+{ord(found[0]):04X}⟩", html)


def plain(value: Any) -> str:
    """A value in the form of the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def spelled(value: float) -> str:
    """The value of a metric as text for a table."""
    if not math.isfinite(value):
        return "not finite"
    if value == round(value) and abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:,.4g}" if abs(value) >= 1 else f"{value:.4f}"


# ---------------------------------------------------------------- one run
def run_page(run: Run) -> dict[str, Any]:
    """The variables of the template for one run."""
    notes, evaluation, sets = run.notes, [], {}
    table_file = run.folder / "eval" / f"step-{run.table_step}.parquet"
    what = f"histograms, calibration and slices from eval/{table_file.name}"
    if table_file.is_file() and (table := notes.attempt(what, read_table, table_file, notes)) is not None:
        evaluation = figures.draw(figures.evaluation(run, table), notes)
        for i, name in enumerate(run.sets[:MAX_SETS]):
            plans = figures.evaluation(run, table[table["set"] == name])[:3]
            sets[name] = figures.draw(plans, notes, f"set-{i}-")
    shown: dict[tuple, list[Pair | Group]] = {}  # (id, kind) -> records of a prompt, one per evaluation
    for _, path in run.numbered("samples/step-*.jsonl"):
        for record in notes.read_lines(path, Pair | Group):
            shown.setdefault((record.id, type(record)), []).append(record)
    samples = [sample_view(i, records, notes) for i, records in enumerate(list(shown.values())[:MAX_SAMPLES])]
    mistakes = notes.read_lines(run.folder / "mistakes.jsonl", Pair | Group)[:MAX_MISTAKES]
    page = {"run": run, "samples": samples, "num_samples": len(shown), "mistakes": list(map(record_view, mistakes))}
    page |= {"curves": figures.draw(figures.training(run), notes), "evaluation": evaluation, "sets": sets}
    return page | {"changed": changed_options(run.config), "notes": notes}


def sample_view(i: int, records: list[Pair | Group], notes: Notes) -> dict[str, Any]:
    """The variables of the template for a prompt: its rewards at all evaluations, and a chart of them."""
    steps, number = [record.step for record in records], "accuracy" if isinstance(records[0], Group) else "margin"
    rewards = [{answer["name"]: answer["reward"] for answer in answers_of(record.model_dump())} for record in records]
    frame = pd.DataFrame(rewards, steps)
    lines = {name: frame[[name]].set_axis(["value"], axis=1) for name in frame.columns[: figures.NUM_LOOKS]}
    lines = {name: line.assign(value_low=math.nan, value_high=math.nan) for name, line in lines.items()}
    size = (figures.SMALL[0], figures.SMALL[1] + 0.3 * (math.ceil(len(lines) / 2) - 1))  # the legend has two columns
    plan = (f"sample-{i}", f"Rewards of prompt {i + 1}", figures.curves, lines, "reward", "", (), False, size)
    numbers = frame.assign(**{number: [getattr(record, number) for record in records]})
    rows = [[f"{step:,}", *map(SIGNED, values)] for step, *values in numbers.itertuples()]
    view = {"headers": ["step", *numbers], "rows": rows, "drawings": figures.draw([plan], notes)}
    return record_view(records[-1]) | view


def record_view(record: Pair | Group) -> dict[str, Any]:
    """The variables of the template for a pair or a group."""
    answers = answers_of(record.model_dump())
    rewards = [answer["token_rewards"] for answer in answers]
    has_tokens = all(rewards) and max(map(len, rewards)) <= MAX_TOKENS
    for answer, tokens in zip(answers, token_rewards_html(*rewards) if has_tokens else [], strict=has_tokens):
        answer["tokens"] = Markup(tokens)
    return vars(record) | {"answers": answers, "has_tokens": has_tokens}


# ---------------------------------------------------------------- several runs
def leaderboard_page(runs: Sequence[Run], by: str) -> dict[str, Any]:
    """The variables of the template for several runs: one row per run, sorted by the metric `by`, the best first."""
    known = list(dict.fromkeys(name for run in runs for name in run.final))
    if by not in known:
        near = difflib.get_close_matches(by, known, n=5, cutoff=0)
        raise InputError(f"--by {by}: no run has this metric; the nearest: {', '.join(near)}")
    sign = 1 if find_metric(by).higher_is_better is False else -1
    runs = sorted(runs, key=lambda run: (math.isnan(value := run.final.get(by, math.nan)), sign * value, run.name))
    options, notes = {}, Notes()
    for run in runs:
        texts = {key: f"{v:.6g}" if isinstance(v, float) else plain(v) for key, v in run.config.items()}
        for split in ("test", "train"):
            texts[f"{split} data"] = str(run.data.get(split, {}).get("fingerprint", ""))[:12]
        finished = "yes" if run.results.summary else f"no, at step {run.last_step:,}"
        options[run.name] = texts | {"commit": (run.results.git_commit or "")[:12], "finished": finished}
    keys = dict.fromkeys(key for texts in options.values() for key in texts if key not in ("output_dir", "run_name"))
    differing = [key for key in keys if len({texts.get(key) for texts in options.values()}) > 1]
    changed = [row for row in changed_options(runs[0].config) if row[0] in keys and row[0] not in differing]
    page = {"runs": runs, "by": by, "best": "lowest" if sign > 0 else "highest", "options": options}
    page |= {"columns": [name for name in dict.fromkeys((by, *COLUMNS)) if name in known]}
    page |= {"curves": figures.draw(figures.comparison(runs[: figures.NUM_LOOKS]), notes)}
    notes = notes + [f"{run.name}: {note}" for run in runs for note in run.notes]
    return page | {"differing": differing, "changed": changed, "notes": notes}
