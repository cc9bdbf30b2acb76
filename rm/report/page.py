"""The parts of report.html that are numbers and texts: of one run, and of several as a leaderboard."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from rm.config.errors import InputError
from rm.data.audit import MEANING
from rm.evaluate.compare import compare_tables
from rm.evaluate.metrics import find_metric
from rm.log.token_html import CSS, NOTE, token_rewards_html
from rm.report import figures
from rm.report.read_run import Notes, Run, changed_options, mapping, number, read_records, read_run, typed

MAX_SETS = 6  # evaluation sets with figures of their own
MAX_SAMPLES, MAX_MISTAKES = 12, 20  # pairs that are shown
MAX_TOKENS = 1_000  # of an answer that is shown with its token rewards
TITLES = {  # of the cards
    "eval/accuracy": "Accuracy",
    "eval/accuracy_ceiling": "Best possible accuracy",
    "eval/longer_answer_baseline_accuracy": "If the longer answer won",
    "eval/loss": "Loss",
    "eval/ece": "Calibration error",
    "eval/margin": "Margin",
}
COLUMNS = (*TITLES, "train/loss", "train/steps", "speed/pairs_per_second", "speed/peak_memory_gb")  # of the leaderboard

# Shown in place of characters that HTML does not allow or that change the order of the text around them.
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421, 13: None}
VISIBLE |= {code: 0xFFFD for code in (*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)}
VISIBLE |= {code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def report_html(folders: Sequence[str | os.PathLike], by: str = "eval/accuracy") -> str:
    """The page of one run, or of several sorted by the metric `by`. Raises `InputError` if a directory has no run."""
    paths = [Path(folder).resolve() for folder in folders]
    shared = os.path.commonpath([path.parent for path in paths])
    runs = [read_run(path, str(path.relative_to(shared))) for path in paths]
    page = run_page(runs[0]) if len(runs) == 1 else leaderboard_page(runs, by)
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page |= {f.__name__: f for f in (spelled, signed, between, plain, find_metric)}
    page |= {"palette": figures.PALETTE, "titles": TITLES, "tokens_css": CSS, "tokens_note": Markup(NOTE)}
    return environment.get_template("report.html.jinja").render(page).translate(VISIBLE)


def plain(value: Any) -> str:
    """A value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def spelled(value: float) -> str:
    """A metric's value for a table."""
    if not math.isfinite(value):
        return "not finite"
    if value == round(value) and abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:,.4g}" if abs(value) >= 1 else f"{value:.4f}"


def signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "not finite"


def between(ends: tuple[float, float] | None) -> str:
    """The ends of an interval, without a line break."""
    return "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}".join(map(spelled, ends or ()))


# ---------------------------------------------------------------- one run


def run_page(run: Run) -> dict[str, Any]:
    """What the template shows of one run."""
    notes, table, evaluation, sets = run.notes, run.table, [], {}
    if table is not None:
        evaluation = figures.draw(figures.evaluation(run, table, run.final.get("eval/accuracy", math.nan)), notes)
        for i, name in enumerate(run.sets[:MAX_SETS]):
            plans = figures.evaluation(run, table[table["set"] == name])[:3]
            sets[name] = figures.draw(plans, notes, f"set-{i}-")
    samples, mistakes = sample_views(run), read_records(run.folder / "mistakes.jsonl", notes)[:MAX_MISTAKES]
    missing = {
        f"This run is not finished; its numbers end at step {run.last_step:,}.": run.results,
        "No sample pairs: num_print_samples is 0, or there was no evaluation.": samples,
        "No list of mistakes: mistakes.jsonl is written at the end of a run.": mistakes,
        "No data audit: data_report.json is missing.": run.data,
    }
    notes += [note for note, found in missing.items() if not found]
    return {
        "run": run,
        "title": f"Reward model: {run.name}",
        "lead": how_it_went(run),
        "samples": samples,
        "curves": figures.draw(figures.training(run), notes),
        "evaluation": evaluation,
        "sets": sets,
        "mistakes": [pair_view(record, notes) for record in mistakes],
        "audit": notes.attempt("data audit", audit_view, run.data) if run.data else None,
        "changed": changed_options(run.config),
        "provenance": notes.attempt("provenance", provenance_view, run),
        "diff": notes.attempt("changes to the code", typed, str, run.results.get("git_diff") or ""),
        "notes": notes,
    }


def how_it_went(run: Run) -> str:
    """The result of a run in one sentence."""
    final, unfinished = run.final, "" if run.results else " of a run that is not finished"
    after = f"after {run.table_step or run.last_step:,} steps{unfinished}"
    accuracy = final.get("eval/accuracy", math.nan)
    if not math.isfinite(accuracy):
        held_out = "is not finite" if "eval/accuracy" in final else "is not known yet"
        training = f"; training accuracy is {final['train/accuracy']:.3f}" if "train/accuracy" in final else ""
        return f"Held-out accuracy {held_out} {after}{training}."
    ends = run.intervals.get("eval/accuracy")
    interval = f"95% interval {ends[0]:.2f} to {ends[1]:.2f}, " if ends else ""
    pairs = spelled(final.get("eval/pairs", math.nan))
    sentence = f"Held-out accuracy is {accuracy:.3f} ({interval}{pairs} pairs) {after}"
    if "eval/longer_answer_baseline_accuracy" in final:
        sentence += f"; preferring the longer answer gives {final['eval/longer_answer_baseline_accuracy']:.3f}"
    if "eval/accuracy_ceiling" in final:
        sentence += f"; the best possible is {final['eval/accuracy_ceiling']:.3f}"
    return sentence + "."


def sample_views(run: Run) -> list[dict[str, Any]]:
    """The first pairs shown over training, each with a chart of its rewards."""
    views = []
    for i, records in enumerate(list(run.samples.values())[:MAX_SAMPLES]):
        steps = [record["step"] for record in records]
        rewards = [[number(record.get(f"reward_{side}")) for record in records] for side in ("chosen", "rejected")]
        plan = (f"sample-{i}", f"Rewards of pair {i + 1}", figures.movement, steps, *rewards)
        rows = [[f"{s:,}", signed(c), signed(r), signed(c - r)] for s, c, r in zip(steps, *rewards, strict=True)]
        views.append(pair_view(records[-1], run.notes) | {"drawings": figures.draw([plan], run.notes), "rows": rows})
    return views


def pair_view(record: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """What the template shows of a record of samples/ or mistakes.jsonl."""
    view = {name: plain(record.get(name, "")) for name in ("id", "step", "correct", "prompt", "chosen", "rejected")}
    view |= {name: number(record.get(name)) for name in ("reward_chosen", "reward_rejected", "p_chosen")}
    rewards = [record.get(f"token_rewards_{side}", []) for side in ("chosen", "rejected")]
    rewards = notes.attempt(f"token rewards of {view['id']}", typed, list[list[tuple[str, float]]], rewards) or [[]]
    is_shown = all(rewards) and max(map(len, rewards)) <= MAX_TOKENS
    tokens = list(map(Markup, token_rewards_html(*rewards))) if is_shown else []
    return view | {"margin": view["reward_chosen"] - view["reward_rejected"], "tokens": tokens}


def audit_view(data: dict[str, Any]) -> dict[str, Any]:
    """data_report.json as a table with a column for each split, and for each set where there are several."""
    columns = {}
    for split, part in typed(dict[str, dict[str, Any]], data).items():
        sets = typed(dict[str, dict[str, Any]], part.get("sets", {}))
        columns |= {f"{split}: {name}": counts for name, counts in sets.items()}
        columns[f"{split}: all" if sets else split] = part
    counts = {name: [part.get(name) for part in columns.values()] for name in MEANING}
    texts = {name: ["" if v is None else spelled(number(v)) for v in values] for name, values in counts.items()}
    return {
        "headers": ["count", *columns, "meaning"],
        "rows": [[name, *texts[name], MEANING[name]] for name, values in counts.items() if any(values)],
        "sources": [f"{name}: {part.get('source')}, format {part.get('format')}." for name, part in columns.items()],
    }


def provenance_view(run: Run) -> list[tuple[str, str]]:
    """Where the numbers of a run come from, as rows of a table."""
    results = run.results
    facts = {"directory": str(run.folder), "command": " ".join(typed(list[str], results.get("command", [])))}
    facts |= {name: results.get(name) for name in ("git_commit", "layout", "adapter")}
    for name in ("packages", "machine"):
        facts[name] = ", ".join(f"{key} {value}" for key, value in typed(dict[str, Any], results.get(name, {})).items())
    facts |= {f"{split} pairs, sha256": mapping(part).get("fingerprint") for split, part in run.data.items()}
    return [(name, plain(value)) for name, value in facts.items() if value]


# ---------------------------------------------------------------- several runs


def leaderboard_page(runs: Sequence[Run], by: str) -> dict[str, Any]:
    """What the template shows of several runs: one row per run, the best by the metric `by` first."""
    known = list(dict.fromkeys(name for run in runs for name in run.final))
    if by not in known:
        near = difflib.get_close_matches(by, known, n=5, cutoff=0)
        raise InputError(f"--by {by}: no run has this metric; the nearest: {', '.join(near)}")
    sign = 1 if find_metric(by).higher_is_better is False else -1
    runs = sorted(runs, key=lambda run: (math.isnan(value := run.final.get(by, math.nan)), sign * value, run.name))
    first, options, notes = runs[: figures.NUM_LOOKS], {}, Notes()
    for run in runs:
        texts = {key: plain(value) for key, value in run.config.items() if key not in ("output_dir", "run_name")}
        for split in ("test", "train"):
            texts[f"{split} pairs"] = plain(mapping(run.data.get(split)).get("fingerprint", ""))[:12]
        texts["commit"] = plain(run.results.get("git_commit", ""))[:12]
        options[run.name] = texts | {"finished": "yes" if run.results else f"no, at step {run.last_step:,}"}
    keys = dict.fromkeys(key for texts in options.values() for key in texts)
    differing = [key for key in keys if len({texts.get(key) for texts in options.values()}) > 1]
    if "test pairs" in differing:
        notes.append("The runs were evaluated on different pairs: their held-out metrics do not compare directly.")
    pairs = {run.name: notes.attempt(f"difference to {run.name}", difference, first[0], run) for run in first[1:]}
    drawings = figures.draw(figures.comparison(first), notes)
    best = f"{'lowest' if sign > 0 else 'highest'} {by}, {spelled(runs[0].final.get(by, math.nan))}"
    return {
        "runs": runs,
        "title": f"{len(runs)} reward models",
        "lead": f"{runs[0].name} has the {best}, of {len(runs)} runs.",
        "by": by,
        "columns": [name for name in dict.fromkeys((by, *COLUMNS)) if name in known],
        "options": options,
        "differing": differing,
        "differences": {name: pair for name, pair in pairs.items() if pair},
        "curves": drawings,
        "changed": [row for row in changed_options(runs[0].config) if row[0] in keys and row[0] not in differing],
        "notes": notes + [f"{run.name}: {note}" for run in runs for note in run.notes],
    }


def difference(one: Run, other: Run) -> tuple[dict, dict] | None:
    """`compare_tables` over the comparisons that both runs have, if they were evaluated on the same data."""
    prints = [mapping(run.data.get("test")).get("fingerprint") for run in (one, other)]
    is_same = None not in prints and prints[0] == prints[1] and one.table is not None and other.table is not None
    return compare_tables(one.table, other.table) if is_same else None
