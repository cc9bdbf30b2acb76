"""Number formats: weights cast for an evaluation, TF32, and 4-bit or 8-bit weights under an adapter (bitsandbytes)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_torch_tf32_available
from transformers.utils.import_utils import enable_tf32

from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.model.reward_model import find_head, unwrapped


@contextmanager
def cast_weights(model: nn.Module, dtype: str | None) -> Iterator[None]:
    """Inside the block, use copies of the weights in `dtype` (None: no effect). For one process or DDP.

    The head of a causal model stays float32, as do buffers (rotary frequencies) and quantized weights.
    """
    model, copies, places = unwrapped(model), {}, []
    head = {id(p) for p in find_head(model.classifier).parameters()} if model.is_causal else set()
    for module in model.modules() if dtype is not None else ():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if p.is_floating_point() and type(p) is nn.Parameter and id(p) not in head:
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
    """Multiply float32 matrices in TF32 on GPUs, or never; None: torch's default. Raises `InputError`."""
    if enabled and not is_torch_tf32_available():
        raise InputError("tf32=True: it needs an NVIDIA GPU of the Ampere generation or newer; leave it out")
    if enabled is not None:
        enable_tf32(enabled)


def is_half_precision(model: nn.Module, mixed_precision: str | None, tf32: bool | None) -> bool:
    """Whether rewards are computed with fewer bits than float32: by autocast, TF32, or the weights."""
    is_half = any(p.dtype != torch.float32 for p in model.parameters())
    return is_half or bool(tf32) or mixed_precision not in (None, "no")


def quantization_config(config: RewardConfig) -> BitsAndBytesConfig | None:
    """As TRL's `get_quantization_config`, without the head; None unless load_in_4bit or load_in_8bit."""
    # no `prepare_model_for_kbit_training`: adapters freeze the base, and `dtype` decides about norms and embeddings
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    return BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_compute_dtype="float32" if config.dtype == "auto" else config.dtype,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_quant_storage=config.bnb_4bit_quant_storage,
        llm_int8_skip_modules=["score", "classifier", "classification_head", "pooler"],  # may be new
    )


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights are 4-bit or 8-bit parameters of bitsandbytes."""
    return any(type(p).__name__ in ("Params4bit", "Int8Params") for p in model.parameters())


def keep_weights(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16, keep bitsandbytes from rounding 4-bit weights in place at the first evaluation."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantized(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """`model` with its quantized weights converted back to ordinary weights of `dtype`."""
    model = model.dequantize(dtype=None if dtype == "auto" else getattr(torch, dtype))
    vars(model.config).pop("quantization_config", None)
    return model
