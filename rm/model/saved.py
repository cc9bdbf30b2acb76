"""A saved reward model, as `python -m rm.evaluate` and `python -m rm.score` open it: with the options of its run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_torch_tf32_available

from rm.config.cli import parse_config, read_yaml, split_arguments
from rm.config.options import RewardConfig
from rm.model.adapters import load_trained
from rm.model.load import check_folder, find_adapter
from rm.model.quantization import QUANTIZATION_OPTIONS, quantization_config
from rm.model.reward_model import RewardModel, use_cpu_kernel

RENDERED = "a prompt and answers that are text are scored as %s: %s"


def recorded_config(name: str, rest: Sequence[str]) -> RewardConfig:
    """The options of the run in the folder `name` (defaults, if it is none), and over them those of a command line."""
    check_folder(name)
    files, values = split_arguments(list(rest))
    chosen = set(values).union(*map(read_yaml, files))
    recorded = Path(name) / "config.yaml"
    base = ["--config", str(recorded)] if recorded.is_file() else []
    if chosen & {"dataset_name", "eval_dataset_name"}:
        others = "eval_fraction eval_dataset_name eval_dataset_config dataset_config dataset_weights max_eval_samples"
        base += [f"{option}=none" for option in others.split() if option not in chosen]
    if not is_torch_tf32_available():  # which the run may have had
        base += ["tf32=none"]
    return parse_config([*base, f"model_name_or_path={name}", *rest])


def load_saved(config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[RewardModel, float]:
    """The model that a run saved as `model_name_or_path`, and the tolerance with which its layouts can agree."""
    name = config.model_name_or_path
    options = {option: getattr(config, option) for option in QUANTIZATION_OPTIONS}
    # what was merged is not quantised any more
    quantization = quantization_config(**options) if find_adapter(name) is not None else None
    options = dict(trust_remote_code=config.trust_remote_code, quantization_config=quantization)
    model = RewardModel(load_trained(name, tokenizer, dtype=config.dtype, **options))
    use_cpu_kernel(model.bare)
    is_half = config.mixed_precision not in (None, "no") or quantization is not None or bool(config.tf32)
    is_half |= next(model.classifier.parameters()).dtype != torch.float32
    return model, 5e-2 if is_half else 1e-4


def conversations_from_text(config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, str]:
    """Whether text with a prompt is made a conversation to evaluate a saved model, and why; the option first."""
    if config.text_as_conversation is not None:
        return config.text_as_conversation, f"text_as_conversation={str(config.text_as_conversation).lower()}"
    try:
        results = json.loads((Path(config.model_name_or_path) / "results.json").read_text(encoding="utf-8"))
        formats = set(results["data"]["train"]["format"].split(", ")) - {"tokenized"}
    except (OSError, ValueError, TypeError, KeyError):  # a model from elsewhere
        formats = set()
    if not formats:
        has_template = bool(tokenizer.chat_template)
        return (
            has_template,
            f"the tokenizer has {'a' if has_template else 'no'} chat template; text_as_conversation decides otherwise",
        )
    was_trained_so = all(name.startswith("conversation") for name in formats)
    kind = "conversations" if was_trained_so else "text"
    return was_trained_so, f"the model was trained on {kind}; text_as_conversation decides otherwise"
