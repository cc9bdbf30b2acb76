"""`RewardModel`: a transformers sequence classifier whose head reads the positions that the caller names.

Shape suffixes: N sequences, R rows, L tokens, D hidden, K outputs.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from transformers import PreTrainedConfig
from transformers.integrations.liger import apply_liger_kernel
from transformers.integrations.neftune import activate_neftune
from transformers.utils.import_utils import enable_tf32, is_torch_tf32_available

from rm.config.errors import InputError
from rm.data.tokenizer import loading

NUM_OUTPUTS = 1  # of the head; the first is the reward (`rm.forward.score_batch`)
LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")  # of language models


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the `.module` of DDP or DeepSpeed, or inside a `PeftModel`; any other model itself."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, also if an engine has cast its weights (DeepSpeed) or its inputs."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class RewardModel(nn.Module):
    """`classifier`: a transformers sequence classifier with `NUM_OUTPUTS` labels, or a `PeftModel` around one.

    The head of a causal model computes N positions instead of R x L, in float32. transformers' own pooling searches for
    the pad token instead; the exported model uses it and is checked. Encoders keep their own pooling.
    """

    def __init__(self, classifier: nn.Module, activation_offloading=False, neftune_noise_alpha: float | None = None):
        super().__init__()
        self.classifier, self.activation_offloading = classifier, activation_offloading
        inner = unwrapped(classifier)
        self.config: PreTrainedConfig = inner.config
        self.is_causal = isinstance(getattr(inner, "score", None), nn.Module)  # true for all decoders in transformers
        self.undo_liger: Callable[[], None] = lambda: None
        self._no_split_modules = inner._no_split_modules  # the layers, which FSDP wraps
        if neftune_noise_alpha is not None:
            activate_neftune(inner, neftune_noise_alpha)
        if self.is_causal:
            for module in inner.score.float().modules():
                module.__class__ = Float32Linear if type(module) is nn.Linear else type(module)

    def forward(self, input_ids, attention_mask, end_row, end_index, **packed) -> Tensor:
        """All outputs of the head, float32 [N, K], at the last tokens (end_row, end_index), int64 [N].

        input_ids: int64 [R, L]. attention_mask, packed: see `rm.model.attention.attention_inputs`.
        """
        with offloaded(self) if self.activation_offloading and self.training else nullcontext():
            if not self.is_causal:  # concatenated rows only: row n is sequence n
                logits = self.classifier(input_ids=input_ids, attention_mask=attention_mask).logits
                return logits[end_row].float()
            inner = unwrapped(self.classifier)
            options = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False} | packed
            is_trained = any(p.requires_grad for p in inner.base_model.parameters())  # else store no activations
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
                hidden_RLD = inner.base_model(**options).last_hidden_state
            hidden_ND = hidden_RLD[end_row, end_index]
            with torch.autocast(hidden_ND.device.type, enabled=False):
                return inner.score(hidden_ND)


def offloaded(model: nn.Module) -> saved_tensors_hooks:
    """Context in which autograd stores activations in CPU memory until the backward pass (torch's `save_on_cpu`)."""
    to_cpu = save_on_cpu(pin_memory=torch.accelerator.is_available())
    # tensors with the shape of a weight, perhaps transposed, stay: weights, and copies by autocast or FSDP
    sizes = [getattr(p, "ds_shape", p.shape) for p in model.parameters()]  # under ZeRO-3 a weight itself is empty
    shapes = {shape for size in sizes for shape in (size, size[::-1])}
    return saved_tensors_hooks(
        lambda tensor: tensor if tensor.shape in shapes else to_cpu.pack_hook(tensor),
        lambda packed: packed if isinstance(packed, Tensor) else to_cpu.unpack_hook(packed),
    )


def find_head(model: nn.Module) -> nn.Linear:
    """The last linear layer of a sequence classifier: `score` of decoders, `classifier` of encoders."""
    for name in ("score", "classifier", "classifier.out_proj", "classification_head.out_proj"):
        head = reduce(lambda module, part: getattr(module, part, None), name.split("."), unwrapped(model))
        head = getattr(head, "modules_to_save", {"default": head})["default"]  # PEFT's trainable copy
        if isinstance(head, nn.Linear):
            return head
    raise InputError(f"{type(unwrapped(model)).__name__} has no linear head named score or classifier")


def max_positions(model: nn.Module) -> int | None:
    """The number of learned positions of a model (GPT-2, OPT, BERT); None if it computes them."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if limit and isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe")):
            return limit - (0 if module.padding_idx is None else module.padding_idx + 1)  # RoBERTa begins behind it
    return None


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
        raise InputError("tf32=True: it needs an NVIDIA GPU of the Ampere generation or newer; set it to none")
    if enabled is not None:
        enable_tf32(enabled)


def is_half_precision(model: nn.Module, mixed_precision: str | None, tf32: bool | None) -> bool:
    """Whether rewards are computed with fewer bits than float32: by autocast, TF32, or the weights."""
    is_half = any(p.dtype != torch.float32 for p in model.parameters())
    return is_half or bool(tf32) or mixed_precision not in (None, "no")


def use_liger_kernels(model: RewardModel, kernel_config: dict[str, bool] | None) -> None:
    """Patch the backbone with Liger's Triton kernels, as transformers' Trainer does (`kernel_config`: which ones).

    `model.undo_liger()` restores transformers' module of the model, which Liger patches too. Raises `InputError`.
    """
    inner = unwrapped(model.classifier)
    with loading("use_liger_kernel=True needs the package liger-kernel"):
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    if inner.config.model_type not in known:
        raise InputError(f"use_liger_kernel=True: Liger has no kernels for models of type {inner.config.model_type}")
    accepted = set(inspect.signature(known[inner.config.model_type]).parameters) - {"model", *LIGER_LOSSES}
    if wrong := sorted(set(kernel_config or {}) - accepted):
        raise InputError(f"liger_kernel_config: '{wrong[0]}' has no effect; there are {', '.join(sorted(accepted))}")
    module = sys.modules[type(inner).__module__]
    before = dict(vars(module))
    apply_liger_kernel(inner, dict.fromkeys(LIGER_LOSSES, False) | (kernel_config or {}))
    model.undo_liger = lambda: vars(module).update(before)
