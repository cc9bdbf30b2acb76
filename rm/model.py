"""`RewardModel`: a transformers sequence classifier with one output, read at the positions that the caller names.

Shape suffixes: R rows, L tokens, N sequences, D hidden.
"""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rm.attention import SDPA_BY_TREE


class ModelError(ValueError):
    """A model or tokenizer that cannot become a reward model; the message is one line and names the fix."""


class RewardModel(nn.Module):
    """Wraps an `AutoModelForSequenceClassification` with `num_labels=1`, perhaps inside a `PeftModel`.

    A causal model's reward is `head(last_hidden_state[row, index])`: gathered first, so that the head costs N
    positions rather than R x L, and computed in float32. transformers' own pooling looks for `pad_token_id` and so can
    mistake the position; it is used by the exported model only, and checked there. Encoders keep their own pooling.
    """

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier
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
    ) -> Tensor:
        """Rewards, float32 [N].

        Args:
            input_ids, position_ids: int64 [R, L].
            attention_mask: 0/1 [R, L], or bool/additive [R, 1, L, L], or a dict of these by layer type.
            end_row, end_index: where the last token of each sequence stands, int64 [N].
            tree_lengths: tokens of each tree of the only row, for `rm.attention.attend_by_tree`.
        """
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


def use_cpu_kernel(model: PreTrainedModel) -> None:
    """Without an accelerator, attend tree by tree where transformers would choose `sdpa` (`rm.attention`)."""
    if not torch.accelerator.is_available() and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(SDPA_BY_TREE)


def compile_layers(model: RewardModel) -> int:
    """Compile the repeated layer in place, for rows of any shape; returns how many layers share the code.

    Regional: the layers are the same code, so that one of them is compiled and all use it, in any batch shape
    (`dynamic`). Names of weights stay as they are. Raises `ModelError` if there is no such layer or no C++ compiler.
    """
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise ModelError(f"torch_compile: {type(model.bare).__name__} does not name its repeated layer")
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise ModelError("torch_compile needs a C++ compiler, such as g++; install one, or turn it off")
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def check_positions(model: RewardModel, longest: int) -> None:
    """Raise `ModelError` if `longest` tokens do not fit a learned table of positions (GPT-2, OPT, BERT)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    learned = any(
        isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
        for name, module in model.named_modules()
    )
    if learned and limit and longest > limit:
        raise ModelError(f"sequences have up to {longest} tokens, the model {limit} positions: set max_length")


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
    raise ModelError(f"{type(model).__name__} has no linear head named score or classifier")
