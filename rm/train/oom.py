"""Micro-batches whose gradients add up to one step, and the repetition of a step that ran out of memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from rm.collate import Batch
from rm.config.errors import RunError
from rm.data.plan import StepPlan
from rm.forward import concatenated_forward
from rm.train.processes import any_process
from rm.train.state import Meter

logger = logging.getLogger(__name__)


class GradientAccumulation:
    """The micro-batches of one step: gradients are communicated with the last one.

    `auto_find_batch_size`: a step that runs out of memory is repeated with half the tokens per micro-batch and the same
    result. A process that runs out in the backward pass would leave the others waiting for its gradients, so with this
    option they are averaged after the step.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, plan: StepPlan, meter: Meter, may_repeat: bool):
        self.accelerator, self.model, self.plan, self.meter = accelerator, model, plan, meter
        self.may_repeat, self.ran_out = may_repeat, False
        self.sync_after = may_repeat and accelerator.num_processes > 1

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Run the micro-batches of a step; if it may be repeated, catch that they run out of memory. Collective."""
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
        if self.sync_after and not self.ran_out:
            for p in self.model.parameters():
                if p.requires_grad:
                    p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")

    def must_repeat(self, step: int) -> bool:
        """Whether any process ran out of memory in `attempt`; if so, free it and halve the micro-batches.

        Raises `RunError` if the largest prompt of the step runs alone already.
        """
        if self.ran_out:
            self.meter.undo_step()
            for p in self.model.parameters():  # Accelerate's `zero_grad` has no effect between micro-batches
                p.grad = None
            clear_device_cache(garbage_collection=True)
            if not self.plan.halve_micro_batches(step):
                raise RunError(f"out of memory in step {step + 1} with its largest prompt alone: lower max_length")
            tokens = self.plan.micro_batch_tokens
            logger.warning(f"out of memory: step {step + 1} is repeated with micro_batch_tokens={tokens}")
        return self.ran_out

    def sync_on_last(self, i: int, count: int) -> AbstractContextManager:
        """Context of micro-batch `i` of `count`: gradients are communicated with the last one only."""
        is_last = i == count - 1
        self.accelerator.gradient_state._set_sync_gradients(is_last)  # DeepSpeed and the fp16 scaler read it
        return nullcontext() if is_last and not self.sync_after else self.accelerator.no_sync(self.model)

    def settle_buckets(self, batch: Batch) -> None:
        """Let DDP order its gradient buckets before the first step, of a new and of a resumed run. Collective.

        DDP reorders them after the first backward pass. With three or more processes the order changes the rounding of
        sums, so a resumed run would differ from an uninterrupted one.
        """
        engines = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self.accelerator.distributed_type in engines and not self.sync_after:
            chosen_C, rejected_C = concatenated_forward(self.model, batch.to(self.accelerator.device))
            self.accelerator.backward(0.0 * (chosen_C + rejected_C).sum())
            for p in self.model.parameters():
                p.grad = None
