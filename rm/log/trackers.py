"""metrics.jsonl, the record of truth, and Accelerate's trackers: copies of it that may fail without hurting the run.

A line reaches metrics.jsonl before anything else sees the numbers. Each tracker then gets its calls in order on a
thread of its own: a server that hangs costs the run no time, one that fails costs it a warning. W&B never asks a
question: without a key or a network the run is an offline one under `output_dir`.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from rm.config.files import finite, naming, write_text
from rm.config.redact import redact

logger = logging.getLogger(__name__)

START_GRACE = 30.0  # seconds to start a tracker, besides the server's


def prepare_trackers(report_to: str | list[str] | None) -> list[str]:
    """The trackers' names for `RunLog`, in lower case and each once.

    Args:
        report_to: names that Accelerate knows ("wandb", "tensorboard", ...), "all" (every installed one) or "none".

    Raises:
        ValueError: a name is unknown or its package is not installed, or "none" is mixed with others.
    """
    names = [report_to] if isinstance(report_to, str) else report_to or []
    names = list(dict.fromkeys(name.strip().lower() for name in names))
    installed = [str(name) for name in get_available_trackers()]
    if "none" in names and len(names) > 1:
        raise ValueError(f"report_to={names}: none cannot be combined with other trackers")
    for name in names:
        if name not in (*installed, "all", "none"):
            problem = "is not installed" if name in LoggerType else "is not a tracker that Accelerate knows"
            raise ValueError(f"report_to: {name!r} {problem}; installed: {', '.join(installed) or 'no tracker'}")
    return [] if "none" in names else installed if "all" in names else names


class RunLog:
    """Logs numbers and tables to `output_dir/metrics.jsonl` and to every tracker; does nothing off the main process."""

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | os.PathLike,
        *,
        project: str,
        run_name: str,
        config: dict[str, Any],
        report_to: list[str],
        group: str | None = None,
        resume_lines: int | None = None,
        init_timeout: float = 30.0,
        finish_timeout: float = 60.0,
    ):
        """Open metrics.jsonl and start the trackers named in `report_to`.

        Args:
            config: the resolved configuration; it is logged redacted.
            group: W&B group, for the parts of one interrupted training: an offline run cannot be resumed.
            resume_lines: keep so many lines of metrics.jsonl and go on from there. None: a new file.
            init_timeout: seconds for W&B's server to accept the run (ten more may pass); after that it is offline.
            finish_timeout: seconds for uploads in `close`; what is late stays on disk for `wandb sync`.
        """
        self.accelerator, self.output_dir = accelerator, Path(output_dir).resolve()
        self.init_timeout, self.finish_timeout = init_timeout, finish_timeout
        self._threads: dict[str, TrackerThread] = {}
        self.num_lines = 0
        if not accelerator.is_main_process:
            return
        self._file = open_metrics(self.output_dir / "metrics.jsonl", resume_lines)
        self.num_lines = (self.output_dir / "metrics.jsonl").read_bytes().count(b"\n")
        config = json.loads(json.dumps(redact(config), default=str))
        for name in report_to:
            thread = TrackerThread(name)
            if name == "wandb":
                started = thread.call("start", self._start_wandb, project, run_name, group, config)
            else:  # TensorBoard takes numbers and strings only
                plain = {k: v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in config.items()}
                options = tracker_options(name, run_name, self.output_dir, resumed=resume_lines is not None)
                started = thread.call("start", self._start, name, project, plain, options)
            try:
                started.result(timeout=init_timeout + START_GRACE)
                self._threads[name] = thread
            except Exception:
                logger.warning(f"{name}: does not start and is left out of this run; metrics.jsonl has everything")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers as of optimizer step `step`: a line of metrics.jsonl, then every tracker.

        The line is {"step": step, "time": seconds since 1970, **metrics}. JSON has neither NaN nor infinity: they are
        the strings "NaN", "Infinity" and "-Infinity", which `float()` and pandas read back.
        """
        if not self.accelerator.is_main_process:
            return
        metrics = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        line = {"step": step, "time": round(time.time(), 3)} | {name: finite(value) for name, value in metrics.items()}
        with naming(self.output_dir / "metrics.jsonl"):
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        self.num_lines += 1
        for name, thread in self._threads.items():
            if name == "wandb":  # W&B drops what its own step has gone past, so that is left to count calls
                thread.call("log", self._tracker(name).log, {**metrics, "train/step": step})
            else:
                thread.call("log", self._tracker(name).log, metrics, step)

    def sync(self) -> int:
        """Bring metrics.jsonl to the disk, since a checkpoint must not be ahead of it; returns its number of lines."""
        if self.accelerator.is_main_process:
            with naming(self.output_dir / "metrics.jsonl"):
                os.fsync(self._file.fileno())
        return self.num_lines

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Show a table as of step `step`: a W&B Table, Markdown in TensorBoard, nothing in other trackers."""

        def make() -> dict[str, Any]:
            import wandb

            data = [[utf8(cell) for cell in row] for row in rows]
            # a new one every time: a Table that was logged before keeps its first rows
            return {name: wandb.Table(columns=list(columns), data=data)}

        self.media("table", make, step)
        if "tensorboard" in self._threads:
            text = utf8(markdown(columns, rows))
            self._threads["tensorboard"].call("table", self._tracker("tensorboard").log, {name: text}, step)

    def html(self, name: str, page: str, step: int) -> None:
        """Show an HTML page as of step `step`: a W&B Html, nothing in other trackers."""

        def make() -> dict[str, Any]:
            import wandb

            return {name: wandb.Html(utf8(page), inject=False)}

        self.media("html", make, step)

    def histograms(self, columns: dict[str, np.ndarray], step: int) -> None:
        """Show the distribution of each column as of step `step`, of its finite values: histograms of W&B and of
        TensorBoard, nothing in other trackers."""
        columns = {name: column[np.isfinite(column)] for name, column in columns.items()}
        columns = {name: column for name, column in columns.items() if len(column)}

        def make() -> dict[str, Any]:
            import wandb

            return {name: wandb.Histogram(column) for name, column in columns.items()}

        self.media("histograms", make, step)
        if "tensorboard" in self._threads:
            for name, column in columns.items():
                add = self._tracker("tensorboard").writer.add_histogram
                self._threads["tensorboard"].call("histograms", add, name, column, step)

    def media(self, what: str, make: Callable[[], dict[str, Any]], step: int) -> None:
        """Log what `make()` returns, W&B's objects by name, as of step `step`; it is called on W&B's thread, so that it
        may import wandb and fail. Without W&B it is not called."""
        if "wandb" in self._threads:
            log = self._tracker("wandb").log
            self._threads["wandb"].call(what, lambda: log({**make(), "train/step": step}))

    def summary(self, metrics: dict[str, Any]) -> None:
        """Set the final values that W&B shows for the run; they add nothing to its history."""
        if "wandb" in self._threads:
            self._threads["wandb"].call("summary", self._tracker("wandb").run.summary.update, metrics)

    def close(self) -> None:
        """Finish the trackers, in `finish_timeout` + 2 s at most.

        Not to be called after an error: W&B then sees the exit code by itself and shows the run as failed.
        """
        if not self.accelerator.is_main_process:
            return
        deadline = time.monotonic() + self.finish_timeout + 2
        finished = {name: thread.call("finish", self._tracker(name).finish) for name, thread in self._threads.items()}
        for name, done in finished.items():
            try:
                done.result(timeout=max(0.0, deadline - time.monotonic()))
            except Exception:
                self._threads[name].given_up = True
                logger.warning(f"{name}: not finished properly; metrics.jsonl has everything")
        self._threads.clear()
        self.accelerator.trackers.clear()  # or `accelerator.end_training` would finish them again
        self._file.close()

    def _tracker(self, name: str) -> Any:
        return next(tracker for tracker in self.accelerator.trackers if tracker.name == name)

    def _start(self, name: str, project: str, config: dict, options: dict) -> None:
        self.accelerator.log_with = [LoggerType(name)]
        self.accelerator.project_configuration.logging_dir = str(self.output_dir)  # TensorBoard: output_dir/<project>
        started, self.accelerator.trackers = self.accelerator.trackers, []  # or `init_trackers` starts them all again
        try:
            self.accelerator.init_trackers(project, config, {name: options})
            started = started + self.accelerator.trackers
        finally:
            self.accelerator.trackers = started

    def _start_wandb(self, project: str, run_name: str, group: str | None, config: dict) -> None:
        """Start a W&B run with its files under `output_dir`: online if possible, else offline, and say where it is."""
        # an offline table's rows wait in W&B's data folder for `wandb sync`: keep them with the run, not in the home
        os.environ.setdefault("WANDB_DATA_DIR", str(self.output_dir / "wandb" / "data"))
        import wandb

        in_sweep = "WANDB_SWEEP_ID" in os.environ  # W&B names a sweep's runs; by us they would all be called the same
        project = os.environ.get("WANDB_PROJECT", project)
        options = {
            "dir": str(self.output_dir),
            "name": None if in_sweep or "WANDB_NAME" in os.environ else run_name,
            "group": None if in_sweep or "WANDB_RUN_GROUP" in os.environ else group,
            "settings": wandb.Settings(
                init_timeout=self.init_timeout,
                finish_timeout=self.finish_timeout,
                # "stop run" in the browser: stop as for a scheduler, with a checkpoint, and not by W&B's Ctrl-C;
                # in a sweep the agent does it, and a second SIGTERM might end the run at once
                stop_fn=lambda: None if in_sweep else os.kill(os.getpid(), signal.SIGTERM),
            ),
        }
        reason = None
        try:
            # The user's own mode stands. Else ask the server if it takes us: ten seconds if it does not answer
            # (WANDB_HTTP_TIMEOUT), and never a question on the terminal.
            if wandb.run is None and wandb.setup().settings.mode in ("online", "shared"):
                reason = None if wandb.login(prompt=False, verify=True) else "no API key"
            if reason is None:
                self._start("wandb", project, config, options)
        except Exception as error:
            reason = first_line(error)
        if reason is not None:
            self._start("wandb", project, config, {**options, "mode": "offline"})
        run = self._tracker("wandb").run
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")
        if run.offline:
            folder = Path(run.dir).parent
            logger.warning(f"wandb: offline ({reason or 'as you chose'}); to upload it later: wandb sync {folder}")


def tracker_options(name: str, run_name: str, output_dir: Path, resumed: bool = False) -> dict[str, Any]:
    """What Accelerate is to start tracker `name` with, besides the project: the run's name, and its files' place.

    By themselves most would call the run something else, and MLflow, DVCLive, SwanLab and Comet would write to the
    current folder. The user's environment variables for the same things stand.
    """
    folder = str(output_dir / name)
    if name == "mlflow":
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{output_dir / 'mlflow.db'}")
        is_ours = os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{output_dir / 'mlflow.db'}"
        return {"run_name": run_name, "logging_dir": folder if is_ours else None}
    if name == "trackio":  # its own folder is the one that its dashboard shows: TRACKIO_DIR
        return {"name": run_name, "resume": "allow" if resumed else "never"}
    if name == "dvclive":  # it would commit to the user's git repository
        return {"dir": folder, "resume": resumed, "dvcyaml": None, "save_dvc_exp": False}
    if name == "swanlab":
        return {"name": run_name, "log_dir": os.environ.get("SWANLAB_LOG_DIR", folder)}
    if name == "clearml":
        return {"task_name": os.environ.get("CLEARML_TASK", run_name)}
    if name == "comet_ml":
        import comet_ml

        place = os.environ.get("COMET_OFFLINE_DIRECTORY", folder)
        return {"experiment_config": comet_ml.ExperimentConfig(name=run_name, offline_directory=place)}
    return {}


class TrackerThread:
    """Runs one tracker's calls in order, off the training thread, which waits for none of them."""

    def __init__(self, name: str):
        self.name, self.given_up = name, False
        self.calls: queue.Queue = queue.Queue(maxsize=10_000)  # a tracker that hangs must not fill the memory
        self.warned: set[str] = set()
        threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True).start()

    def call(self, what: str, function: Callable, *args: Any) -> Future:
        """Have `function(*args)` called; the future gets what it returns or raises. The first failure of each `what` is
        logged, and later calls are tried all the same: servers come back."""
        done: Future = Future()
        try:
            self.calls.put_nowait((what, function, args, done))
        except queue.Full as error:
            self._failed(what, error, done)
        return done

    def _work(self) -> None:
        while not self.given_up:
            what, function, args, done = self.calls.get()
            try:
                done.set_result(function(*args))
            except BaseException as error:  # some trackers raise SystemExit
                self._failed(what, error, done)

    def _failed(self, what: str, error: BaseException, done: Future) -> None:
        if what not in self.warned and not self.given_up:  # of which a warning has told already
            self.warned.add(what)
            logger.warning(f"{self.name}: {what} failed ({first_line(error)}); training goes on")
        done.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))  # not to end the run


def open_metrics(path: Path, resume_lines: int | None):
    """Open metrics.jsonl to append. Of an earlier run's file the first `resume_lines` stay, as if nothing had been
    interrupted; if any line goes, the old file is kept as metrics.jsonl.bak."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in old if line.endswith(b"}\n")]  # a crash may have torn the last one
    kept = whole[: resume_lines or 0]
    if len(kept) < (resume_lines or 0):
        logger.warning(f"{path}: {len(kept)} of the {resume_lines} lines before the checkpoint are there")
    if kept != old:
        shutil.copyfile(path, path.with_name("metrics.jsonl.bak"))
        write_text(path, b"".join(kept).decode())
    return path.open("a", encoding="utf-8")


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def utf8(cell: Any) -> Any:
    """`cell`; half characters, which data may hold but no file, become question marks."""
    return cell.encode("utf-8", "replace").decode() if isinstance(cell, str) else cell


def markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in (columns, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])
