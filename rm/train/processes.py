"""Processes: how many the launcher was asked for, what one does for all, and the signals that stop them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import broadcast_object_list

BY_ACCELERATE = "ACCELERATE_DYNAMO_BACKEND"  # `accelerate launch` sets it for every program
BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
# of schedulers, Ctrl-C, SLURM's --signal, a terminal that is closed
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
TWICE_THE_SAME = 1.0  # seconds: Ctrl-C comes from the terminal and, at once, from torchrun too


class StopSignal:
    """A request to stop after the current step: a signal, or the death of the launcher.

    From `listen` on, the first signal sets `received`; another one, more than a second later, ends the process at once.
    Before, signals act as always: there is nothing to save. `accelerate launch` of one process passes no signal on, so
    that its death is taken for one: a trainer that nobody waits for must not train on.
    """

    def __init__(self):
        self.first: float | None = None
        self.before: dict[int, Any] = {}  # the handlers that others had set
        is_launched = BY_ACCELERATE in os.environ or BY_TORCHRUN in os.environ
        self.launcher = os.getppid() if is_launched else None

    def listen(self) -> None:
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)  # Windows has fewer
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                self.before[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        """Let signals act as they did before `listen`."""
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python

    @property
    def received(self) -> bool:
        return self.first is not None or (self.launcher is not None and os.getppid() != self.launcher)

    def _receive(self, number: int, _) -> None:
        if self.first is None:
            self.first = time.monotonic()
        elif time.monotonic() - self.first > TWICE_THE_SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def on_main_process(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """What `function()` returns on the main process, or the error it raises there, on every process. Collective."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


def is_orphan() -> bool:
    """Whether `accelerate launch` started this process and is gone already, during the imports."""
    if BY_ACCELERATE not in os.environ or BY_TORCHRUN in os.environ or os.getppid() != 1:
        return False
    return "accelerate" not in _command_line(1)


def processes_asked_for() -> int:
    """Processes that the launcher was asked for: torchrun says it, of `accelerate launch` we read the command line."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    command = _command_line(os.getppid()) if BY_ACCELERATE in os.environ else []
    names = ("launch", "launch.py", "accelerate-launch", "accelerate.commands.launch")
    at = next((i for i, word in enumerate(command) if os.path.basename(word) in names), None)
    if at is None:
        return 1
    asked, _ = launch_command_parser().parse_known_args(command[at + 1 :])
    if asked.num_processes is None and (asked.config_file or (os.path.isfile(default_config_file) and not asked.cpu)):
        asked.num_processes = load_config_from_file(asked.config_file).num_processes
    return asked.num_processes or 1


def _command_line(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []
