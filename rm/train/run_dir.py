"""The run's folder: may it be used, where does training start in it, and what of an earlier run stays."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rm.config.errors import InputError
from rm.config.files import write_text
from rm.train.checkpoint import (
    CheckpointError,
    copy_checkpoint,
    damage,
    discard,
    find_checkpoint,
    list_checkpoints,
    read_state,
    set_aside,
)

logger = logging.getLogger(__name__)


def open_output_dir(
    output_dir: str | None, run_name: str | None, *, names: tuple[str, str], may_hold_run: bool
) -> tuple[Path, str]:
    """The run's folder, made if need be and tried by writing to it, and the run's name.

    Without `output_dir` it is `runs/<run_name>`, without either `runs/<names>-<time>`. Raises `InputError` if it
    cannot be written, or holds a run and not `may_hold_run`.
    """
    if run_name is None and output_dir is not None:
        run_name = Path(output_dir).resolve().name
    if run_name is None:
        stem = "-".join(Path(name).name.split(".")[0] if i else Path(name).name for i, name in enumerate(names))
        run_name = stem + time.strftime("-%Y%m%d-%H%M%S")
        while (Path("runs") / run_name).exists():
            run_name += "+"  # another run of the same second
    folder = Path(output_dir or Path("runs") / run_name)
    if _holds_run(folder) and not may_hold_run:
        fix = "choose another, or give overwrite_output_dir=true or resume_from_checkpoint=latest"
        raise InputError(f"output_dir={folder} already holds a run; {fix}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ".writable", "yes")
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"output_dir={folder} cannot be written: {error.strerror}") from None
    return folder, run_name


def refuse_own_origin(output_dir: Path, model: str) -> None:
    """Raise `InputError` if to save the run would remove the model that it begins with, or its base."""
    origins = [model]
    if (adapter := Path(model) / "adapter_config.json").is_file():
        try:
            origins.append(str(json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")))
        except (ValueError, AttributeError):
            pass  # the loader names what is wrong with it
    replaced = [folder.resolve() for folder in (output_dir, output_dir / "adapter")]
    for origin in origins:
        if Path(origin).is_dir() and Path(origin).resolve() in replaced:
            fix = "which the run begins with; choose another"
            raise InputError(f"output_dir={output_dir} would replace '{origin}', {fix}")


def find_start(
    resume_from_checkpoint: str | None,
    output_dir: Path,
    record: dict[str, Any],
    changed_options: Callable[..., list[str]],
) -> tuple[Path | None, dict[str, Any] | None]:
    """(checkpoint to go on from, or None; the summary of a run that is finished already, or None).

    Args:
        record: the options of this run, resolved.
        changed_options: names what differs, of two records, and must not; with True also names of data and model,
            which are compared by their content later if training goes on.

    Raises:
        InputError: there is no such checkpoint, all are damaged, it is of a run with other options, or `output_dir`
            holds a run that it is not a part of.
    """
    if resume_from_checkpoint is None:
        return None, None
    finished = output_dir / "results.json"
    if resume_from_checkpoint == "latest" and finished.exists():
        try:
            results = json.loads(finished.read_text(encoding="utf-8"))
            before, summary = results["config"], results["summary"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{finished} is not what this program writes ({error!r}); move it away") from None
        _refuse(changed_options(before, record, True), output_dir)
        return None, summary
    try:
        checkpoint = find_checkpoint(resume_from_checkpoint, output_dir / "checkpoints")
    except CheckpointError as error:
        raise InputError(str(error)) from None
    if checkpoint is None:
        logger.warning(f"resume_from_checkpoint=latest: {output_dir} has no checkpoint yet; from the first step on")
    else:
        _refuse(changed_options(read_state(checkpoint)["config"], record), checkpoint)
        if not _is_part_of(checkpoint, output_dir) and _holds_run(output_dir):
            raise InputError(f"{checkpoint} is not of the run in output_dir={output_dir}; give a new output_dir")
    return checkpoint, None


def _holds_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or bool(list_checkpoints(folder / "checkpoints"))


def _is_part_of(checkpoint: Path, output_dir: Path) -> bool:
    return checkpoint.resolve().parent == (output_dir / "checkpoints").resolve()


def refuse_other_content(before: dict[str, str], now: dict[str, str], checkpoint: Path) -> None:
    """Raise `InputError` if a fingerprint (of the data, of the base model) is not the one in the checkpoint."""
    _refuse([f"the content of {name} has changed" for name in now if now[name] != before[name]], checkpoint)


def _refuse(changes: list[str], where: Path) -> None:
    if changes:
        fix = "resume with the options and data it began with, or give another output_dir"
        raise InputError(f"{where} is of another run ({'; '.join(changes)}); {fix}")


def claim_output_dir(
    output_dir: Path,
    config_yaml: str,
    report: dict[str, Any],
    checkpoint: Path | None,
    best_step: int | None = None,
) -> None:
    """Write what describes the run, and put away what an earlier one left: all of it, or what is past `checkpoint`.

    From a checkpoint of a run elsewhere, its metrics.jsonl, evaluations and checkpoint of `best_step` come along.
    """
    for last in ("results.json", "report.html"):
        (output_dir / last).unlink(missing_ok=True)
    folder = output_dir / "checkpoints"
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial)
    if checkpoint is None:  # the user allowed it, or there is none
        for old in ("samples", "eval"):
            shutil.rmtree(output_dir / old, ignore_errors=True)
        for old in (*folder.glob("step-*.replaced"), *(path for _, path in list_checkpoints(folder))):
            discard(old)
    elif _is_part_of(checkpoint, output_dir):
        step_done = read_state(checkpoint)["step"]
        for step, newer in list_checkpoints(folder):
            if step > step_done:  # damaged, or not wanted: the run comes by here again
                set_aside(newer)
    else:
        best = checkpoint.resolve().parent / f"step-{best_step}"
        if best.is_dir() and damage(best) is None:
            copy_checkpoint(best, folder)
        origin = checkpoint.resolve().parent.parent
        if (lines := origin / "metrics.jsonl").is_file():
            write_text(output_dir / "metrics.jsonl", lines.read_text(encoding="utf-8"))
        for table in (origin / "eval").glob("step-*.parquet"):  # of the best evaluation, for one
            (output_dir / "eval").mkdir(exist_ok=True)
            shutil.copy2(table, output_dir / "eval")
    write_text(output_dir / "config.yaml", config_yaml)
    write_text(output_dir / "data_report.json", json.dumps(report, indent=2))
