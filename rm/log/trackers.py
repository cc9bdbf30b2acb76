"""The log of a run: metrics.jsonl, the trackers of Accelerate (which get copies of its lines), and standard output.

An error of a tracker or of standard output does not end the run. One thread calls all trackers: training does not wait
for them, but a tracker that blocks delays the others. Without a key or a network, the W&B run is offline.
"""

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from rich.console import Console

from rm.config.errors import InputError
from rm.config.files import finite, naming, write_file
from rm.config.redact import redact, safe_line

logger = logging.getLogger(__name__)

START_SECONDS = 60.0  # for all trackers to start; later ones are not used
INIT_SECONDS = 30.0  # for the W&B server to accept the run; then the run is offline
FINISH_SECONDS = 60.0  # for uploads at the end of a run; the rest stays on disk for `wandb sync`
EXIT_SECONDS = 10.0  # for the process to exit after that


class RunLog:
    """Logs numbers and W&B objects on the main process; on the others it does nothing.

    `config` has the options `project` and `report_to`. `record` is the configuration that trackers store, redacted.
    metrics.jsonl in `output_dir` keeps its first `resume_lines` lines (None: a new run); `num_lines` is their number.
    If that removes lines, metrics.jsonl.bak has the old content. Raises `DiskError` if it cannot be written.
    """

    def __init__(self, config, output_dir: Path, run_name: str, record: dict, resume_lines: int | None, is_main: bool):
        self.path, self.num_lines = output_dir.resolve() / "metrics.jsonl", 0
        self.trackers: dict[str, GeneralTracker] = {}
        self._file: IO[str] | None = None
        self._failed: set[str] = set()  # kinds of calls
        if not is_main:
            return
        self._open_file(resume_lines or 0)
        self._thread, names = ThreadPoolExecutor(1, "trackers"), prepare_trackers(config.report_to)
        options = (config.project, run_name, self.path.parent, record, resume_lines is not None)
        starts = {name: self._call(f"{name}: start", start_tracker, name, *options) for name in names}
        wait(starts.values(), timeout=START_SECONDS)
        self.trackers = {name: start.result() for name, start in starts.items() if start.done() and start.result()}
        for name in starts.keys() - self.trackers.keys():
            logger.warning(f"{name}: did not start; metrics.jsonl has everything")

    def _open_file(self, wanted: int) -> None:
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            old = self.path.read_bytes() if self.path.exists() else b""
            # a crash may have left an incomplete last line
            kept = [line for line in old.splitlines(keepends=True) if line.endswith((b"}\n", b"}\r\n"))][:wanted]
            if len(kept) < wanted:
                logger.warning(f"{self.path}: has {len(kept)} of the {wanted} lines before the checkpoint")
            if b"".join(kept) != old:
                shutil.copyfile(self.path, self.path.with_name("metrics.jsonl.bak"))
                write_file(self.path, b"".join(kept))
            self.num_lines, self._file = len(kept), self.path.open("a", encoding="utf-8", newline="\n")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Log the numbers of optimizer step `step`: one line of metrics.jsonl, then every tracker.

        The line is {"step": step, "time": seconds since 1970, **metrics}. It is in the file when this returns. JSON has
        no NaN and infinities: they become "NaN", "Infinity" and "-Infinity", which `float()` reads.
        """
        if self._file is None:
            return
        metrics = {redact(key): value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        line = {"step": step, "time": round(time.time(), 3)} | finite(metrics)
        with naming(self.path):
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        self.num_lines += 1
        self.log_wandb("log", lambda wandb: metrics, step)
        for name in self.trackers.keys() - {"wandb"}:
            self._call(f"{name}: log", self.trackers[name].log, metrics, step)

    def log_wandb(self, what: str, make: Callable[[Any], dict[str, Any]], step: int) -> None:
        """Log `make(wandb)`, numbers or W&B objects by name, for optimizer step `step`. Only W&B gets them."""

        def log() -> None:
            import wandb

            # W&B rejects steps below its counter: let it count the calls; train/step is the axis of its charts
            self.trackers["wandb"].log(make(wandb) | {"train/step": step})

        if "wandb" in self.trackers:
            self._call(f"wandb: {what}", log)

    def sync(self) -> None:
        """Flush metrics.jsonl to disk. A checkpoint must not count lines that could still be lost."""
        if self._file:
            with naming(self.path):
                os.fsync(self._file.fileno())

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Finish the trackers within `FINISH_SECONDS`. W&B shows `summary` as final values. Do not call this after an
        error: without the call, W&B reads the exit code of the process and shows the run as failed."""
        if self._file is None:
            return
        if summary and "wandb" in self.trackers:
            self._call("wandb: summary", self.trackers["wandb"].run.summary.update, summary)
        ends = {self._call(f"{name}: finish", tracker.finish): name for name, tracker in self.trackers.items()}
        for late in wait(ends, timeout=FINISH_SECONDS).not_done:
            logger.warning(f"{ends[late]}: not finished in time; metrics.jsonl has everything")
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._file.close()

    def _call(self, what: str, function: Callable, *args: Any) -> Future:
        """Queue `function(*args)` for the thread. The result is None if it fails. Only the first failure is logged."""

        def call() -> Any:
            try:
                return function(*args)
            except BaseException as error:  # some trackers raise SystemExit
                if what not in self._failed and not self._file.closed:
                    self._failed.add(what)
                    logger.warning(f"{what} failed ({safe_line(repr(error))}); the run continues")

        return self._thread.submit(call)


def print_safely(*objects: object, console: Console | None = None) -> None:
    """Print texts (unchanged) and rich tables. If that fails, warn once and discard what is printed from then on."""
    console = console or Console(file=sys.stdout)
    try:
        for item in objects:
            with console.capture() as capture:  # without it, rich ends the process if the pipe is closed
                console.out(item, highlight=False) if isinstance(item, str) else console.print(item)
            console.file.write(capture.get().encode(console.encoding, "backslashreplace").decode(console.encoding))
        console.file.flush()
    except (OSError, ValueError) as error:  # ValueError: the file object is closed
        logger.warning(f"standard output cannot be written ({error}); the run continues without it")
        with suppress(OSError, ValueError):  # otherwise Python flushes it at exit and fails
            os.dup2(os.open(os.devnull, os.O_WRONLY), console.file.fileno())


def run_and_exit(run: Callable[[], int]) -> None:
    """Exit with the code that `run()` returns, in `EXIT_SECONDS` at most: W&B can wait for a server for minutes."""
    code = 1  # of an exception
    try:
        code = run()
    finally:
        timer = threading.Timer(EXIT_SECONDS, os._exit, [code])
        timer.daemon = True
        timer.start()
    sys.exit(code)


def prepare_trackers(report_to: list[str]) -> list[str]:
    """The names of the trackers without duplicates; "all" means every installed tracker.

    Raises `InputError` for a name that Accelerate does not know, or whose package is not installed.
    """
    names, installed = dict.fromkeys(map(str.lower, report_to)), [str(name) for name in get_available_trackers()]
    if wrong := ", ".join(name for name in names if name not in (*installed, "all")):
        raise InputError(f"report_to: unknown or not installed: {wrong}; installed: {', '.join(installed) or 'none'}")
    return installed if "all" in names else list(names)


def start_tracker(
    name: str, project: str, run_name: str, output_dir: Path, config: dict[str, Any], resumed: bool
) -> GeneralTracker:
    """Start a tracker. It writes its files to `output_dir` and stores `config` without secrets. Environment variables
    for names and folders take precedence."""
    config = redact(config)
    if name == "wandb":
        return start_wandb(os.environ.get("WANDB_PROJECT", project), run_name, output_dir, config)
    folder = str(output_dir / name)
    if name == "mlflow":
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder}.db")
    if name == "comet_ml":
        os.environ.setdefault("COMET_OFFLINE_DIRECTORY", folder)
    options = {
        "mlflow": {"run_name": run_name},
        "trackio": {"name": run_name, "resume": "allow" if resumed else "never"},
        "dvclive": {"dir": folder, "resume": resumed, "dvcyaml": None, "save_dvc_exp": False},  # no commit in git
        "swanlab": {"name": run_name, "log_dir": os.environ.get("SWANLAB_LOG_DIR", folder)},
        "clearml": {"task_name": os.environ.get("CLEARML_TASK", run_name)},
    }.get(name, {})
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    where = [str(output_dir)] if tracker_class.requires_logging_directory else []
    tracker = tracker_class(project, *where, **options)
    tracker.start()
    plain = {key: value if isinstance(value, (int, float, str)) else json.dumps(value) for key, value in config.items()}
    tracker.store_init_configuration(plain)  # TensorBoard takes numbers and strings only
    return tracker


def start_wandb(project: str, run_name: str, output_dir: Path, config: dict[str, Any]) -> GeneralTracker:
    """Start a W&B run: online if possible, otherwise offline."""
    # offline tables stay here until `wandb sync`; by default W&B stores them in the home directory
    os.environ.setdefault("WANDB_DATA_DIR", str(output_dir / "wandb" / "data"))
    import wandb

    in_sweep = "WANDB_SWEEP_ID" in os.environ  # W&B names the runs of a sweep
    names = {"name": ("WANDB_NAME", run_name), "group": ("WANDB_RUN_GROUP", output_dir.name)}
    options = {key: ours for key, (variable, ours) in names.items() if not in_sweep and variable not in os.environ}
    # "stop run" in the browser interrupts the main thread, which saves a checkpoint; a sweep's agent sends a signal
    stop = {"stop_fn": lambda: None} if in_sweep else {}
    settings = wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS - 2, **stop)
    make = partial(LOGGER_TYPE_TO_CLASS["wandb"], project, dir=str(output_dir), settings=settings, **options)
    mode, reason = None, "WANDB_MODE"
    try:
        # verifies the key at the server; waits at most 10 s for it (WANDB_HTTP_TIMEOUT)
        if wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False, verify=True):
            mode, reason = "offline", "no API key"
        tracker = make(mode=mode)
        tracker.start()
    except Exception as error:
        tracker, reason = make(mode="offline"), safe_line(repr(error))
        tracker.start()
    tracker.store_init_configuration(config)
    tracker.run.define_metric("train/step")
    tracker.run.define_metric("*", step_metric="train/step")
    if tracker.run.offline:
        logger.warning(f"wandb: offline ({reason}); to upload later: wandb sync {Path(tracker.run.dir).parent}")
    return tracker
