"""Post-hoc centering: the mean and spread of a trained model's rewards over answers of its training set.

They are kept beside the model and change nothing in it: who asks for normalised rewards gets (r - mean) / std.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rm.config.errors import InputError

SCALE = ("reward_mean", "reward_std", "reward_answers")  # keys in config.json, and of "normalization" in results.json


def sample_of(num_pairs: int, num_samples: int, seed: int) -> np.ndarray:
    """Which of `num_pairs` pairs the scale is taken from: `num_samples` random ones (-1: all), by the seed; sorted."""
    if num_samples == -1 or num_samples >= num_pairs:
        return np.arange(num_pairs)
    return np.sort(np.random.default_rng([seed, num_pairs]).permutation(num_pairs)[:num_samples])


def reward_scale(rewards: np.ndarray) -> dict[str, float | int] | None:
    """Mean and standard deviation (of the population) of all rewards, any shape, and how many; None if not finite."""
    values = np.asarray(rewards, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        return None
    return dict(zip(SCALE, (float(values.mean()), float(values.std()), values.size), strict=True))


def set_scale(config: Any, scale: dict[str, float | int] | None) -> None:
    """Write the scale into a model's config, or remove that of the model it was made from."""
    for key in SCALE:
        if scale is not None:
            setattr(config, key, scale[key])
        elif hasattr(config, key):
            delattr(config, key)


def read_scale(name: str, config: Any, *, is_adapter: bool) -> dict[str, float | int]:
    """The scale of the saved model `name`: from its config, or of an adapter, which has none, from results.json.

    Raises:
        InputError: there is none, or none to divide by.
    """
    values = {key: getattr(config, key, None) for key in SCALE}
    if is_adapter:
        try:
            values = json.loads((Path(name) / "results.json").read_text(encoding="utf-8"))["normalization"] or {}
        except (OSError, ValueError, KeyError, TypeError):
            values = {}
    mean, std, answers = (values.get(key) for key in SCALE)
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (mean, std)):
        where = "results.json" if is_adapter else "config.json"
        fix = "train it with num_normalization_samples, or score without normalize"
        raise InputError(f"'{name}' has no reward_mean and reward_std in its {where}; {fix}")
    if std <= 0:
        raise InputError(f"'{name}' has the same reward for all answers (reward_std {std}); score without normalize")
    return dict(zip(SCALE, (mean, std, answers), strict=True))
