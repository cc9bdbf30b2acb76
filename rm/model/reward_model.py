"""`RewardModel`: a transformers sequence classifier with one output, read at the positions that the caller names.

Shape suffixes: R rows, L tokens, N sequences, D hidden.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from rm.config.errors import InputError
from rm.model.attention import SDPA_BY_TREE

LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


NUM_OUTPUTS = 1  # of the head; the first one is the reward


class RewardModel(nn.Module):
    """Wraps an `AutoModelForSequenceClassification` with `NUM_OUTPUTS` labels, perhaps inside a `PeftModel`.

    A causal model's reward is `head(last_hidden_state[row, index])`: gathered first, so that the head costs N
    positions rather than R x L, and computed in float32. transformers' own pooling looks for `pad_token_id` and so can
    mistake the position; it is used by the exported model only, and checked there. Encoders keep their own pooling.
    """

    def __init__(
        self, classifier: nn.Module, *, activation_offloading: bool = False, neftune_noise_alpha: float | None = None
    ):
        """`activation_offloading`, `neftune_noise_alpha`: in training only (`offloaded`, `_add_noise`)."""
        super().__init__()
        self.classifier = classifier
        self.activation_offloading, self.neftune_noise_alpha = activation_offloading, neftune_noise_alpha
        if neftune_noise_alpha is not None:
            self._length_RL: Tensor | None = None  # set for the time of a forward pass
            self.bare.get_input_embeddings().register_forward_hook(self._add_noise)
        self.config: PreTrainedConfig = self.bare.config
        self._no_split_modules = self.bare._no_split_modules  # what FSDP wraps: the layers of the model inside
        if self.is_causal:
            self.bare.score.float()

    @property
    def bare(self) -> PreTrainedModel:
        """The sequence classifier itself, without a PEFT wrapper (adapters act inside its layers)."""
        return self.classifier.get_base_model() if hasattr(self.classifier, "peft_config") else self.classifier

    @property
    def dtype(self) -> torch.dtype:
        return self.bare.dtype

    @property
    def is_causal(self) -> bool:
        """Whether the head reads one position (`score`), as all of transformers' decoders do."""
        return isinstance(getattr(self.bare, "score", None), nn.Module)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor],
        end_row: Tensor,
        end_index: Tensor,
        position_ids: Tensor | None = None,
        tree_lengths: list[int] | None = None,
        length_RL: Tensor | None = None,
    ) -> Tensor:
        """Rewards, float32 [N].

        Args:
            input_ids, position_ids: int64 [R, L].
            attention_mask: 0/1 [R, L], or bool/additive [R, 1, L, L], or a dict of these by layer type.
            end_row, end_index: where the last token of each sequence stands, int64 [N].
            tree_lengths: tokens of each tree of the only row, for `rm.model.attention.attend_by_tree`.
            length_RL: tokens of the sequence that each token is part of, for NEFTune's noise.
        """
        self._length_RL = length_RL if self.training else None
        with offloaded(self) if self.activation_offloading and self.training else nullcontext():
            return self._score(input_ids, attention_mask, end_row, end_index, position_ids, tree_lengths)

    def _score(self, input_ids, attention_mask, end_row, end_index, position_ids, tree_lengths) -> Tensor:
        if not self.is_causal:  # concatenated rows only: row n is sequence n's
            logits = self.classifier(input_ids=input_ids, attention_mask=attention_mask).logits
            return logits[end_row, 0].float()
        backbone = getattr(self.bare, self.bare.base_model_prefix)
        packed = {"position_ids": position_ids, "tree_lengths": tree_lengths}
        packed = {name: value for name, value in packed.items() if value is not None}
        hidden_RLD = backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **packed
        ).last_hidden_state
        head_dtype = next(self.bare.score.parameters()).dtype  # float32, unless an engine casts all weights
        hidden_ND = hidden_RLD[end_row, end_index].to(head_dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return self.bare.score(hidden_ND).float()[:, 0].clone()  # FSDP2 can lose the hook of a view

    def _add_noise(self, module: nn.Module, inputs: tuple, embedded_RLD: Tensor) -> Tensor | None:
        """NEFTune (arXiv 2310.05914): uniform noise of at most alpha / sqrt(L D) on the embeddings of a sequence of L.

        transformers takes the length of the row for L; here a row holds padding, or many sequences.
        """
        if self._length_RL is None:
            return None
        bound_RL = self.neftune_noise_alpha / (self._length_RL.clamp(min=1) * embedded_RLD.shape[-1]) ** 0.5
        return embedded_RLD + bound_RL[..., None].to(embedded_RLD.dtype) * torch.empty_like(embedded_RLD).uniform_(
            -1, 1
        )


def offloaded(model: nn.Module) -> saved_tensors_hooks:
    """Context in which what autograd keeps for the backward pass waits in the memory of the CPU; weights stay.

    torch's `save_on_cpu` for everything else. TRL's `OffloadActivations` besides overlaps the copies with computation,
    in a stream of its own, and leaves tensors under 1 KiB where they are.
    """
    to_cpu = save_on_cpu(pin_memory=torch.accelerator.is_available())
    weights = {getattr(p, "_local_tensor", p).untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor):
        is_weight = tensor.untyped_storage().data_ptr() in weights
        return tensor if is_weight else to_cpu.pack_hook(tensor)

    def unpack(packed) -> Tensor:
        return packed if isinstance(packed, Tensor) else to_cpu.unpack_hook(packed)

    return saved_tensors_hooks(pack, unpack)


def use_cpu_kernel(model: PreTrainedModel) -> None:
    """Without an accelerator, attend tree by tree where transformers would choose `sdpa` (`rm.attention`)."""
    if not torch.accelerator.is_available() and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(SDPA_BY_TREE)


def compile_layers(model: RewardModel) -> int:
    """Compile the repeated layer in place, for rows of any shape; returns how many layers share the code.

    Regional: the layers are the same code, so that one of them is compiled and all use it, in any batch shape
    (`dynamic`). Names of weights stay as they are. Raises `InputError` if there is no such layer or no C++ compiler.
    """
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise InputError(f"torch_compile: {type(model.bare).__name__} does not name its repeated layer")
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise InputError("torch_compile needs a C++ compiler, such as g++; install one, or turn it off")
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def use_liger_kernels(model: RewardModel, kernel_config: dict[str, bool] | None) -> Callable[[], None]:
    """Patch the backbone with Liger's Triton kernels, as transformers' Trainer does (`kernel_config`: which ones).

    Liger's losses and the forward pass that it gives a language model stay off: ours is a classifier. Besides this
    model it patches functions and classes of the model's module in transformers; what is returned puts these back, so
    that plain transformers can check what is saved. Raises `InputError`.
    """
    bare = model.bare
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError:
        raise InputError("use_liger_kernel=True needs the package liger-kernel: pip install liger-kernel") from None
    if bare.config.model_type not in known:
        raise InputError(f"use_liger_kernel=True: Liger has no kernels for models of type {bare.config.model_type}")
    accepted = set(inspect.signature(known[bare.config.model_type]).parameters) - {"model", *LIGER_LOSSES}
    if wrong := sorted(set(kernel_config or {}) - accepted):
        raise InputError(f"liger_kernel_config: '{wrong[0]}' cannot act here; there are {', '.join(sorted(accepted))}")
    module = sys.modules[type(bare).__module__]
    before = dict(vars(module))
    apply_liger_kernel(bare, dict.fromkeys(LIGER_LOSSES, False) | (kernel_config or {}))
    return lambda: vars(module).update(before)


def max_positions(model: RewardModel) -> int | None:
    """Tokens for which a learned table has positions (GPT-2, OPT, BERT); None for models that compute positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe")):
            # RoBERTa's positions begin after its padding index
            return limit and limit - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def check_positions(model: RewardModel, longest: int) -> None:
    """Raise `InputError` if `longest` tokens do not fit a learned table of positions."""
    limit = max_positions(model)
    if limit and longest > limit:
        raise InputError(f"sequences have up to {longest} tokens, the model {limit} positions: set max_length")


def find_head(model: nn.Module) -> nn.Linear:
    """The last linear layer of a sequence classifier: `score` of decoders, `classifier` of encoders."""
    for name in ("score", "classifier", "classifier.out_proj", "classification_head.out_proj"):
        try:
            head = model.get_submodule(name)
        except AttributeError:
            continue
        head = getattr(head, "modules_to_save", {"default": head})["default"]  # PEFT's trainable copy
        if isinstance(head, nn.Linear):
            return head
    raise InputError(f"{type(model).__name__} has no linear head named score or classifier")
