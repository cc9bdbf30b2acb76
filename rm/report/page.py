"""report.html: a run, or several side by side, as one page without network, scripts or anything outside it.

python -m rm.report OUT                                  # OUT/report.html anew, from what lies in the folder
python -m rm.report A B C --output comparison.html       # runs overlaid, with the options in which they differ
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rm.config.files import write_text
from rm.log.token_html import LEGEND, NOTE, STRIP_CSS
from rm.report.card import names_in
from rm.report.figures import (
    comparison_pictures,
    evaluation_intervals,
    evaluation_pictures,
    sets_of,
    training_pictures,
)
from rm.report.parts import (
    GLOSSARY,
    audit_part,
    bin_rows,
    clean,
    excerpt,
    headline,
    interval_text,
    known_interval,
    metric_rows,
    paired_differences,
    plain,
    record_part,
    sample_parts,
    signed,
    spelled,
    with_defaults,
)
from rm.report.read_run import Run, read_run

logger = logging.getLogger(__name__)

MAX_MISTAKES = 20  # that are shown
MAX_SETS = 6  # evaluation sets that get pictures of their own


def run_page(run: Run) -> dict[str, Any]:
    """What the template shows of one run."""
    table = run.table()
    intervals = evaluation_intervals(run)
    sets = sets_of(run) if table is not None else []
    others = f"The first {MAX_SETS} of {len(sets)} sets; {len(sets) - MAX_SETS} have no pictures of their own."
    is_of = [(name, table[table["set"] == name]) for name in sets[:MAX_SETS]]
    samples, samples_note = sample_parts(run)
    page = dict(
        run=run,
        title=f"Reward model: {run.name}",
        cards=headline(run, intervals),
        metric_rows=metric_rows(run, intervals),
        curves=list(training_pictures(run, intervals)),
        evaluation=[] if table is None else list(evaluation_pictures(table, run=run)),
        evaluated_step=run.table_step,
        set_pictures=[
            (name, list(itertools.islice(evaluation_pictures(part, f"set-{i}-"), 3)))
            for i, (name, part) in enumerate(is_of)
        ],
        sets_note=others if len(sets) > MAX_SETS else "",
        samples=samples,
        samples_note=samples_note,
        strips_note=Markup(f"{NOTE} {LEGEND}") if any(pair["last"]["strip_chosen"] for pair in samples) else "",
        mistakes=[with_defaults(record) for record in run.mistakes[:MAX_MISTAKES]],
        audit=audit_part(run.data),
        records=[record_part(run)],
    )
    data = ", ".join(map(str, names_in(run.config.get("dataset_name")))) or "pairs"
    page["lead"] = [
        f"{run.config.get('model_name_or_path', 'A model')}, trained on {data}: a reward model gives a score to an "
        "answer, learned from pairs of answers of which one (chosen) was preferred to the other (rejected)."
    ]
    numbers = {key: run.final.get(name) for key, name in (("steps", "train/steps"), ("seconds", "speed/train_seconds"))}
    if all(value is not None for value in numbers.values()):
        speed = spelled(run.final.get("speed/pairs_per_second", math.nan))
        memory = spelled(run.final.get("speed/peak_memory_gb", math.nan))
        took = (
            f"{spelled(numbers['steps'])} optimizer steps in {numbers['seconds']:,.1f} s of training, {speed} pairs/s"
        )
        page["lead"].append(f"{took}; largest memory of the main process {memory} GB.")
    page["notes"] = missing_parts(run, page)
    names = dict(result="Result", curves="Training", evaluation="Held-out evaluation", samples="Samples")
    names |= dict(mistakes="Worst mistakes", data="Data", config="Configuration")
    there = {"result": True, "config": True, "data": page["audit"]}
    page["sections"] = [(key, name) for key, name in names.items() if there.get(key, page.get(key))]
    return page


def missing_parts(run: Run, page: dict[str, Any]) -> list[str]:
    """A word on everything that is not in the page, and why."""
    notes = []
    if not run.results:
        notes.append(
            f"This run is not finished: it is going on, or was stopped. Its numbers end at step {run.last_step:,}."
        )
    if not len(run.metrics):
        notes.append("Nothing is logged yet, so there are no curves.")
    if not any(name.startswith("eval/") for name in run.final):
        notes.append("There was no evaluation yet.")
    elif not page["evaluation"]:
        where = "eval/step-N.parquet is missing or cannot be read"
        why = "its rewards are not finite" if run.table() is not None else where
        notes.append(f"No histograms, calibration and breakdowns: {why}.")
    if not page["samples"]:
        notes.append(
            "No sample pairs: the run was told to show none (num_print_samples=0), or has not come to an evaluation."
        )
    if not page["mistakes"]:
        notes.append("No list of mistakes: mistakes.jsonl is written at the end of a run.")
    if not page["audit"]:
        notes.append("No audit of the data: data_report.json is missing.")
    return notes


def comparison_page(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template shows of several runs."""
    intervals = [evaluation_intervals(run) for run in runs]
    names = list(dict.fromkeys(name for run in runs for name in run.final if name.startswith("eval/")))
    names += [f"train/{name}" for name in ("loss", "accuracy", "steps")] + [
        "speed/pairs_per_second",
        "speed/peak_memory_gb",
    ]
    rows = []
    for name in names:
        both = zip(runs, intervals, strict=True)
        cells = [(r.final.get(name), known_interval(r, i, name) if name in r.final else None) for r, i in both]
        if not name.endswith(("_low", "_high")) and any(value is not None for value, _ in cells):
            row = [
                "" if v is None else spelled(v) + (f" ({' to '.join(map(spelled, i))})" if i else "") for v, i in cells
            ]
            rows.append([name, *row, *GLOSSARY.get(name.rsplit("/", 1)[-1], ("", ""))])
    keys = list(dict.fromkeys(key for run in runs for key in run.config if key not in ("output_dir", "run_name")))
    options = [[key, *(plain(run.config[key]) if key in run.config else "" for run in runs)] for key in keys]
    prints = [["evaluation pairs, sha256", *((run.data.get("test") or {}).get("fingerprint", "")[:16] for run in runs)]]
    prints += [["training pairs, sha256", *((run.data.get("train") or {}).get("fingerprint", "")[:16] for run in runs)]]
    prints += [["commit", *(str(run.results.get("git_commit") or "")[:12] for run in runs)]]
    notes = [
        f"{run.name} is not finished: its numbers are those up to step {run.last_step:,}."
        for run in runs
        if not run.results
    ]
    if len(set(prints[0][1:]) - {""}) > 1:
        notes.append("The runs were evaluated on different pairs: their held-out numbers do not compare directly.")
    differences = [row for two in itertools.combinations(runs, 2) for row in paired_differences(*two)]
    comparison = dict(
        names=[run.name for run in runs],
        metrics=rows,
        options=[row for row in options + prints if len(set(row[1:])) > 1],
        differences=differences,
        pictures=list(comparison_pictures(runs, intervals)),
    )
    sections = [("result", "Final metrics"), ("options", "Options"), ("curves", "Curves"), ("config", "Configuration")]
    title = "Reward models: " + ", ".join(comparison["names"])
    records = [record_part(run) for run in runs]
    lead = [
        f"{len(runs)} runs of reward models side by side: how well each gives the preferred answer of a pair the "
        "higher reward on held-out pairs, the options in which the runs differ, and their curves. Each run has a page "
        "of its own, report.html in its folder."
    ]
    return dict(comparison=comparison, sections=sections, title=title, records=records, notes=notes, lead=lead)


# ---------------------------------------------------------------- the page


def report_html(folders: Sequence[str | os.PathLike]) -> str:
    """The page of one run, or of several compared. Raises `ReadError` if a folder holds no run."""
    from rm.report.plots import style

    runs = [read_run(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]
    template_folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=template_folder,
        autoescape=True,
        finalize=clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = dict(excerpt=excerpt, signed=signed, spelled=spelled, interval_text=interval_text, bin_rows=bin_rows)
    environment.globals |= functions | dict(run=None, comparison=None, strip_css=STRIP_CSS)
    with style():
        page = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    return environment.get_template("report.html.jinja").render(page)


def distinct_names(folders: Sequence[str | os.PathLike]) -> list[str]:
    """The folders' own names, with as much of the path in front as tells them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def write_report(output_dir: str | os.PathLike) -> None:
    """Write `output_dir/report.html`; what goes wrong is a warning, since no run may be lost for its picture."""
    try:
        write_text(Path(output_dir) / "report.html", report_html([output_dir]), errors="backslashreplace")
    except Exception as error:
        again = f"python -m rm.report {output_dir}"
        logger.warning(f"report.html is not written ({type(error).__name__}: {error}); to try again: {again}")
