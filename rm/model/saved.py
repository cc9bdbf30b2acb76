"""What a run recorded beside its saved model: its options, the form of its training data, the scale of its rewards.

The scale is mean and standard deviation of the rewards of training answers: a normalized reward is (r - mean) / std.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_torch_tf32_available

from rm.config.cli import make_config, read_yaml
from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.model.reward_model import RewardModel
from rm.model.source import check_folder

SCALE = ("reward_mean", "reward_std", "reward_answers")  # keys in config.json, and of "normalization" in results.json
RENDERED = "a prompt and answers that are text are scored as %s: %s"


def recorded_config(name: str, given: Mapping[str, Any]) -> RewardConfig:
    """The options of the run in the folder `name` (without one: defaults), overridden by the options `given`."""
    check_folder(name)
    file = Path(name) / "config.yaml"
    recorded = read_yaml(file) if file.is_file() else {}
    unset = ["chat_template_path", "model_revision"]  # saved with the tokenizer; the run's is that of its base
    if given.keys() & {"dataset_name", "eval_dataset_name"}:
        unset += "eval_fraction eval_dataset_name eval_dataset_config dataset_config dataset_weights".split()
        unset += ["max_eval_samples"]
    if not torch.accelerator.is_available():  # the run may have had one
        unset += ["attn_implementation"]
    if not is_torch_tf32_available():
        unset += ["tf32"]
    recorded = {option: value for option, value in recorded.items() if option not in unset}
    return make_config(recorded | {"model_name_or_path": name} | given)


def conversations_from_text(config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, str]:
    """(whether a saved model reads text with a prompt as a conversation, the reason in words)."""
    if config.text_as_conversation is not None:
        return config.text_as_conversation, f"text_as_conversation={str(config.text_as_conversation).lower()}"
    trained_on = str(read_result(config.model_name_or_path, "data", "train", "format") or "")
    if formats := set(trained_on.split(", ")) - {"tokenized", ""}:
        is_conversation = all(name.startswith("conversation") for name in formats)
        reason = f"the model was trained on {'conversations' if is_conversation else 'text'}"
    else:  # a model from elsewhere
        is_conversation = bool(tokenizer.chat_template)
        reason = f"the tokenizer has {'a' if is_conversation else 'no'} chat template"
    return is_conversation, f"{reason}; text_as_conversation decides otherwise"


def read_result(name: str, *keys: str) -> Any:
    """The value under `keys` in the results.json of the saved model `name`; None if there is none."""
    try:
        value = json.loads((Path(name) / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
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


def read_scale(name: str, model: RewardModel) -> dict[str, float | int]:
    """The scale of the saved `model`: from its config.json, of an adapter from results.json. Raises `InputError`."""
    scale, file = {key: getattr(model.config, key, None) for key in SCALE}, "config.json"
    if hasattr(model.classifier, "peft_config"):
        scale, file = {key: read_result(name, "normalization", key) for key in SCALE}, "results.json"
    mean, std = scale["reward_mean"], scale["reward_std"]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (mean, std)) or std <= 0:
        fix = "train it with num_normalization_samples, or score without normalize"
        raise InputError(f"'{name}' has no reward_mean and positive reward_std in its {file}; {fix}")
    return scale
