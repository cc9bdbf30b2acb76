"""PEFT adapters on a sequence classifier, new or loaded, and the quantization of the base model to 4 or 8 bits."""

import re
import warnings
from pathlib import Path

import yaml
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from rm.config.errors import InputError
from rm.config.options import LoraOptions, RewardConfig
from rm.config.section import fields_of
from rm.data.tokenizer import WEIGHT_FILES, lacks, loading

warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT uses the deprecated name


def new_adapter(model: PreTrainedModel, config: RewardConfig, new_modules: list[str]) -> nn.Module:
    """Wrap `model` in a new adapter: LoRA, or the method of `peft_config`. Head and `new_modules` are fully trained."""
    from peft import TaskType, get_peft_model

    if lacks(config.model_name_or_path, *WEIGHT_FILES):
        raise InputError(f"use_peft needs a pretrained model; '{config.model_name_or_path}' has no weights")
    peft_config = lora_config(config) if config.peft_config is None else read_peft_config(config.peft_config)
    prefix = "lora_" if config.peft_config is None else f"peft_config={config.peft_config}: "
    peft_config.task_type, peft_config.inference_mode = TaskType.SEQ_CLS, False  # PEFT then trains and saves the head
    saved = {*(peft_config.modules_to_save or ()), *new_modules} - {"classifier", "score"}  # PEFT adds these itself
    peft_config.modules_to_save = sorted(saved) or None
    known = [f".{name}" for name, _ in (*model.named_modules(), *model.named_parameters())]
    for key in ("target_modules", "target_parameters", "modules_to_save"):  # PEFT ignores unknown names
        asked = getattr(peft_config, key, None) or ()
        for target in () if isinstance(asked, str) else sorted(asked):
            if not any(name.endswith(f".{target}") for name in known):
                raise InputError(f"{prefix}{key}={sorted(asked)}: {type(model).__name__} has no '{target}'")
    with loading(f"{prefix}target_modules"):
        return get_peft_model(model, peft_config, revision=config.model_revision)


def load_adapter(model: PreTrainedModel, name: str, revision: str, *, is_trainable: bool) -> nn.Module:
    """Load the adapter `name` and its head onto the base model `model`. Raises `InputError`."""
    from peft import PeftModelForSequenceClassification

    options = dict(revision=revision, is_trainable=is_trainable)
    with loading(f"'{name}' could not be loaded as a reward model"):
        return PeftModelForSequenceClassification.from_pretrained(model, name, **options)


def lora_config(config: RewardConfig):
    """The `LoraConfig` of PEFT from `LoraOptions`, whose names are those of TRL."""
    from peft import LoraConfig

    given = {name: getattr(config, name) for name in fields_of(LoraOptions)}
    kept = ("lora_alpha", "lora_dropout")  # PEFT has the prefix too
    values = {name if name in kept else name.removeprefix("lora_"): value for name, value in given.items()}
    targets = values["target_modules"]
    if targets == ["all-linear"]:
        values["target_modules"] = "all-linear"
    elif isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        values["target_modules"] = [targets]  # one name: PEFT would match a string with whole paths
    return LoraConfig(**values)


def read_peft_config(file: str):
    """The `PeftConfig` in a YAML or JSON file, written by hand ("peft_type: IA3") or by `PeftConfig.save_pretrained`.

    Base model and task in the file have no effect. Raises `InputError`. Methods that add tokens (prompt and prefix
    tuning) and methods that need a call after every step (AdaLoRA) are not supported.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    where, methods = f"peft_config={file}", []
    for method, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        is_in_layers = issubclass(tuner, BaseTuner) and tuner.forward is BaseTuner.forward
        if is_in_layers and not hasattr(tuner, "update_and_allocate"):
            methods.append(method.value)
    with loading(f"{where} cannot be read"):
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    kind = str(values.get("peft_type")).upper() if isinstance(values, dict) else ""
    if kind not in methods:
        raise InputError(f"{where}: needs `peft_type: METHOD`; supported methods: {', '.join(sorted(methods))}")
    for key, value in values.items():  # YAML reads 1e-5 as text, even in a JSON file
        if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value):
            values[key] = float(value)
    values |= {"peft_type": kind} | dict.fromkeys(("base_model_name_or_path", "revision", "auto_mapping"))
    with loading(where):
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**values)


def quantization_config(config: RewardConfig) -> BitsAndBytesConfig | None:
    """Quantization without the head, as in `trl.get_quantization_config`; None unless load_in_4bit or load_in_8bit."""
    # needs no `prepare_model_for_kbit_training`: PEFT freezes the base; `dtype` is the type of norms and embeddings
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    same = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage")
    return BitsAndBytesConfig(
        bnb_4bit_compute_dtype="float32" if config.dtype == "auto" else config.dtype,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        llm_int8_skip_modules=["score", "classifier", "classification_head", "pooler"],  # may be newly initialized
        **{name: getattr(config, name) for name in same},
    )
