"""The processes of a run: the accelerator, collective decisions, gradient accumulation, and signals that stop them."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, broadcast_object_list, set_seed
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rm.collate import Batch
from rm.config.errors import InputError, RunError
from rm.config.options import RewardConfig
from rm.data.plan import StepPlan
from rm.forward import score_batch
from rm.log.trackers import prepare_trackers
from rm.model.reward_model import set_tf32
from rm.train.state import Meter

logger = logging.getLogger(__name__)

LAUNCHERS = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")  # set by `accelerate launch`, by torchrun
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # the last: a closed terminal
SAME_SIGNAL = 1.0  # seconds: a repeated signal is ignored (terminal and torchrun both send Ctrl-C)


def make_accelerator(config: RewardConfig) -> Accelerator:
    """The accelerator of the run. Raises `InputError` for options that launcher, engine or device do not support."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1") and missing:
        fix = f"without {', '.join(missing)}: start the program with torchrun, or unset WORLD_SIZE"
        raise InputError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set {fix}")
    prepare_trackers(config.report_to)
    handlers = [InitProcessGroupKwargs(timeout=timedelta(hours=2))]  # others wait for tokenizing and checkpoints
    handlers += [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    # without `cpu=True`, each process that torchrun starts on a CPU would train independently
    options = {"cpu": not torch.accelerator.is_available(), "kwargs_handlers": handlers}
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, **options)
    except ValueError as error:  # fp16 without a GPU
        raise InputError(f"the processes cannot start with mixed_precision={config.mixed_precision}: {error}") from None
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        # DeepSpeed clips gradients itself, and requires a batch size that has no effect here
        plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": config.max_grad_norm}
        plugin.deepspeed_config |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
        unset_hf_deepspeed_config()  # otherwise ZeRO-3 loads shards, on which no head can be initialized
    check_support(config, accelerator)
    set_tf32(config.tf32)
    if config.full_determinism:
        transformers.enable_full_determinism(config.seed)
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    return accelerator


def check_support(config: RewardConfig, accelerator: Accelerator) -> None:
    """Raise `InputError` for options that this engine or device does not support."""
    engine, precision, problems = accelerator.distributed_type, accelerator.mixed_precision, {}
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        names = ("load_in_4bit", "load_in_8bit", "eval_dtype", "auto_find_batch_size")
        problems |= dict.fromkeys(names, f"not supported under {engine.value}; leave it out, or use DDP or one process")
    if accelerator.device.type == "cpu":
        names = ("activation_offloading", "use_liger_kernel")
        problems |= dict.fromkeys(names, "has no effect without a GPU; leave it out")
    if precision != "no" and precision != {"bfloat16": "bf16", "float16": "fp16"}.get(config.eval_dtype):
        problems.setdefault("eval_dtype", f"differs from mixed_precision={precision}; use the same type, or none")
    for name, problem in problems.items():
        if getattr(config, name):
            raise InputError(f"{name}={getattr(config, name)}: {problem}")
    plugin = accelerator.state.fsdp_plugin if engine == DistributedType.FSDP else None
    if plugin is not None and (plugin.fsdp_version != 2 or plugin.activation_checkpointing):
        raise InputError("fsdp_config: it needs fsdp_version: 2; gradient_checkpointing=true checkpoints activations")
    if engine == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 0:
        raise InputError("zero_stage: 0 gives no gradient norm; use 1, 2 or 3, or DDP")


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
    counts = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return (accelerator.reduce(counts, "sum") > 0).tolist()


def seed_everything(seed: int, step: int, process_index: int) -> None:
    """Make the randomness of a step a function of (seed, step, process): no random state needs to be saved."""
    set_seed(int(np.random.SeedSequence([seed, step, process_index]).generate_state(1)[0]))


class GradientAccumulation:
    """Gradient accumulation over the micro-batches of a step. The last micro-batch averages gradients over processes.

    `may_repeat` (auto_find_batch_size): a step that runs out of memory is repeated with half the tokens per micro-batch
    and the same result. Gradients are then averaged after all backward passes. Otherwise processes would wait forever
    for the gradients of one that ran out of memory.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, plan: StepPlan, meter: Meter, may_repeat: bool):
        self.accelerator, self.model, self.plan, self.meter = accelerator, model, plan, meter
        self.may_repeat, self.ran_out = may_repeat, False
        self.sync_after = may_repeat and accelerator.num_processes > 1

    @contextmanager
    def attempt(self, step: int) -> Iterator[None]:
        """Run the micro-batches of `step`. If a process runs out of memory, this sets `ran_out`, frees the memory, and
        makes the micro-batches of the next attempt smaller. Collective.

        Raises `RunError` if the largest prompt of the step already has a micro-batch of its own.
        """
        self.meter.begin_step()
        self.ran_out = False
        try:
            yield
        except RuntimeError as error:
            if not (self.may_repeat and should_reduce_batch_size(error)):
                raise
            self.ran_out = True
        if self.may_repeat:
            (self.ran_out,) = any_process(self.accelerator, self.ran_out)
        if self.ran_out:
            self.meter.undo_step()
            self.model.zero_grad()  # `optimizer.zero_grad` has no effect between micro-batches
            clear_device_cache(garbage_collection=True)
            if not self.plan.halve_micro_batches(step):
                raise RunError(f"out of memory in step {step + 1} with its largest prompt alone: lower max_length")
            tokens = self.plan.micro_batch_tokens
            logger.warning(f"out of memory: step {step + 1} is repeated with micro_batch_tokens={tokens}")
        elif self.sync_after:
            for p in self.model.parameters():
                if p.requires_grad:
                    p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")

    def sync_on_last(self, i: int, count: int) -> AbstractContextManager:
        """Context of micro-batch `i` of `count`: only the last one communicates gradients.

        FSDP2 communicates them in every micro-batch. Otherwise each process would hold the gradients of all weights.
        """
        is_last = i == count - 1
        self.accelerator.gradient_state._set_sync_gradients(is_last)  # DeepSpeed and the fp16 scaler read it
        must_sync = is_last and not self.sync_after or isinstance(self.model, FSDPModule)
        return nullcontext() if must_sync else self.accelerator.no_sync(self.model)

    def settle_buckets(self, batch: Batch) -> None:
        """Make DDP reorder its gradient buckets before the first step, in a new run and in a resumed run. Collective.

        DDP reorders them after the first backward pass. With three or more processes the order changes the rounding of
        sums, so a resumed run would differ from an uninterrupted one.
        """
        if isinstance(self.model, DistributedDataParallel) and not self.sync_after:
            rewards_N = score_batch(self.model, batch.to(self.accelerator.device))
            self.accelerator.backward(0.0 * rewards_N.sum())
            self.model.zero_grad()


class Stopped(RunError):
    """A signal stopped the run. A checkpoint was saved."""


class StopSignal:
    """Detects a request to stop after the current step: a signal, or the end of the launcher.

    Before `listen`, signals have their default effect: there is nothing to save. A second signal ends the process at
    once. `accelerate launch` forwards no signal to a single process, so the end of the launcher counts too.
    """

    def __init__(self) -> None:
        self.first: float | None = None  # when the first signal came
        self.previous: dict[int, Any] = {}  # handlers to restore
        self.launcher = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None

    def listen(self) -> None:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                self.previous[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        """Restore the handlers that were there before `listen`."""
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set by Python

    @property
    def received(self) -> bool:
        return self.first is not None or (self.launcher is not None and os.getppid() != self.launcher)

    def _receive(self, number: int, _: Any) -> None:
        if self.first is None:
            self.first = time.monotonic()
        elif time.monotonic() - self.first > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
