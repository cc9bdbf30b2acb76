"""`RewardModel`: a transformers sequence classifier with one output, read at the positions that the caller names.

Shape suffixes: R rows, L tokens, N sequences, D hidden.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from rm.attention import SDPA_BY_TREE

logger = logging.getLogger(__name__)

LOAD_ERRORS = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)
PAD_TOKEN = "<|reward_pad|>"
PAD_CANDIDATES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


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


# ---------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(
    name: str, *, revision: str = "main", trust_remote_code: bool = False, chat_template_path: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right with a token that is not EOS.

    With pad == EOS, transformers' pooling takes the last token before EOS, so that the served model scores a sequence
    one token early. A special token of the vocabulary that is not used otherwise is chosen; if there is none, one is
    added.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no tokenizer could be loaded from '{name}': {_first_line(error)}") from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        special = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values()}
        free = [t for t in PAD_CANDIDATES if t in special and t not in (tokenizer.eos_token, tokenizer.bos_token)]
        tokenizer.add_special_tokens({"pad_token": free[0] if free else PAD_TOKEN})
        origin = "of the vocabulary" if free else "added"
        logger.info(f"pad token: {tokenizer.pad_token!r} ({origin}; it must not be EOS)")
    if chat_template_path is not None:
        tokenizer.chat_template = _read_chat_template(chat_template_path)
    return tokenizer


def _read_chat_template(path: str) -> str:
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    try:
        template = AutoTokenizer.from_pretrained(path, trust_remote_code=False).chat_template
    except (OSError, ValueError, KeyError):
        template = None
    if template is None:
        raise ModelError(f"chat_template_path='{path}' is neither a Jinja file nor a tokenizer with a chat template")
    return template


# ---------------------------------------------------------------------------------------------- loading


def load_classifier(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    revision: str = "main",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    disable_dropout: bool = True,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """A sequence classifier with one float32 output from a causal LM, a reward model, an encoder, or a bare config.

    An existing reward model keeps its head. A new head is drawn from N(0, 1/(d+1)) (Stiennon et al. 2020), from `seed`.
    """
    options = dict(revision=revision, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no model could be loaded from '{name}': {_first_line(error)}") from None
    is_classifier = any("SequenceClassification" in a for a in config.architectures or [])
    if is_classifier and config.num_labels != 1 and not _has_no_weights(name):
        raise ModelError(f"'{name}' is a classifier with {config.num_labels} labels; a reward model has 1")
    config.num_labels = 1

    torch.manual_seed(seed)  # before any weight is drawn
    options |= dict(config=config, dtype=dtype)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    try:
        if _has_no_weights(name):
            logger.info(f"'{name}' holds no weights: initialised from its config")
            options.pop("revision")
            options["dtype"] = torch.float32 if dtype == "auto" else getattr(torch, dtype)
            model = AutoModelForSequenceClassification.from_config(options.pop("config"), **options)
            head_is_new, drawn = True, set()
        else:
            model, info = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **options)
            prefix = model.base_model_prefix + "."
            head_is_new = any(not key.startswith(prefix) for key in info["missing_keys"])
            missing = [key for key in info["missing_keys"] if key.startswith(prefix) and "pooler" not in key]
            if missing:
                raise ModelError(f"'{name}' lacks {len(missing)} weights, among them {missing[0]}")
            drawn = {"pooler" if "pooler" in key else key.split(".")[0] for key in info["missing_keys"]}
    except LOAD_ERRORS as error:
        raise ModelError(f"'{name}' could not be loaded as a reward model: {_first_line(error)}") from None

    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    model.drawn_modules = sorted(drawn)  # not in the checkpoint: an adapter must hold them
    head = find_head(model)
    if head_is_new:
        torch.manual_seed(seed)  # the head depends on the seed alone, whatever was drawn for other layers
        nn.init.normal_(head.weight, std=1 / (head.in_features + 1) ** 0.5)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
        logger.info(f"new reward head: {head.in_features} -> 1, drawn from seed {seed}")
    else:
        logger.info("reward head: kept from the loaded model")
    if disable_dropout:
        _disable_dropout(model)
    if attn_implementation is None:
        use_cpu_kernel(model)
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ModelError(f"gradient_checkpointing: {type(model).__name__} does not support it")
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def load_trained(
    name: str, tokenizer: PreTrainedTokenizerBase, *, dtype: str = "auto", trust_remote_code: bool = False
) -> nn.Module:
    """What a run saved, as plain transformers or PEFT load it: a sequence classifier, or a PEFT model of an adapter.

    An adapter holds neither the pad token, by which transformers finds a sequence's last token, nor the type of the
    weights under it: the first is set from `tokenizer`, the second is `dtype`, that of the training. Raises
    `ModelError` if the model has no trained reward head.
    """
    options = dict(dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        if find_adapter_config_file(name) is not None:
            from peft import AutoPeftModelForSequenceClassification

            model = AutoPeftModelForSequenceClassification.from_pretrained(name, num_labels=1, **options)
            model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
            return model
        options["output_loading_info"] = True
        model, info = AutoModelForSequenceClassification.from_pretrained(name, **options)
    except LOAD_ERRORS as error:
        raise ModelError(f"'{name}' could not be loaded as a reward model: {_first_line(error)}") from None
    if info["missing_keys"] or model.config.num_labels != 1:
        raise ModelError(f"'{name}' is not a trained reward model: it has no head with one output")
    return model


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


def _has_no_weights(name: str) -> bool:
    folder = Path(name)
    patterns = ("*.safetensors", "*.bin", "*.index.json")
    return (folder / "config.json").is_file() and not any(list(folder.glob(p)) for p in patterns)


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


def _disable_dropout(model: nn.Module) -> None:
    """Set dropout to 0 in modules and in the float attributes that functional attention reads (`attention_dropout`)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: str | list[str] | None,
    revision: str = "main",
) -> nn.Module:
    """Wrap `model` in a LoRA adapter whose head is trained in full (`task_type=SEQ_CLS` does that)."""
    from peft import LoraConfig, TaskType, get_peft_model

    if _has_no_weights(model.config._name_or_path):
        raise ModelError(f"use_peft needs a model with weights to adapt; '{model.config._name_or_path}' has none")
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        modules_to_save=model.drawn_modules or None,
    )
    try:
        adapted = get_peft_model(model, lora, revision=None if revision == "main" else revision)
    except ValueError as error:
        raise ModelError(f"lora_target_modules={target_modules!r}: {_first_line(error)}") from None
    if not find_head(adapted.get_base_model()).weight.requires_grad:
        raise ModelError("the reward head is not trainable under this adapter")
    return adapted
