"""How numbers are held and multiplied: weights cast for an evaluation, TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import is_torch_tf32_available
from transformers.utils.import_utils import enable_tf32

from rm.config.errors import InputError
from rm.model.reward_model import RewardModel


@contextmanager
def cast_weights(model: nn.Module, dtype: str | None) -> Iterator[None]:
    """Put copies of the weights in `dtype` in their places inside the block, and themselves back after it. None: don't.

    The head of a causal model stays float32, as do buffers (rotary frequencies) and quantised weights. For one process
    or DDP: under FSDP and DeepSpeed the weights are not the model's to replace. While it lasts both copies are held.
    """
    core: RewardModel = getattr(model, "module", model)
    head = {id(p) for p in core.bare.score.parameters()} if core.is_causal else set()
    places, copies = [], {}
    if dtype is not None:
        for module in core.modules():
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
                if p.is_floating_point() and id(p) not in head and type(p) is nn.Parameter:  # bitsandbytes has its own
                    places.append((module, name, p))
                    copies.setdefault(id(p), nn.Parameter(p.detach().to(getattr(torch, dtype)), requires_grad=False))
    try:
        for module, name, p in places:  # other objects: DDP's hooks are lost if the type of a weight itself changes
            setattr(module, name, copies[id(p)])
        yield
    finally:
        for module, name, p in places:
            setattr(module, name, p)


def set_tf32(enabled: bool | None) -> None:
    """Multiply float32 matrices in TF32 on GPUs that can, or never; None: torch's choice. Raises `InputError`."""
    if enabled and not is_torch_tf32_available():
        raise InputError("tf32=True: it needs an NVIDIA GPU of the Ampere generation or newer; leave it out")
    if enabled is not None:
        enable_tf32(enabled)
