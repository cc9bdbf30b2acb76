"""Weights in 4 or 8 bits under an adapter, through transformers' bitsandbytes integration."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from rm.config.errors import InputError

QUANTIZATION_OPTIONS = (  # of the program, and of `quantization_config`
    "load_in_4bit load_in_8bit dtype bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage".split()
)
NOT_QUANTISED = ["score", "classifier", "classification_head", "pooler"]  # heads, and what may be drawn with them


def quantization_config(
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    dtype: str = "float32",
    bnb_4bit_quant_type: str = "nf4",
    use_bnb_nested_quant: bool = False,
    bnb_4bit_quant_storage: str | None = None,
) -> BitsAndBytesConfig | None:
    """transformers' `BitsAndBytesConfig`, as TRL's `get_quantization_config` makes it; None for neither 4 nor 8 bits.

    `dtype`, of the weights that are not quantised, is also the one that 4-bit weights compute in ("auto": float32). The
    head is not quantised. peft's `prepare_model_for_kbit_training` is not needed: the adapter freezes the base,
    checkpointing is not reentrant, and norms and embeddings are float32 unless `dtype` says otherwise.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if not (load_in_4bit or load_in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        name = "load_in_4bit" if load_in_4bit else "load_in_8bit"
        raise InputError(f"{name}=True needs the package bitsandbytes: pip install bitsandbytes")
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTISED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype="float32" if dtype == "auto" else dtype,
        bnb_4bit_quant_type=bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=use_bnb_nested_quant,
        bnb_4bit_quant_storage=bnb_4bit_quant_storage,
        llm_int8_skip_modules=NOT_QUANTISED,
    )


def is_quantised(model: nn.Module) -> bool:
    """Whether some of the weights are in bitsandbytes' 4 or 8 bits."""
    return any(type(p).__name__ in ("Params4bit", "Int8Params") for p in model.parameters())


def keep_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from changing the 4-bit weights of `model` in place.

    On CPUs with AVX512-BF16 it would repack them at the first evaluation, with scales rounded to bfloat16, so that
    training would go on from other weights than it began with; and it fails for layers narrower than a block.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def without_quantization(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """`model` with the values of its quantised weights in ordinary ones of `dtype`, and nothing left of the rest."""
    model = model.dequantize(dtype=dtype)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model
