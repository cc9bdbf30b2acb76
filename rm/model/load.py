"""Tokenizer and model from a folder or the hub: pad token, head; and what is wrong with them, in one line."""

from __future__ import annotations

import inspect
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from rm.config.errors import InputError
from rm.model.quantization import keep_weights
from rm.model.reward_model import NUM_OUTPUTS, find_head, use_cpu_kernel

logger = logging.getLogger(__name__)

MAX_REASON = 300  # characters of a library's message
PAD_TOKEN = "<|reward_pad|>"
PAD_CANDIDATES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


# ---------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(
    name: str, *, revision: str = "main", trust_remote_code: bool = False, chat_template_path: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right with a token that is not EOS.

    With pad == EOS, transformers' pooling takes the last token before EOS, so that the served model scores a sequence
    one token early. A special token of the vocabulary that is not used otherwise is chosen; if there is none, one is
    added. For an adapter's folder without one it is that of the base.
    """
    adapter = find_adapter(name, revision)
    if adapter is not None and Path(name).is_dir() and not _has_tokenizer(name):
        name, revision = adapter.get("base_model_name_or_path") or name, adapter.get("revision") or "main"
        check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file makes the libraries raise almost anything
        reason = why(name, error)
        if Path(name).is_dir() and not _has_tokenizer(name):
            reason = "the folder has no tokenizer files; copy those of the base model into it"
        raise InputError(f"no tokenizer could be loaded from '{name}': {reason}") from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        special = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values()}
        free = [t for t in PAD_CANDIDATES if t in special and t not in (tokenizer.eos_token, tokenizer.bos_token)]
        tokenizer.add_special_tokens({"pad_token": free[0] if free else PAD_TOKEN})
        origin = "of the vocabulary" if free else "added"
        logger.info(f"pad token: {tokenizer.pad_token!r} ({origin}; it must not be EOS)")
    if chat_template_path is not None:
        tokenizer.chat_template = _read_chat_template(chat_template_path)
    for template in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if Path(template).name != template:  # it is saved under that name, which transformers refuses after the run
            raise InputError(f"'{name}': its chat template {template!r} has a path for a name; set chat_template_path")
    return tokenizer


def _has_tokenizer(folder: str) -> bool:
    return any(list(Path(folder).glob(pattern)) for pattern in ("*token*", "vocab*", "*.model"))


def _read_chat_template(path: str) -> str:
    if Path(path).is_file():
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat_template_path='{path}' cannot be read: {error}; write it in UTF-8") from None
    try:
        template = AutoTokenizer.from_pretrained(path, trust_remote_code=False).chat_template
        reason = ""
    except Exception as error:
        template, reason = None, f" ({why(path, error)})" if Path(path).is_dir() else ""
    if template is None:
        problem = f"is neither a Jinja file nor a tokenizer with a chat template{reason}"
        raise InputError(f"chat_template_path='{path}' {problem}")
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
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """A sequence classifier with one float32 output from a causal LM, a reward model, an encoder, or a bare config.

    An existing reward model keeps its head. A new head is drawn from N(0, 1/(d+1)) (Stiennon et al. 2020), from `seed`.
    `gradient_checkpointing_kwargs` are torch.utils.checkpoint's; use_reentrant is False unless they say otherwise.
    """
    options = dict(revision=revision, trust_remote_code=trust_remote_code)
    check_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except Exception as error:
        raise InputError(f"no model could be loaded from '{name}': {why(name, error)}") from None
    is_classifier = any("SequenceClassification" in a for a in config.architectures or [])
    if is_classifier and config.num_labels != NUM_OUTPUTS and not has_no_weights(name):
        raise InputError(f"'{name}' is a classifier with {config.num_labels} labels; a reward model has {NUM_OUTPUTS}")
    config.num_labels = NUM_OUTPUTS
    config.problem_type = "regression"  # so that who serves the model puts no sigmoid on the reward (pipeline, vLLM)

    torch.manual_seed(seed)  # before any weight is drawn
    options |= dict(config=config, dtype=dtype)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    try:
        if has_no_weights(name):
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
                raise InputError(f"'{name}' lacks {len(missing)} weights, among them {missing[0]}")
            drawn = {"pooler" if "pooler" in key else key.split(".")[0] for key in info["missing_keys"]}
    except Exception as error:
        raise InputError(f"'{name}' could not be loaded as a reward model: {why(name, error)}") from None

    keep_weights(model)
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
            raise InputError(f"gradient_checkpointing: {type(model).__name__} does not support it")
        taken = set(inspect.signature(checkpoint).parameters) - {"function", "args", "kwargs"}
        if unknown := sorted(set(gradient_checkpointing_kwargs or ()) - taken):
            fix = f"there are {', '.join(sorted(taken))}"
            raise InputError(f"gradient_checkpointing_kwargs: torch takes no '{unknown[0]}'; {fix}")
        model.activation_checkpointing_enable({"use_reentrant": False} | (gradient_checkpointing_kwargs or {}))
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            model.enable_input_require_grads()  # or a layer of frozen weights gets no gradient
    return model


def find_adapter(name: str, revision: str = "main") -> dict[str, Any] | None:
    """The adapter_config.json of `name`, a folder or a hub name; None if it is no adapter."""
    check_folder(name)
    try:
        file = find_adapter_config_file(name, revision=revision)
        return json.loads(Path(file).read_text(encoding="utf-8")) if file is not None else None
    except (OSError, ValueError) as error:
        raise InputError(f"no model could be loaded from '{name}': {why(name, error)}") from None


def has_no_weights(name: str) -> bool:
    folder = Path(name)
    patterns = ("*.safetensors", "*.bin", "*.index.json")
    return (folder / "config.json").is_file() and not any(list(folder.glob(p)) for p in patterns)


def _disable_dropout(model: nn.Module) -> None:
    """Set dropout to 0 in modules and in the float attributes that functional attention reads (`attention_dropout`)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_folder(name: str) -> None:
    """Raise `InputError` for what can only be a folder and is none: the hub's message would be about names of repos."""
    is_local = Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1 or Path(name).is_file()
    is_local |= name.startswith("runs/")  # where runs are kept
    if is_local and not Path(name).is_dir():
        raise InputError(f"'{name}': there is no such folder; give a model's folder or its name on the hub")


def why(name: str, error: Exception) -> str:
    """What is wrong with the model `name`, in one line, from what a library raised while it was loaded."""
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json"):
        try:
            if not isinstance(json.loads((Path(name) / file).read_text(encoding="utf-8")), dict):
                return f"{file} is not a JSON object"
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as problem:
            return f"{file} cannot be read: {problem}"
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in ("config.json", "adapter_config.json")):
        return "the folder has no config.json"
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which was not run; read it, then allow it with trust_remote_code=true"
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says"
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle that is more than tensors, and was not run; weights must be safetensors"
    if isinstance(error, SafetensorError):
        return f"its safetensors file is broken, download it again ({in_one_line(error)})"
    return in_one_line(error)


def in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) or not text:
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + " ..."
