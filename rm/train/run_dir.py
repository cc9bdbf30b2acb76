"""The run directory: which process may write it, where training starts, and which files belong to the run.

A run replaces and removes only files that a run wrote. Their names are in `.run_files`; each is added before its file
is written. While a process uses the directory, it holds the lock of `.run_lock`.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rm.config.errors import InputError, RunError
from rm.config.files import damage, digest, discard_folder, finite, fsync, lock_folder, naming, read_json, write_file
from rm.config.options import RewardConfig, changed_options
from rm.config.redact import redact
from rm.data.tokenizer import find_base
from rm.report.hub import FILES, Hub, open_repo
from rm.report.read_run import Notes, Results
from rm.train.processes import on_main_process

logger = logging.getLogger(__name__)

RECORD = ".run_files"
FOLDERS = ("eval", "samples", "checkpoints", "adapter")
PATTERNS = (  # of all files that a run may write
    *FOLDERS,
    *FILES,
    *"metrics.jsonl.bak mistakes.jsonl report.html finished.json export_check.json".split(),
    *"eval/step-*.parquet samples/step-*.jsonl checkpoints/step-* adapter/*".split(),
    *".[!.]*.part .*.partial eval/.*.part samples/.*.part checkpoints/.*.partial".split(),  # temporary names
)
VERSION_1 = {"config.yaml", "metrics.jsonl", "results.json"}  # a directory of version 1 has these, and no `.run_files`
KEPT_ON_RESUME = ("metrics.jsonl", "eval/", "samples/", "checkpoints/")


class Run:
    """The directory of a run, locked, and where training starts; only the main process writes it.

    folder, name: place and name. record: all options, resolved and redacted. checkpoint, checkpoint_state: where
    training resumes, or None. results: the content of results.json if the final model is saved, otherwise None.

    The constructor is collective. It raises `InputError` if another process uses the directory, if it holds another run
    or files of others, or if nothing can be resumed.
    """

    def __init__(self, config: RewardConfig, accelerator: Accelerator):
        self.config, self.accelerator, self.started = config, accelerator, time.perf_counter()
        self.hub: Hub | None = None  # on the main process
        self.checkpoint: Path | None = None
        self.checkpoint_state: dict[str, Any] = {}
        self.results: dict[str, Any] | None = None
        self.content: dict[str, str] = {}  # fingerprints of data and base model
        record = config.resolved(accelerator.num_processes, accelerator.mixed_precision)
        self.record = json.loads(json.dumps(redact(record), default=str))  # as a checkpoint returns it
        vars(self).update(on_main_process(accelerator, self._open))  # clocks differ: the main process decides

    def _open(self) -> dict[str, Any]:
        """Lock the folder and find where training starts; returns what all processes share."""
        try:
            self._make_folder()
            self.lock = lock_folder(self.folder)
            self._check_files()
        except OSError as error:
            raise InputError(f"output_dir={self.folder} cannot be written: {error}") from None
        if self.config.resume_from_checkpoint:
            self._find_start(self.config.resume_from_checkpoint)
        if self.config.push_to_hub:
            self.hub = Hub(open_repo(self.config, self.name), self.config)
        return {name: vars(self)[name] for name in ("folder", "name", "checkpoint", "checkpoint_state", "results")}

    def _make_folder(self) -> None:
        """Raises `InputError` if the run would replace the model that it starts from, or the base of that adapter."""
        config, data = self.config, self.record["dataset_name"]
        data = "+".join(Path(place).name.split(".")[0] for place in ([data] if isinstance(data, str) else data))
        generated = f"{Path(self.record['model_name_or_path']).name}-{data[:80]}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(os.path.expanduser(config.output_dir or Path("runs", config.run_name or generated)))
        if not (config.output_dir or config.run_name) and self.folder.exists():
            self.folder = Path(f"{self.folder}-{os.getpid()}")  # another run of the same second
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name, model = config.run_name or self.folder.resolve().name, config.model_name_or_path
        for place in {model, find_base(model)[0]} if Path(model).is_dir() else ():
            if Path(place).resolve() in (self.folder.resolve(), (self.folder / "adapter").resolve()):
                raise InputError(f"output_dir={self.folder} would replace '{place}', which the run begins with")

    def _check_files(self) -> None:
        """Read which files belong to a run. Raises `InputError` if the run may not be replaced, or for other files."""
        paths = {path for pattern in PATTERNS for path in self.folder.glob(pattern)}
        found = {path.relative_to(self.folder).as_posix(): path for path in sorted(paths)}
        record = self.folder / RECORD
        lines = list(found.keys() - {*FOLDERS}) if VERSION_1 <= found.keys() else []
        lines = os.fsdecode(record.read_bytes()).splitlines() if record.exists() else lines
        self.own = {name for name in lines if not Path(name).is_absolute() and ".." not in Path(name).parts}
        if self.own & found.keys() and not (self.config.overwrite_output_dir or self.config.resume_from_checkpoint):
            fix = "choose another, or give overwrite_output_dir=true or resume_from_checkpoint=latest"
            raise InputError(f"output_dir={self.folder} already holds a run; {fix}")
        for name, path in found.items():
            is_folder = name in FOLDERS or name.startswith("checkpoints/") or path.suffix == ".partial"
            is_ours = name in (*self.own, *FOLDERS) or (record.exists() and path.suffix in (".part", ".partial"))
            if path.is_dir() != is_folder or not is_ours:
                fix = "no run of this program wrote it; move it away, or choose another output_dir"
                raise InputError(f"output_dir={self.folder}: '{name}' is in the way: {fix}")

    def _find_start(self, resume_from: str) -> None:
        results = read_json(self.folder / "results.json") or {}
        whole = Results.model_fields.keys() <= results.keys() and Notes().attempt("", Results.model_validate, results)
        if resume_from == "latest" and whole and self.read_verified("export_check.json"):
            reject(changed_options(results["config"], self.record, True), self.folder)
            self.results = results
            return
        newest_first = [path for _, path in reversed(self.checkpoints())]
        found = newest_first if resume_from == "latest" else [Path(resume_from)]
        for path in found:
            if not (problem := damage(path, "state.json")):
                break
            logger.warning(f"{path} is damaged and ignored: {problem}")
        else:
            if not found:
                logger.warning(f"resume_from_checkpoint=latest: {self.folder} has no checkpoint; it starts at step 0")
                return
            fix = "restore one from a backup, or start anew with overwrite_output_dir=true"
            raise InputError(f"resume_from_checkpoint={resume_from}: no undamaged checkpoint ({problem}); {fix}")
        if path.resolve().parent != (self.folder / "checkpoints").resolve():
            fix = "copy the run directory, and resume in the copy"
            raise InputError(f"{path} is not of the run in output_dir={self.folder}; {fix}")
        self.checkpoint, self.checkpoint_state = path, read_json(path / "state.json") or {}
        if self.checkpoint_state.get("format") != 2:
            raise InputError(f"{path} was written by another version of this program; start a new run")
        reject(changed_options(self.checkpoint_state["config"], self.record), path)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, path) of the checkpoints, oldest first, damaged ones included."""
        paths = {path.name.removeprefix("step-"): path for path in (self.folder / "checkpoints").glob("step-*")}
        return sorted((int(step), path) for step, path in paths.items() if step.isdecimal())  # not step-3.replaced

    def check_content(self, model: Any, train_set: Any, eval_set: Any) -> None:
        """Raise `InputError` if the data or the base model of a resumed run have changed. Collective."""

        def compare() -> dict[str, str]:
            content = {"dataset_name": train_set.fingerprint, "eval_dataset_name": eval_set.fingerprint}
            content["model_name_or_path"] = model_fingerprint(model)
            content["peft_config"] = digest(Path(self.config.peft_config))["sha256"] if self.config.peft_config else ""
            before = self.checkpoint_state.get("content", content)
            changed = [name for name in content if content[name] != before[name]]
            reject([f"the content of {name} has changed" for name in changed], self.checkpoint)
            return content

        self.content = on_main_process(self.accelerator, compare)

    def claim(self, config_yaml: str, data_report: dict[str, Any]) -> None:
        """Remove what an earlier run left: everything, or what comes after the checkpoint. Collective."""

        def claim() -> None:
            with naming(self.folder):
                for hidden in (self.folder / "checkpoints").glob(".step-*.partial"):
                    shutil.rmtree(hidden, ignore_errors=True)
                kept = {name for name in self.own if self.checkpoint and name.startswith(KEPT_ON_RESUME)}
                for path in (self.folder / name for name in self.own - kept):
                    discard_folder(path) if path.is_dir() else path.unlink(missing_ok=True)
                self.own = kept
                for step, newer in self.checkpoints():
                    if step > self.checkpoint_state["step"]:  # damaged or superseded: the run comes here again
                        shutil.rmtree(aside := self.file(f"checkpoints/{newer.name}.replaced"), ignore_errors=True)
                        newer.rename(aside)
            self.write_text("config.yaml", config_yaml)
            self.write_json("data_report.json", data_report)
            for name in ("metrics.jsonl", "metrics.jsonl.bak"):
                self.file(name)

        on_main_process(self.accelerator, claim)

    def close(self) -> None:
        """Give up uploads that are still running; wait for the other processes. Collective."""
        if self.hub:
            self.hub.close()
        self.accelerator.wait_for_everyone()  # torchrun ends the main process when another one has ended

    def file(self, name: str) -> Path:
        """The path of a file of the run, to write it: the name is recorded and the folder made.

        Raises `RunError` if the file exists and no run wrote it.
        """
        path = self.folder / name
        with naming(path):
            if name not in self.own:
                if path.exists():
                    raise RunError(f"'{path}' is in the way: no run wrote it; move it away, then resume")
                self.own.add(name)
                write_file(self.folder / RECORD, "".join(f"{name}\n" for name in sorted(self.own)))
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the run, redacted; it has the old content or the new one, whenever the machine stops."""
        write_file(self.file(name), redact(text, "commit"))  # commits are no secrets

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, redacted, in the same way; NaN and infinities become strings."""
        self.write_text(name, json.dumps(finite(value), indent=2))

    def publish(self, folder: Path) -> dict[str, int]:
        """Flush the files in `folder` to the disk and move them into the run directory; returns their sizes by name."""
        sizes = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            sizes[name] = path.stat().st_size
            fsync(path)
            path.replace(self.file(name))
            fsync((self.folder / name).parent)
        shutil.rmtree(folder)
        return sizes

    def read_verified(self, name: str) -> dict[str, Any]:
        """The content of the JSON file `name` if every file that it lists has the size that it states; otherwise {}."""
        sizes = (content := read_json(self.folder / name) or {}).get("files")
        paths = {os.path.join(self.folder, file): size for file, size in sizes.items()} if type(sizes) is dict else {}
        is_same = paths and all(os.path.isfile(path) and os.path.getsize(path) == paths[path] for path in paths)
        return content if is_same else {}

    def write_finished(self, export_check: dict[str, Any]) -> None:
        """Write `finished.json`: the sizes of the files that the end of a run writes, and the result of the check."""
        names = [name for name in sorted(self.own - {"finished.json"}) if not name.startswith(KEPT_ON_RESUME)]
        sizes = {name: (self.folder / name).stat().st_size for name in names if (self.folder / name).is_file()}
        self.write_json("finished.json", {"export_check": export_check, "files": sizes})

    def finished_check(self) -> dict[str, Any] | None:
        """The export check in `finished.json`, if it passed and every file has its size; otherwise None."""
        check = self.read_verified("finished.json").get("export_check")
        return check if isinstance(check, dict) and check.get("passed") is True else None


def model_fingerprint(model: Any) -> str:
    """sha256 of a model's configuration and of the names, shapes, types and contents (CRC-32) of its weights."""
    passing = ("_name_or_path", "architectures", "transformers_version")
    lines: list[Any] = [{k: v for k, v in model.config.to_diff_dict().items() if k not in passing}]
    for name, p in model.named_parameters():
        raw = p.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
        lines.append([name, list(p.shape), str(p.dtype), zlib.crc32(raw)])
    return hashlib.sha256(json.dumps(lines, sort_keys=True, default=str).encode()).hexdigest()


def reject(changes: list[str], where: Path | None) -> None:
    """Raise `InputError` if a resumed run has changed."""
    if changes:
        fix = "resume with the options and data it began with, or give another output_dir"
        raise InputError(f"{where} is of another run ({'; '.join(changes)}); {fix}")
