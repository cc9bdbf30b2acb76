"""PEFT: an adapter of any method on a sequence classifier, made, continued, merged into it, or loaded again."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rm.config.errors import InputError
from rm.model.load import check_folder, find_adapter, has_no_weights, in_one_line, load_classifier, why
from rm.model.quantization import keep_weights, without_quantization
from rm.model.reward_model import NUM_OUTPUTS, find_head

logger = logging.getLogger(__name__)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks for it by its old name

# options of the program, which are TRL's, and what PEFT's LoraConfig calls them
LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
HEADS = ("classifier", "score")  # which PEFT adds to modules_to_save for SEQ_CLS, again at every load


def load_trainable(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    use_peft: bool = False,
    lora: dict[str, Any],
    given: Collection[str] = (),
    peft_config: str | None = None,
    revision: str = "main",
    **loading,
) -> nn.Module:
    """The model that a run trains: `load_classifier`'s, perhaps in a new adapter, or what an adapter folder means.

    An adapter as `name` is continued with `use_peft`: it and its head are trained further, over the same base, with the
    adapter's own configuration. Without `use_peft` it is merged into its base and all weights are trained: what is
    asked for is a training of all weights that starts at this reward model, and merging changes none of its rewards.

    Args:
        lora: the values of the options in `LORA`; of them `given` were set by the user.
        peft_config: a JSON or YAML file with the configuration of another method, instead of LoRA.
        loading: of `load_classifier`.

    Raises:
        InputError: one line; also for a given option that an existing adapter contradicts.
    """
    adapter = find_adapter(name, revision)
    if adapter is None:
        model = load_classifier(name, tokenizer, revision=revision, **loading)
        if not use_peft:
            return model
        config = lora_config(lora) if peft_config is None else read_peft_config(peft_config)
        return add_adapter(model, config, revision, peft_config or "lora_target_modules")

    base = adapter.get("base_model_name_or_path")
    if not base:
        raise InputError(f"'{name}' is an adapter that does not name its base: set base_model_name_or_path in it")
    if peft_config is not None:
        raise InputError(f"peft_config={peft_config}: '{name}' is an adapter with its own configuration; leave it out")
    for option in given:
        own = adapter.get(LORA[option])
        if _as_names(own) != _as_names(lora[option]):
            had = f"has {LORA[option]}={own}" if LORA[option] in adapter else f"is {adapter.get('peft_type')}"
            raise InputError(f"{option}={lora[option]}: the adapter '{name}' {had}, and keeps it; leave the option out")
    model = load_classifier(base, tokenizer, revision=adapter.get("revision") or "main", **loading)
    adapted = load_adapter(model, name, revision, is_trainable=use_peft)
    if use_peft:
        logger.info(f"adapter: '{name}' ({adapter.get('peft_type')}) over '{base}' is trained further")
        return adapted
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise InputError(
            f"'{name}': {adapter.get('peft_type')} cannot be merged; set use_peft=true to train it further"
        )
    logger.info(f"adapter: '{name}' is merged into '{base}', of which all weights are trained (use_peft is false)")
    merged = adapted.merge_and_unload()
    merged.requires_grad_(True)
    return merged


def _as_names(value: Any) -> Any:
    """One name or several as a set, without the heads that PEFT adds; other values as they are."""
    names = [value] if isinstance(value, str) else value
    return set(names) - set(HEADS) if isinstance(names, list) else names


# ---------------------------------------------------------------------------------------------- a new one


def lora_config(lora: dict[str, Any]):
    """PEFT's `LoraConfig` from the options in `LORA`."""
    from peft import LoraConfig

    values = {LORA[option]: value for option, value in lora.items()}
    wanted = values.get("target_modules")
    if wanted == ["all-linear"]:
        values["target_modules"] = "all-linear"
    elif isinstance(wanted, str) and re.fullmatch(r"[\w.]+", wanted):
        values["target_modules"] = [wanted]  # one name; PEFT takes a string for a pattern of the whole path
    return LoraConfig(**values)


def read_peft_config(file: str):
    """The `PeftConfig` of a JSON or YAML file, as `PeftConfig.save_pretrained` writes it or by hand ("peft_type: IA3").

    The base model and the task that stand in it do not count: they are the run's. Raises `InputError` with file and
    key, also for methods that act outside the layers: those add tokens to the rows (prompt and prefix tuning), whose
    positions and masks are ours, or want calls between steps (AdaLoRA).
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    where = f"peft_config={file}"
    try:
        text = Path(file).read_text(encoding="utf-8")
        values = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{where} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or "peft_type" not in values:
        raise InputError(f"{where}: expected `key: value` lines, among them peft_type, such as LORA or IA3")
    kinds = {kind.value: kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    kind = kinds.get(str(values.pop("peft_type")).upper())
    if kind is None:
        raise InputError(f"{where}: peft_type is unknown to this PEFT; there are {', '.join(sorted(kinds))}")
    tuner, config_class = PEFT_TYPE_TO_TUNER_MAPPING[kind], PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    acts_in_layers = issubclass(tuner, BaseTuner) and tuner.forward is BaseTuner.forward
    if not acts_in_layers or hasattr(tuner, "update_and_allocate"):
        fix = "use one that acts inside them, such as LORA, IA3, LOHA or VERA"
        raise InputError(f"{where}: peft_type {kind.value} adds tokens or calls outside the layers; {fix}")
    for ours in ("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"):
        values.pop(ours, None)
    names = [field.name for field in dataclasses.fields(config_class) if field.init]
    for key, value in values.items():
        if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value):
            raise InputError(f"{where}: {key}={value} is text in YAML; write it with a point, as 1.0e-5")
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise InputError(
                f"{where}: {kind.value} has no key '{key}'" + (f"; did you mean {near[0]}?" if near else "")
            )
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {in_one_line(error)}") from None


def add_adapter(model: PreTrainedModel, config, revision: str = "main", origin: str = "peft_config") -> nn.Module:
    """Wrap `model` in a new adapter whose head is trained in full, as are the modules that its checkpoint lacks.

    The task is always `SEQ_CLS`, by which PEFT trains and saves the head. `origin`: the option at fault if the adapter
    does not fit the model.
    """
    from peft import TaskType, get_peft_model

    if has_no_weights(model.config._name_or_path):
        raise InputError(f"use_peft needs a model with weights to adapt; '{model.config._name_or_path}' has none")
    config.task_type, config.inference_mode = TaskType.SEQ_CLS, False
    config.modules_to_save = _without_heads([*(config.modules_to_save or []), *model.drawn_modules])
    present = {part for name, _ in model.named_modules() for part in (name, name.rpartition(".")[2])}
    if unknown := [module for module in config.modules_to_save or () if module not in present]:
        key = "lora_modules_to_save" if origin == "lora_target_modules" else f"peft_config={origin}: modules_to_save"
        raise InputError(f"{key}: {type(model).__name__} has no module '{unknown[0]}'")
    for option, names in (  # PEFT leaves out what it does not find
        ("target_modules", [name for name, _ in model.named_modules()]),
        ("target_parameters", [name for name, _ in model.named_parameters()]),
    ):
        asked = getattr(config, option, None) or ()
        for target in () if isinstance(asked, str) else sorted(asked):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                key = f"lora_{option}" if origin == "lora_target_modules" else f"peft_config={origin}: {option}"
                raise InputError(f"{key}={sorted(asked)}: {type(model).__name__} has no '{target}'")
    wanted = getattr(config, "target_modules", None)
    wanted = sorted(wanted) if isinstance(wanted, set) else wanted
    try:
        adapted = get_peft_model(model, config, revision=None if revision == "main" else revision)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        value = f"{origin}={wanted!r}" if origin == "lora_target_modules" else f"peft_config={origin}"
        raise InputError(f"{value}: {in_one_line(error)}") from None
    return _with_trained_head(adapted)


# ---------------------------------------------------------------------------------------------- an existing one


def load_adapter(model: PreTrainedModel, name: str, revision: str = "main", *, is_trainable: bool) -> nn.Module:
    """Put the adapter `name` and its head on `model`, its base. Raises `InputError` if it holds no head."""
    from peft import PeftConfig, PeftModelForSequenceClassification, TaskType
    from peft.utils import load_peft_weights

    hub = {} if revision == "main" else {"revision": revision}
    try:
        config = PeftConfig.from_pretrained(name, **hub)
        weights = load_peft_weights(name, device="cpu", **hub)
        if not any(f".{head}." in key for head in HEADS for key in weights):
            raise InputError(f"'{name}' is an adapter without a reward head (task_type {config.task_type})")
        config.task_type = TaskType.SEQ_CLS
        config.modules_to_save = _without_heads(config.modules_to_save or [])
        options = dict(config=config, is_trainable=is_trainable, **hub)
        adapted = PeftModelForSequenceClassification.from_pretrained(model, name, **options)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the adapter '{name}' could not be loaded: {why(name, error)}") from None
    return _with_trained_head(adapted) if is_trainable else adapted


def load_trained(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quantization_config=None,
) -> nn.Module:
    """What a run saved, as plain transformers or PEFT load it: a sequence classifier, or a PEFT model of an adapter.

    An adapter holds neither the pad token, by which transformers finds a sequence's last token, nor the type of the
    weights under it: the first is set from `tokenizer`, the second is `dtype` and `quantization_config`, those of the
    training. Raises `InputError` if the model has no trained reward head.
    """
    options = dict(dtype=dtype, trust_remote_code=trust_remote_code)
    check_folder(name)
    try:
        if (adapter := find_adapter(name)) is not None:
            check_folder(adapter.get("base_model_name_or_path") or name)
            from peft import AutoPeftModelForSequenceClassification

            if quantization_config is not None:
                options["quantization_config"] = quantization_config
            model = AutoPeftModelForSequenceClassification.from_pretrained(name, num_labels=NUM_OUTPUTS, **options)
            keep_weights(model)
            model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
            return model
        options["output_loading_info"] = True
        model, info = AutoModelForSequenceClassification.from_pretrained(name, **options)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"'{name}' could not be loaded as a reward model: {why(name, error)}") from None
    if info["missing_keys"] or model.config.num_labels != NUM_OUTPUTS:
        raise InputError(f"'{name}' is not a trained reward model: it has no head with one output")
    return model


def merge_trained(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quantization_config=None,
) -> PreTrainedModel:
    """The adapter `name` that a run saved, merged into its base: a plain sequence classifier.

    After a quantised run the base is what the run computed with: its quantised weights, turned back into `dtype`.
    """
    options = dict(dtype=dtype, trust_remote_code=trust_remote_code, quantization_config=quantization_config)
    trained = load_trained(name, tokenizer, **options)
    if not hasattr(trained.base_model, "merge_and_unload"):
        raise InputError(f"merge_adapter=True: {type(trained.base_model).__name__} cannot be merged; leave it out")
    if quantization_config is None:
        return trained.merge_and_unload()
    base = without_quantization(trained.unload(), None if dtype == "auto" else getattr(torch, dtype))
    return load_adapter(base, name, is_trainable=False).merge_and_unload()


def adapter_settings(model: nn.Module) -> dict[str, Any] | None:
    """The configuration of the adapter on a sequence classifier, as JSON takes it; None if there is none."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return None
    return json.loads(json.dumps(config.to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


def _without_heads(modules: list[str]) -> list[str] | None:
    return [module for module in dict.fromkeys(modules) if module not in HEADS] or None


def _with_trained_head(adapted: nn.Module) -> nn.Module:
    if not find_head(adapted.get_base_model()).weight.requires_grad:
        raise InputError("the reward head is not trainable under this adapter")
    return adapted
