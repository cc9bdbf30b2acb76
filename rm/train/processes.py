"""Processes: what all of them decide together, and the signals that stop a run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from rm.config.errors import RunError

LAUNCHERS = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")  # set by `accelerate launch`, by torchrun
# of schedulers, Ctrl-C, Slurm's --signal, a closed terminal
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
SAME_SIGNAL = 1.0  # seconds: Ctrl-C arrives twice, from the terminal and from torchrun


class Stopped(RunError):
    """A signal stopped the run after a checkpoint."""

    exit_code = 128 + signal.SIGTERM


class StopSignal:
    """Whether the run was asked to stop after the current step: by a signal, or by the death of its launcher.

    Before `listen` signals act as usual: there is nothing to save. A second signal ends the process at once.
    `accelerate launch` forwards no signal to its only process: if the launcher dies, save a checkpoint and exit.
    """

    def __init__(self) -> None:
        self.first: float | None = None  # when the first signal came
        self.previous: dict[int, Any] = {}  # handlers to restore
        self.launcher = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None

    def listen(self) -> None:
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)  # Windows has fewer
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                self.previous[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        """Restore the handlers that were there before `listen`."""
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python

    @property
    def received(self) -> bool:
        return self.first is not None or (self.launcher is not None and os.getppid() != self.launcher)

    def _receive(self, number: int, _: Any) -> None:
        if self.first is None:
            self.first = time.monotonic()
        elif time.monotonic() - self.first > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def on_main_process(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Call `function` on the main process; return its result, or raise its error, on every process. Collective."""
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


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """For each flag, whether it is true on any process. Collective; syncs the device."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return (accelerator.reduce(counts, "sum") > 0).tolist()


def seed_everything(seed: int, step: int, process_index: int) -> None:
    """Make the randomness of a step a function of (seed, step, process): no random state needs to be saved."""
    set_seed(int(np.random.SeedSequence([seed, step, process_index]).generate_state(1)[0]))
