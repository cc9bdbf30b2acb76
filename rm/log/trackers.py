"""The log of a run: metrics.jsonl, and Accelerate's trackers, which get copies of its lines.

A tracker can neither end nor delay a run. One thread calls all trackers, so the training process does not wait; if one
of them blocks, the others wait. W&B asks no question: without a key or a network, its run is offline.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from rm.config.errors import InputError
from rm.config.redact import redact, safe_line
from rm.log.metrics import MetricsFile

logger = logging.getLogger(__name__)

START_SECONDS = 60.0  # for all trackers to start; one that is late is not used
INIT_SECONDS = 30.0  # for W&B's server to accept the run; if it is late, the run is offline
FINISH_SECONDS = 60.0  # for uploads at the end of a run; what is late stays on the disk for `wandb sync`
EXIT_SECONDS = 10.0  # after that, for the process to exit


class RunLog:
    """Logs numbers and W&B objects on the main process; on the others it does nothing.

    `config` has the options `project` and `report_to`. `record` is the configuration that trackers store, redacted.
    metrics.jsonl is in `output_dir`; for `resume_lines` see `MetricsFile`.
    """

    def __init__(
        self,
        config: Any,
        output_dir: Path,
        run_name: str,
        record: dict,
        resume_lines: int | None,
        is_main_process: bool,
    ):
        self.metrics_file: MetricsFile | None = None
        self.trackers: dict[str, GeneralTracker] = {}
        self._calls: queue.Queue = queue.Queue(maxsize=10_000)  # a call that blocks must not fill the memory
        self._failed: set[str] = set()  # kinds of calls
        self._is_closed = False
        if not is_main_process:
            return
        folder, names = output_dir.resolve(), prepare_trackers(config.report_to)
        self.metrics_file = MetricsFile(folder / "metrics.jsonl", resume_lines)
        threading.Thread(target=self._work, name="trackers", daemon=True).start()
        options = (config.project, run_name, folder, record, resume_lines is not None)
        starts = {name: self._call(f"{name}: start", start_tracker, name, *options) for name in names}
        wait(starts.values(), timeout=START_SECONDS)
        self.trackers = {name: start.result() for name, start in starts.items() if start.done() and start.result()}
        for name in starts.keys() - self.trackers.keys():
            logger.warning(f"{name}: did not start; metrics.jsonl has everything")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Log numbers as of optimizer step `step`: one line of metrics.jsonl, then every tracker."""
        if self.metrics_file:
            metrics = {redact(key): value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
            self.metrics_file.append(metrics, step)
            self.log_wandb("log", lambda wandb: metrics, step)
            for name in self.trackers.keys() - {"wandb"}:
                self._call(f"{name}: log", self.trackers[name].log, metrics, step)

    def log_wandb(self, what: str, make: Callable[[Any], dict[str, Any]], step: int) -> None:
        """Log the numbers or W&B objects `make(wandb)`, by name, as of optimizer step `step`; in W&B only."""

        def log() -> None:
            import wandb

            # W&B rejects steps below its counter: it counts the calls, and its charts show train/step
            self.trackers["wandb"].log(make(wandb) | {"train/step": step})

        if "wandb" in self.trackers:
            self._call(f"wandb: {what}", log)

    @property
    def num_lines(self) -> int:
        """Lines of metrics.jsonl."""
        return self.metrics_file.num_lines if self.metrics_file else 0

    def sync(self) -> int:
        """Write metrics.jsonl to the disk, since a checkpoint must not be ahead of it; returns its number of lines."""
        return self.metrics_file.sync() if self.metrics_file else 0

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Finish the trackers in `FINISH_SECONDS` at most; W&B shows `summary` as final values. Do not call it after an
        error: W&B then takes the exit code of the process and shows the run as failed."""
        if self.metrics_file:
            if summary and "wandb" in self.trackers:
                self._call("wandb: summary", self.trackers["wandb"].run.summary.update, summary)
            ends = {self._call(f"{name}: finish", tracker.finish): name for name, tracker in self.trackers.items()}
            for late in wait(ends, timeout=FINISH_SECONDS).not_done:
                logger.warning(f"{ends[late]}: not finished in time; metrics.jsonl has everything")
            self._is_closed = True
            self.metrics_file.close()

    def _call(self, what: str, function: Callable, *args: Any) -> Future:
        """Queue `function(*args)`. The result of the future is what it returns, or None if it fails."""
        done: Future = Future()
        with suppress(queue.Full):
            self._calls.put_nowait((what, function, args, done))
        return done

    def _work(self) -> None:
        """Make the queued calls in order. The first failure of each kind is logged; later calls are tried again."""
        while not self._is_closed:
            what, function, args, done = self._calls.get()
            try:
                done.set_result(function(*args))
            except BaseException as error:  # some trackers raise SystemExit
                if what not in self._failed and not self._is_closed:
                    self._failed.add(what)
                    logger.warning(f"{what} failed ({safe_line(repr(error))}); the run continues")
                done.set_result(None)


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


def prepare_trackers(report_to: str | list[str] | None) -> list[str]:
    """The trackers' names, each once; "all" means every installed one.

    Raises `InputError` if Accelerate does not know a name, its package is not installed, or "none" is not alone.
    """
    names = [report_to] if isinstance(report_to, str) else report_to or []
    names = list(dict.fromkeys(name.strip().lower() for name in names))
    installed = [str(name) for name in get_available_trackers()]
    if "none" in names and len(names) > 1:
        raise InputError(f"report_to={names}: none cannot be combined with other trackers")
    for name in names:
        if name not in (*installed, "all", "none"):
            problem = "is not installed" if name in LOGGER_TYPE_TO_CLASS else "is not a tracker that Accelerate knows"
            raise InputError(f"report_to: {name!r} {problem}; installed: {', '.join(installed) or 'no tracker'}")
    return [] if "none" in names else installed if "all" in names else names


def start_tracker(
    name: str, project: str, run_name: str, output_dir: Path, config: dict[str, Any], resumed: bool
) -> GeneralTracker:
    """Start a tracker; it keeps its files in `output_dir`, and `config` redacted. The user's environment variables for
    names and places take precedence."""
    config = json.loads(json.dumps(redact(config), default=str))
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
    # rows of an offline table wait here for `wandb sync`; W&B's default is a folder in the user's home
    os.environ.setdefault("WANDB_DATA_DIR", str(output_dir / "wandb" / "data"))
    import wandb

    in_sweep = "WANDB_SWEEP_ID" in os.environ  # W&B names the runs of a sweep, and its agent stops them
    names = {"name": ("WANDB_NAME", run_name), "group": ("WANDB_RUN_GROUP", output_dir.name)}
    options = {key: ours for key, (variable, ours) in names.items() if not in_sweep and variable not in os.environ}

    def stop() -> None:  # "stop run" in the browser: SIGTERM saves a checkpoint and ends the run
        if not in_sweep:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS - 2, stop_fn=stop)
    make = partial(LOGGER_TYPE_TO_CLASS["wandb"], project, dir=str(output_dir), settings=settings, **options)
    mode, reason = {}, "WANDB_MODE"
    try:
        if wandb.run is None and wandb.setup().settings.mode in ("online", "shared"):
            # asks the server whether it accepts the key: 10 s if it does not answer (WANDB_HTTP_TIMEOUT)
            if not wandb.login(prompt=False, verify=True):
                mode, reason = {"mode": "offline"}, "no API key"
        tracker = make(**mode)
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
