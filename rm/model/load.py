"""Tokenizer and model from a folder or the hub: to train, or as a run saved them."""

import inspect
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedConfig as ModelConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.model.adapters import check_same_adapter, load_adapter, new_adapter
from rm.model.attention import use_cpu_kernel
from rm.model.precision import dequantized, keep_weights, quantization_config
from rm.model.reward_model import NUM_OUTPUTS, RewardModel, compile_layers, find_head, unwrapped, use_liger_kernels
from rm.model.source import TOKENIZER_FILES, WEIGHT_FILES, check_folder, find_base, lacks, loading

logger = logging.getLogger(__name__)

PAD_TOKEN = "<|reward_pad|>"
PAD_CANDIDATES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


def load_tokenizer(config: RewardConfig) -> Tokenizer:
    """The tokenizer of `model_name_or_path` (or of its base), padding on the right with a token that is not EOS.

    With pad == EOS, transformers' pooling would score a sequence one token early. Raises `InputError`.
    """
    name, revision = config.model_name_or_path, config.model_revision
    check_folder(name)
    if lacks(name, *TOKENIZER_FILES):
        name, revision, _ = find_base(name, revision)
    if lacks(name, *TOKENIZER_FILES):
        raise InputError(f"'{name}': the folder has no tokenizer files; copy those of the base model into it")
    with loading(f"no tokenizer could be loaded from '{name}'"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        special = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values()}
        free = [t for t in PAD_CANDIDATES if t in special and t not in (tokenizer.eos_token, tokenizer.bos_token)]
        tokenizer.add_special_tokens({"pad_token": free[0] if free else PAD_TOKEN})
        logger.info(f"pad token: {tokenizer.pad_token!r} ({'of the vocabulary' if free else 'added'}; never EOS)")
    if config.chat_template_path is not None:
        tokenizer.chat_template = _read_chat_template(config.chat_template_path)
    for template in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if Path(template).name != template:  # it becomes a file name when the tokenizer is saved
            raise InputError(f"'{name}': its chat template {template!r} has a path for a name; set chat_template_path")
    return tokenizer


def _read_chat_template(path: str) -> str:
    where = f"chat_template_path='{path}'"
    if Path(path).is_file():
        with loading(f"{where} cannot be read as UTF-8"):
            return Path(path).read_text(encoding="utf-8")
    with loading(f"{where} is neither a Jinja file nor a tokenizer"):
        template = AutoTokenizer.from_pretrained(path, trust_remote_code=False).chat_template
    if template is None:
        raise InputError(f"{where}: this tokenizer has no chat template")
    return template


def load_model_config(config: RewardConfig, name: str | None = None, revision: str = "main") -> ModelConfig:
    """The configuration of the model `name` (None: of `model_name_or_path` or its base). Raises `InputError`."""
    if name is None:
        name, revision, _ = find_base(config.model_name_or_path, config.model_revision)
    with loading(f"no model could be loaded from '{name}'"):
        model_config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    model_config.num_labels = NUM_OUTPUTS
    model_config.problem_type = "regression"  # so that the pipeline and vLLM apply no sigmoid to the reward
    return model_config


def load_reward_model(tokenizer: Tokenizer, config: RewardConfig) -> RewardModel:
    """The model to train, from a causal LM, a reward model (keeps its head), an encoder, a bare config, or an adapter.

    With `use_peft` an adapter over it is trained, a new one or the given one. Without it all weights are trained, or
    those in `trainable`; a given adapter is merged first, which changes no reward. Raises `InputError`.
    """
    source = config.model_name_or_path
    name, revision, adapter = find_base(source, config.model_revision)
    if adapter is not None:
        check_same_adapter(source, adapter, config)
    torch.manual_seed(config.seed)  # before any weight is drawn
    model, missing = _open(name, revision, config, config.attn_implementation, quantization_config(config))
    backbone = f"{model.base_model_prefix}."
    if lacking := [key for key in missing if key.startswith(backbone) and "pooler" not in key]:
        raise InputError(f"'{name}' lacks {len(lacking)} weights, among them {lacking[0]}")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    if is_new := any(not key.startswith(backbone) for key in missing):
        torch.manual_seed(config.seed)  # the head depends on the seed alone, whatever was drawn for other layers
        head = find_head(model)
        nn.init.normal_(head.weight, std=1 / (head.in_features + 1) ** 0.5)  # Stiennon et al. 2020
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    logger.info(f"reward head: {f'new, drawn from seed {config.seed}' if is_new else 'kept from the loaded model'}")
    if config.disable_dropout:
        _disable_dropout(model)
    if config.attn_implementation is None:
        use_cpu_kernel(model)
    if config.gradient_checkpointing:
        _checkpoint_activations(model, config.gradient_checkpointing_kwargs or {})

    new_modules = sorted({"pooler" if "pooler" in key else key.split(".")[0] for key in missing})
    if adapter is not None:
        logger.info(f"adapter: '{source}' over '{name}' is {'trained further' if config.use_peft else 'merged'}")
        model = load_adapter(model, source, config.model_revision, is_trainable=config.use_peft)
        if not config.use_peft:
            with loading(f"use_peft=False: the adapter '{source}' cannot be merged"):
                model = model.merge_and_unload().requires_grad_(True)
    elif config.use_peft:
        model = new_adapter(model, config, new_modules)
    if config.trainable is not None:
        _freeze(model, config.trainable, new_modules)
    if not find_head(model).weight.requires_grad:
        raise InputError(f"use_peft: PEFT does not train the head of {type(unwrapped(model)).__name__}")
    reward_model = RewardModel(model, config.activation_offloading, config.neftune_noise_alpha)
    if config.use_liger_kernel:
        use_liger_kernels(reward_model, config.liger_kernel_config)
    if config.torch_compile:
        logger.info(f"torch_compile: one graph for {compile_layers(reward_model)} layers, made in the first steps")
    total = sum(p.numel() for p in reward_model.parameters())
    trained = sum(p.numel() for p in reward_model.parameters() if p.requires_grad)
    logger.info(f"model: {total:,} parameters, {trained:,} trained")
    return reward_model


def _open(name: str, revision: str, config: RewardConfig, attention: str | None, quantization: Any = None):
    """(sequence classifier with `NUM_OUTPUTS` labels, names of its weights that are not in the checkpoint)."""
    if attention == "flex_attention":
        raise InputError("attn_implementation=flex_attention is not supported; use sdpa, or none for the default")
    options = dict(attn_implementation=attention, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    options["config"] = load_model_config(config, name, revision)
    failed = f"'{name}' could not be loaded as a reward model"
    if lacks(name, *WEIGHT_FILES):
        logger.info(f"'{name}' holds no weights: initialized from its config")
        with loading(failed):
            options["dtype"] = "float32" if config.dtype == "auto" else config.dtype
            model = AutoModelForSequenceClassification.from_config(**options)
        return model, [key for key, _ in model.named_parameters() if not key.startswith(f"{model.base_model_prefix}.")]
    options |= dict(revision=revision, quantization_config=quantization)
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
    with loading(failed):
        model, info = AutoModelForSequenceClassification.from_pretrained(name, **options)
    for key, saved, expected in sorted(info["mismatched_keys"]):
        shapes = f"{key} has the shape {list(saved)}; a reward model with this config.json has {list(expected)}"
        raise InputError(f"{failed}: {shapes}")
    if unused := sorted(info["unexpected_keys"]):
        logger.info(f"not used from the checkpoint: {', '.join(unused[:5])}{' ...' if len(unused) > 5 else ''}")
    keep_weights(model)
    return model, sorted(info["missing_keys"])


def _freeze(model: PreTrainedModel, trainable: str, new_modules: list[str]) -> None:
    """Train only the head, `new_modules`, and parameters in whose names the pattern `trainable` is found."""
    names = [name for name, _ in model.named_parameters()]
    try:
        found = {name for name in names if re.search(trainable, name)}
    except re.error as error:
        raise InputError(f"trainable={trainable}: is not a regular expression ({error})") from error
    if not found:
        raise InputError(
            f"trainable={trainable}: is found in no parameter name; there are {names[0]}, ..., {names[-1]}"
        )
    for name, p in model.named_parameters():
        is_old = name.startswith(f"{model.base_model_prefix}.") and not set(name.split(".")) & set(new_modules)
        p.requires_grad_(name in found or not is_old)


def _disable_dropout(model: nn.Module) -> None:
    """Set dropout to 0 in modules and in the float attributes that functional attention reads (`attention_dropout`)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _checkpoint_activations(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    if not model.supports_gradient_checkpointing:
        raise InputError(f"gradient_checkpointing: {type(model).__name__} does not support it")
    accepted = sorted(set(inspect.signature(checkpoint).parameters) - {"function", "args", "kwargs"})
    if unknown := sorted(set(kwargs) - set(accepted)):
        raise InputError(f"gradient_checkpointing_kwargs: there is no '{unknown[0]}'; there are {', '.join(accepted)}")
    model.activation_checkpointing_enable({"use_reentrant": False} | kwargs)
    if kwargs.get("use_reentrant"):
        model.enable_input_require_grads()  # or a layer of frozen weights gets no gradient


def load_saved_classifier(name: str, tokenizer: Tokenizer, config: RewardConfig, attention: str | None = None):
    """The saved model `name` as plain transformers or PEFT open it. Raises `InputError` if it has no trained head."""
    if find_base(name, config.model_revision)[2] is None:
        model, missing = _open(name, config.model_revision, config, attention)
        if missing:
            raise InputError(f"'{name}' is not a trained reward model: it lacks {missing[0]}")
        return model
    from peft import AutoPeftModelForSequenceClassification

    options = dict(attn_implementation=attention, quantization_config=quantization_config(config), dtype=config.dtype)
    options |= dict(num_labels=NUM_OUTPUTS, trust_remote_code=config.trust_remote_code, revision=config.model_revision)
    with loading(f"'{name}' could not be loaded as a reward model"):
        model = AutoPeftModelForSequenceClassification.from_pretrained(name, **options)
    keep_weights(model)
    # adapters do not store the pad token, by which transformers finds the last token of a sequence
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    return model


def load_saved_model(name: str, tokenizer: Tokenizer, config: RewardConfig) -> RewardModel:
    """The saved model `name`, as `rm.evaluate` and `rm.score` use it. Raises `InputError`."""
    model = RewardModel(load_saved_classifier(name, tokenizer, config, config.attn_implementation))
    if config.attn_implementation is None:
        use_cpu_kernel(unwrapped(model.classifier))
    return model


def merge_saved_adapter(name: str, tokenizer: Tokenizer, config: RewardConfig) -> PreTrainedModel:
    """The saved adapter `name`, merged into its base; a quantized base is first converted back to `dtype`."""
    model = load_saved_classifier(name, tokenizer, config)
    if quantization_config(config) is not None:
        model = load_adapter(dequantized(model.unload(), config.dtype), name, is_trainable=False)
    with loading("merge_adapter=True"):
        return model.merge_and_unload()
