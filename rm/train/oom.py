"""Running out of memory: notice it, let all processes agree, go on with smaller micro-batches. And the peak of it."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from rm.collate import Batch
from rm.data.plan import StepPlan
from rm.forward import concatenated_forward
from rm.train.meter import Meter

logger = logging.getLogger(__name__)


class BatchSizeFinder:
    """`auto_find_batch_size`: a step that runs out of memory is repeated in micro-batches of half the tokens.

    `plan` and `meter` are those of the loop. Several processes decide together: gradients are then summed when the step
    is done (`sync_after`), since a process that runs out during the backward pass would leave the others waiting there.
    """

    def __init__(self, accelerator: Accelerator, plan: StepPlan, meter: Meter, optimizer, enabled: bool):
        self.accelerator, self.plan, self.meter, self.optimizer = accelerator, plan, meter, optimizer
        self.enabled, self.ran_out = enabled, False
        self.sync_after = enabled and accelerator.num_processes > 1

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Swallow an out-of-memory error of the block and remember it; anything else passes."""
        self.ran_out = False
        try:
            yield
        except RuntimeError as error:
            if not (self.enabled and should_reduce_batch_size(error)):
                raise
            self.ran_out = True
        if self.enabled:
            (self.ran_out,) = any_process(self.accelerator, self.ran_out)
        if self.ran_out:
            self.meter.undo_step()

    def must_repeat(self, step: int) -> bool:
        """Whether any process ran out in the last attempt; if so, halve the micro-batches and free the memory.

        Raises MemoryError if the longest pair of the step runs alone already.
        """
        if not self.ran_out:
            return False
        for group in self.optimizer.param_groups:  # Accelerate's `zero_grad` does nothing between micro-batches
            for p in group["params"]:
                p.grad = None
        clear_device_cache(garbage_collection=True)
        if not self.plan.halve_micro_batches(step):
            raise MemoryError(f"out of memory in step {step + 1} with its longest pair alone: lower max_length")
        tokens = self.plan.micro_batch_tokens
        logger.warning(f"out of memory: step {step + 1} is repeated with micro_batch_tokens={tokens}")
        return True


def can_repeat_steps(distributed_type: DistributedType) -> bool:
    """Whether a process may run out of memory alone; FSDP and DeepSpeed communicate in every layer, and would hang."""
    return distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def average_gradients(model: nn.Module, num_processes: int) -> None:
    """Replace all gradients by their mean over processes, which DDP does during the backward pass. Collective."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for work in [dist.all_reduce(p.grad, async_op=True) for p in trained]:
        work.wait()
    for p in trained:
        p.grad /= num_processes


def settle_buckets(accelerator: Accelerator, model: nn.Module, batch: Batch) -> None:
    """Have DDP sort its buckets of gradients before the first step, of a new run and of a resumed one. Collective.

    It sorts them anew after the first backward pass, by the order in which gradients came; with three processes or more
    their sums then round otherwise, and a resumed run would differ from one that was never stopped.
    """
    if accelerator.distributed_type not in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return
    chosen_B, rejected_B = concatenated_forward(model, batch)
    accelerator.backward(0.0 * (chosen_B + rejected_B).sum())
    for p in model.parameters():
        p.grad = None


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """For each flag, whether it is true on any process. Collective."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return (accelerator.reduce(counts, "sum") > 0).tolist()  # syncs the device here


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory of this process so far, in 10^9 bytes: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
