"""Where a model comes from: a folder or a hub name, an adapter or a whole model, and what a run recorded beside it."""

import json
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from rm.config.cli import make_config, read_yaml
from rm.config.errors import InputError
from rm.config.files import read_json
from rm.config.options import RewardConfig
from rm.data.formats import ROLES

SCALE = ("reward_mean", "reward_std", "reward_answers")  # keys in config.json, and of "normalization" in results.json
TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")


def check_folder(name: str) -> None:
    """Raise `InputError` if `name` can only be a folder and does not exist; the hub would complain about its form."""
    is_path = Path(name).is_absolute() or name.startswith((".", "runs/")) or name.count("/") > 1 or Path(name).is_file()
    if is_path and not Path(name).is_dir():
        raise InputError(f"'{name}': there is no such folder; give a model's folder or its name on the hub")


def find_base(name: str, revision: str = "main") -> tuple[str, str, dict[str, Any] | None]:
    """(base model, its revision, adapter_config.json) of an adapter; (name, revision, None) of a whole model."""
    check_folder(name)
    with loading(f"no model could be loaded from '{name}'"):
        if (file := find_adapter_config_file(name, revision=revision)) is None:
            return name, revision, None
        adapter = json.loads(Path(file).read_text(encoding="utf-8"))
        base, base_revision = adapter.get("base_model_name_or_path"), adapter.get("revision") or "main"
    if not base or adapter.get("task_type") != "SEQ_CLS":
        needs = "its adapter_config.json needs task_type SEQ_CLS and base_model_name_or_path"
        raise InputError(f"'{name}' is an adapter without a reward head or without a base: {needs}")
    check_folder(base)
    return base, base_revision, adapter


def lacks(name: str, *patterns: str) -> bool:
    """Whether `name` is a folder without files that match `patterns`."""
    return Path(name).is_dir() and not any(list(Path(name).glob(pattern)) for pattern in patterns)


@contextmanager
def loading(message: str) -> Iterator[None]:
    """Turn an error of a library that reads files of the user into `InputError`: "message: reason", one line.

    A damaged file makes the libraries raise almost any exception: only their calls belong into the block.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if isinstance(error, SafetensorError):
            reason = f"its safetensors file is broken, download it again ({reason})"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "its weights are a pickle that is more than tensors, and was not run; weights must be safetensors"
        elif "Unrecognized configuration class" in str(error):
            kind = str(error).partition("'")[2].partition("'")[0].rpartition(".")[2].removesuffix("Config")
            reason = f"transformers has no sequence classifier for the architecture {kind}; give another model"
        elif "trust_remote_code" in str(error):
            reason = "it needs code of its own, which was not run; read it, then allow it with trust_remote_code=true"
        raise InputError(f"{message}: {reason}") from error


def recorded_config(name: str, given: Mapping[str, Any]) -> RewardConfig:
    """The options of the run in the folder `name` (without one: defaults), overridden by the options `given`."""
    check_folder(name)
    file = Path(name) / "config.yaml"
    recorded = read_yaml(file) if file.is_file() else {}
    unset = ["chat_template_path", "model_revision"]  # saved with the tokenizer; the run's is that of its base
    if given.keys() & {"dataset_name", "eval_dataset_name"}:
        unset += "eval_fraction eval_dataset_name eval_dataset_config dataset_config dataset_weights".split()
        unset += ["max_eval_samples", *(f"{role}_column" for role in ROLES)]
    if not torch.accelerator.is_available():
        unset += ["attn_implementation", "tf32"]  # the run may have had one
    recorded = {option: value for option, value in recorded.items() if option not in unset}
    return make_config(recorded | {"model_name_or_path": name} | given)


def conversations_from_text(config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, str]:
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
