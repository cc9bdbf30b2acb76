"""PEFT: a new adapter of any method on a sequence classifier, or an existing one."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedModel

from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.model.source import WEIGHT_FILES, in_one_line, lacks, loading

# options of the program (TRL's names): fields of PEFT's LoraConfig
LORA = {f"lora_{key}": key for key in ("r", "target_modules", "target_parameters", "modules_to_save")}
LORA |= {key: key for key in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")}
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT uses the old name
HEADS = {"classifier", "score"}  # PEFT adds them to modules_to_save for SEQ_CLS, again at every load


def new_adapter(model: PreTrainedModel, config: RewardConfig, new_modules: list[str]) -> nn.Module:
    """Wrap `model` in a new adapter, LoRA or the method of `peft_config`; head and `new_modules` train in full."""
    from peft import TaskType, get_peft_model

    if lacks(config.model_name_or_path, *WEIGHT_FILES):
        raise InputError(f"use_peft needs a model with weights to adapt; '{config.model_name_or_path}' has none")
    peft_config = lora_config(config) if config.peft_config is None else read_peft_config(config.peft_config)
    prefix = "lora_" if config.peft_config is None else f"peft_config={config.peft_config}: "
    peft_config.task_type, peft_config.inference_mode = TaskType.SEQ_CLS, False  # PEFT then trains and saves the head
    peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), *new_modules} - HEADS) or None
    modules, parameters = ([name for name, _ in named()] for named in (model.named_modules, model.named_parameters))
    names = {"modules_to_save": modules, "target_modules": modules, "target_parameters": parameters}
    for key, known in names.items():  # PEFT ignores names that it does not find
        asked = getattr(peft_config, key, None) or ()
        for target in () if isinstance(asked, str) else sorted(asked):
            if not any(f".{name}".endswith(f".{target}") for name in known):
                raise InputError(f"{prefix}{key}={sorted(asked)}: {type(model).__name__} has no '{target}'")
    with loading(f"{prefix}target_modules"):
        revision = None if config.model_revision == "main" else config.model_revision
        return get_peft_model(model, peft_config, revision=revision)


def load_adapter(model: PreTrainedModel, name: str, revision: str = "main", *, is_trainable: bool) -> nn.Module:
    """Load the adapter `name` and its head onto its base `model`. Raises `InputError` if it has no head."""
    from peft import PeftConfig, PeftModelForSequenceClassification

    message = f"the adapter '{name}' could not be loaded"
    with loading(message):
        peft_config = PeftConfig.from_pretrained(name, revision=revision)
    if peft_config.task_type != "SEQ_CLS":
        raise InputError(f"'{name}' is an adapter without a reward head (task_type {peft_config.task_type})")
    peft_config.modules_to_save = sorted(set(peft_config.modules_to_save or ()) - HEADS) or None
    options = dict(config=peft_config, is_trainable=is_trainable, revision=revision)
    with loading(message):
        return PeftModelForSequenceClassification.from_pretrained(model, name, **options)


def check_same_adapter(name: str, adapter: dict[str, Any], config: RewardConfig) -> None:
    """Raise `InputError` for a changed option that differs from the existing `adapter` (its adapter_config.json)."""
    if config.peft_config is not None:
        raise InputError(f"peft_config={config.peft_config}: '{name}' is an adapter with its own configuration")
    for option, key in LORA.items():
        given, own = getattr(config, option), adapter.get(key)
        names = [
            set([v] if isinstance(v, str) else v) - HEADS if isinstance(v, str | list) else v for v in (given, own)
        ]
        if given != getattr(RewardConfig(), option) and names[0] != names[1]:
            raise InputError(f"{option}={given}: the adapter '{name}' has {key}={own} and keeps it; leave it out")


def lora_config(config: RewardConfig):
    """PEFT's `LoraConfig` from the options in `LORA`."""
    from peft import LoraConfig

    values = {key: getattr(config, option) for option, key in LORA.items()}
    targets = values["target_modules"]
    if targets == ["all-linear"]:
        values["target_modules"] = "all-linear"
    elif isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        values["target_modules"] = [targets]  # one name; PEFT takes a string for a pattern of the whole path
    return LoraConfig(**values)


def read_peft_config(file: str):
    """The `PeftConfig` in a YAML or JSON file, written by hand ("peft_type: IA3") or by `PeftConfig.save_pretrained`.

    Raises `InputError`, also for methods that add tokens to the rows (prompt and prefix tuning) or need calls between
    steps (AdaLoRA). Base model and task in the file have no effect.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    where = f"peft_config={file}"
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{where} cannot be read: {in_one_line(error)}") from error
    if not isinstance(values, dict) or "peft_type" not in values:
        raise InputError(f"{where}: expected `key: value` lines, among them peft_type, such as LORA or IA3")
    kind = str(values.pop("peft_type")).upper()
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(f"{where}: peft_type is unknown; there are {', '.join(sorted(PEFT_TYPE_TO_CONFIG_MAPPING))}")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    is_in_layers = issubclass(tuner, BaseTuner) and tuner.forward is BaseTuner.forward
    if not is_in_layers or hasattr(tuner, "update_and_allocate"):
        fix = "use a method inside the layers, such as LORA, IA3, LOHA or VERA"
        raise InputError(f"{where}: peft_type {kind} adds tokens or calls outside the layers; {fix}")
    for key in ("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"):
        values.pop(key, None)
    for key, value in values.items():  # YAML reads 1e-5 as text, also in JSON
        if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value):
            values[key] = float(value)
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {in_one_line(error)}") from error


def adapter_settings(model: nn.Module) -> dict[str, Any] | None:
    """The configuration of the adapter on a sequence classifier, as JSON values; None without an adapter."""
    config = getattr(model, "peft_config", {}).get("default")
    as_json = json.dumps(config and config.to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    return json.loads(as_json)
