"""What a run recorded beside its model: options, results, and the scale of its rewards."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from rm.config.cli import make_config, read_yaml
from rm.config.errors import InputError
from rm.config.files import read_json
from rm.config.options import RewardConfig
from rm.data.formats import COLUMN_OPTIONS
from rm.data.tokenizer import check_folder

logger = logging.getLogger(__name__)

SCALE = ("reward_mean", "reward_std", "reward_answers")  # keys in config.json, and of "normalization" in results.json


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
