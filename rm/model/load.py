"""The model from a folder or the hub: to train, or as a run saved it, with what the run recorded beside it."""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.distributed.utils import is_local_dist_rank_0
from transformers.integrations import is_fsdp_enabled

from rm.config.cli import make_config, read_yaml
from rm.config.errors import InputError
from rm.config.files import read_json
from rm.config.options import LoraOptions, RewardConfig
from rm.config.section import fields_of
from rm.data.formats import COLUMN_OPTIONS
from rm.data.tokenizer import WEIGHT_FILES, check_folder, find_base, lacks, loading
from rm.model.adapters import load_adapter, new_adapter, quantization_config
from rm.model.attention import FLASH, use_tree_kernel
from rm.model.reward_model import NUM_OUTPUTS, RewardModel, find_head, max_positions, unwrapped, use_liger_kernels

logger = logging.getLogger(__name__)

HEADS = re.compile(r"(?<!lm_)head|value|reward|score|regression|classifier")  # in names of weights
SCALE = ("reward_mean", "reward_std", "reward_answers")  # keys in config.json, and of "normalization" in results.json


def check_positions(config: RewardConfig, longest: int) -> None:
    """Raise `InputError` if the model has fewer learned positions than `longest`. Reads no weights."""
    name, revision, _ = find_base(config.model_name_or_path, config.model_revision)
    remote = {"trust_remote_code": config.trust_remote_code}
    with loading(f"'{name}' could not be loaded as a reward model"), torch.device("meta"):
        model_config = AutoConfig.from_pretrained(name, revision=revision, **remote)
        limit = max_positions(AutoModelForSequenceClassification.from_config(model_config, **remote))
    if limit and longest > limit:
        raise InputError(f"sequences have up to {longest} tokens, the model {limit} positions: set max_length")


def load_reward_model(tokenizer: Tokenizer, config: RewardConfig) -> RewardModel:
    """The model to train, from a causal LM, a reward model (keeps its head), an encoder, a bare config, or an adapter.

    With `use_peft` an adapter over it is trained, a new one or the given one. Without it all weights are trained, or
    those in `trainable`; a given adapter is merged first, which changes no reward. Raises `InputError`.
    With `fsdp_cpu_ram_efficient_loading`, one process of each node reads weights (`shard_model`). Collective then.
    """
    source = config.model_name_or_path
    name, revision, adapter = find_base(source, config.model_revision)
    fields = fields_of(RewardConfig)
    given = [name for name in (*fields_of(LoraOptions), "peft_config") if getattr(config, name) != fields[name].default]
    if adapter is not None and given:
        raise InputError(f"{given[0]}: the adapter '{source}' keeps its own configuration; leave the option out")
    torch.manual_seed(config.seed)  # before any weight is drawn
    is_empty = is_fsdp_enabled() and not is_local_dist_rank_0()  # cpu_ram_efficient_loading: the weights come later
    quantization = quantization_config(config)
    model, missing = _open(name, revision, config, config.attn_implementation, quantization, is_empty)
    if is_fsdp_enabled():
        missing, dtype = broadcast_object_list([missing, model.dtype])  # collective
        model = model.to(dtype) if is_empty else model
    backbone = f"{model.base_model_prefix}."
    if lacking := [key for key in missing if key.startswith(backbone) and "pooler" not in key]:
        raise InputError(f"'{name}' lacks {len(lacking)} weights, among them {lacking[0]}")
    _fit_to_tokenizer(model, tokenizer)
    if is_new := any(not key.startswith(backbone) for key in missing):
        torch.manual_seed(config.seed)  # the head depends on the seed alone, whatever was drawn for other layers
        head = find_head(model)
        nn.init.normal_(head.weight, std=1 / (head.in_features + 1) ** 0.5)  # Stiennon et al. 2020
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    logger.info(f"reward head: {f'new, drawn from seed {config.seed}' if is_new else 'kept from the loaded model'}")
    if config.disable_dropout:
        _disable_dropout(model)
    use_tree_kernel(model, config.attn_implementation)
    if config.gradient_checkpointing:
        kwargs = {"use_reentrant": False} | (config.gradient_checkpointing_kwargs or {})
        with loading(f"gradient_checkpointing with {kwargs}"):
            checkpoint(nn.Identity(), torch.zeros(1, requires_grad=True), **kwargs)  # raises for unknown arguments
            model.activation_checkpointing_enable(kwargs)
        if kwargs["use_reentrant"]:
            model.enable_input_require_grads()  # or a layer of frozen weights gets no gradient

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
    reward_model = RewardModel(model, config.activation_offloading, config.neftune_noise_alpha)
    if config.use_liger_kernel:
        use_liger_kernels(reward_model, config.liger_kernel_config)
    if config.torch_compile:
        layers = [m for m in model.modules() if type(m).__name__ in (reward_model._no_split_modules or ())]
        if not layers:
            raise InputError(f"torch_compile: {model.config.model_type} models do not name their repeated layer")
        for layer in layers:
            layer.compile(dynamic=True)  # in place, for rows of any shape
        logger.info(f"torch_compile: one graph for {len(layers)} layers, made in the first steps")
    logger.info(f"model: {model.num_parameters():,} parameters, {model.num_parameters(only_trainable=True):,} trained")
    return reward_model


def _open(name: str, revision: str, config: RewardConfig, attention: str | None, quantization: Any, is_empty=False):
    """(sequence classifier with `NUM_OUTPUTS` labels, names of its weights that the checkpoint lacks).

    `is_empty`: the weights are on the meta device, and the checkpoint is not read.
    """
    if attention == "flex_attention":
        raise InputError("attn_implementation=flex_attention is not supported; use sdpa, or none for the default")
    failed, auto = f"'{name}' could not be loaded as a reward model", AutoModelForSequenceClassification
    attention = None if attention in FLASH else attention  # its kernel is set later, by `use_tree_kernel`
    options = dict(attn_implementation=attention, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    with loading(failed):
        model_config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
        model_config.num_labels = NUM_OUTPUTS
        model_config.problem_type = "regression"  # so that the pipeline and vLLM apply no sigmoid to the reward
        if lacks(name, *WEIGHT_FILES):
            logger.info(f"'{name}' holds no weights: initialized from its config")
            options["dtype"] = "float32" if config.dtype == "auto" else config.dtype
            model = auto.from_config(model_config, **options)
            return model, [k for k, _ in model.named_parameters() if not k.startswith(f"{model.base_model_prefix}.")]
        if is_empty:
            with torch.device("meta"):
                kind = type(auto.from_config(model_config, **options))
            del options["trust_remote_code"]
            return kind.from_pretrained(None, config=model_config, state_dict={}, **options), []
        options |= dict(output_loading_info=True, ignore_mismatched_sizes=True, quantization_config=quantization)
        model, info = auto.from_pretrained(name, config=model_config, revision=revision, **options)
    for key, saved, expected in sorted(info["mismatched_keys"]):
        shapes = f"{key} has the shape {list(saved)}; a reward model with this config.json has {list(expected)}"
        if not key.startswith(f"{model.base_model_prefix}."):
            shapes += f". It is a classifier with num_labels={saved[0]}: give the model that it was trained from"
        raise InputError(f"{failed}: {shapes}")
    if heads := [key for key in sorted(info["unexpected_keys"]) if HEADS.search(key)]:
        logger.warning(f"'{name}': its head is of another form and is not used: {', '.join(heads[:5])}")
    if unused := sorted(set(info["unexpected_keys"]) - set(heads)):
        logger.info(f"not used from the checkpoint: {', '.join(unused[:5])}{' ...' if len(unused) > 5 else ''}")
    for module in model.modules():  # 4-bit weights, which bitsandbytes would round in an evaluation on a CPU with bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, sorted(info["missing_keys"])


def _fit_to_tokenizer(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Add embeddings of new tokens, and set the pad token, by which transformers finds the end of a sequence."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


def _freeze(model: PreTrainedModel, trainable: str, new_modules: list[str]) -> None:
    """Train only the head, `new_modules`, and parameters in whose names the pattern `trainable` is found."""
    names = [name for name, _ in model.named_parameters()]
    with loading(f"trainable={trainable} is not a regular expression"):
        found = {name for name in names if re.search(trainable, name)}
    if not found:
        raise InputError(f"trainable={trainable} is found in no parameter name; there are {names[0]}, ..., {names[-1]}")
    for name, p in model.named_parameters():
        is_old = name.startswith(f"{model.base_model_prefix}.") and not set(name.split(".")) & set(new_modules)
        p.requires_grad_(name in found or not is_old)


def _disable_dropout(model: nn.Module) -> None:
    """Set dropout to 0: `p` of modules, and the float attributes that functional attention reads."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (isinstance(module, nn.Dropout) or "drop" in name):
                setattr(module, name, 0.0)


def load_saved_classifier(name: str, tokenizer: Tokenizer, config: RewardConfig, attention: str | None = None):
    """The saved model `name` as plain transformers or PEFT open it. Raises `InputError` if it has no trained head."""
    base, revision, adapter = find_base(name, config.model_revision)
    model, missing = _open(base, revision, config, attention, quantization_config(config) if adapter else None)
    if adapter is not None:
        _fit_to_tokenizer(model, tokenizer)
        return load_adapter(model, name, config.model_revision, is_trainable=False)
    if missing:
        raise InputError(f"'{name}' is not a trained reward model: it lacks {missing[0]}")
    return model


def load_saved_model(name: str, tokenizer: Tokenizer, config: RewardConfig) -> RewardModel:
    """The saved model `name`, as `rm.evaluate` and `rm.score` use it. Raises `InputError`."""
    model = RewardModel(load_saved_classifier(name, tokenizer, config, config.attn_implementation))
    use_tree_kernel(unwrapped(model.classifier), config.attn_implementation)
    return model


def merge_saved_adapter(name: str, tokenizer: Tokenizer, config: RewardConfig) -> PreTrainedModel:
    """The saved adapter `name`, merged into its base; a quantized base is first converted back to `dtype`."""
    model = load_saved_classifier(name, tokenizer, config)
    if quantization_config(config) is not None:
        base = model.unload().dequantize(dtype=None if config.dtype == "auto" else getattr(torch, config.dtype))
        vars(base.config).pop("quantization_config", None)
        model = load_adapter(base, name, config.model_revision, is_trainable=False)
    with loading("merge_adapter=True"):
        return model.merge_and_unload()


# ---------------------------------------------------------------- what a run recorded beside its model
def recorded_config(name: str, given: Mapping[str, Any]) -> RewardConfig:
    """The options of the run in the folder `name` (without one: defaults), overridden by the options `given`."""
    check_folder(name)
    file = Path(name) / "config.yaml"
    recorded = read_yaml(file) if file.is_file() else {}
    unset = ["chat_template_path", "model_revision"]  # saved with the tokenizer; the run's is that of its base
    if given.keys() & {"dataset_name", "eval_dataset_name"}:
        columns = [*COLUMN_OPTIONS, "margin_from_scores"]
        lost = [f"{name}={recorded[name]}" for name in columns if recorded.get(name) and name not in given]
        if lost and given.get("dataset_name") != "toy":  # which stands for no data
            logger.info(f"of the data of the run, not of these: {', '.join(lost)}; give them again if they hold here")
        names = "eval_fraction eval_dataset_name eval_dataset_config dataset_config dataset_weights max_eval_samples"
        unset += [*names.split(), *columns]
    if not torch.accelerator.is_available():
        unset += ["attn_implementation", "tf32"]  # the run may have had one
    recorded = {option: value for option, value in recorded.items() if option not in unset}
    return make_config(recorded | {"model_name_or_path": name} | given)


def conversations_from_text(config: RewardConfig, tokenizer: Tokenizer) -> tuple[bool, str]:
    """(whether a saved model reads text with a prompt as a conversation, a message that says so with the reason)."""
    is_conversation, reason = config.text_as_conversation, "text_as_conversation is set"
    if is_conversation is None:
        trained_on = str(read_result(config.model_name_or_path, "data", "train", "format") or "")
        if formats := set(trained_on.split(", ")) - {"tokenized", ""}:
            is_conversation = all(name.startswith("conversation") for name in formats)
            reason = f"the model was trained on {'conversations' if is_conversation else 'text'}"
        else:  # a model from elsewhere
            is_conversation = bool(tokenizer.chat_template)
            reason = f"the tokenizer has {'a' if is_conversation else 'no'} chat template"
        reason += "; text_as_conversation decides otherwise"
    kind = "conversations" if is_conversation else "text"
    return is_conversation, f"a prompt and answers that are text are scored as {kind}: {reason}"


def read_result(name: str, *keys: str) -> Any:
    """The value under `keys` in the results.json of the saved model `name`; None if there is none."""
    value: Any = read_json(Path(name) / "results.json")
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def sample_of(num_rows: int, num_samples: int, seed: int) -> np.ndarray:
    """The rows whose answers are scored for the scale, sorted: `num_samples` random ones (-1: all), by the seed."""
    order = np.random.default_rng([seed, num_rows]).permutation(num_rows)
    return np.sort(order if num_samples == -1 else order[:num_samples])


def reward_scale(rewards: np.ndarray) -> dict[str, float | int] | None:
    """Mean, population standard deviation and number of all rewards, of any shape; None if one is not finite."""
    values = np.asarray(rewards, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        return None
    return dict(zip(SCALE, (float(values.mean()), float(values.std()), values.size), strict=True))


def set_scale(config: PreTrainedConfig, scale: dict[str, float | int] | None) -> None:
    """Write the scale into the config of a model, or remove the scale of the model that training began with."""
    for key in SCALE:
        vars(config).pop(key, None)
    config.update(scale or {})


def read_scale(name: str, model: nn.Module) -> tuple[float, float]:
    """(mean, std) of training rewards, from config.json, or of an adapter from results.json. Raises `InputError`."""
    is_adapter = hasattr(model.classifier, "peft_config")
    found = (read_result(name, "normalization") or {}) if is_adapter else vars(model.config)
    mean, std = found.get("reward_mean"), found.get("reward_std")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (mean, std)) or std <= 0:
        fix = "(adapters: results.json); train it with num_normalization_samples, or score without normalize"
        raise InputError(f"'{name}' has no reward_mean and positive reward_std in its config.json {fix}")
    return mean, std
