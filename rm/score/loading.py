"""A saved reward model, ready to score, by its folder."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch

from rm.config.errors import InputError
from rm.model.load import find_adapter, load_tokenizer
from rm.model.normalization import read_scale
from rm.model.precision import set_tf32
from rm.model.quantization import QUANTIZATION_OPTIONS
from rm.model.saved import RENDERED, conversations_from_text, load_saved, recorded_config
from rm.score.scorer import Scorer

logger = logging.getLogger(__name__)

# of RewardConfig's options those that act here; what is not given is as in training
OPTIONS = [
    *("max_length overlength add_eos text_as_conversation chat_template_kwargs micro_batch_tokens".split()),
    *("layout mixed_precision eval_dtype tf32 trust_remote_code".split()),
    *QUANTIZATION_OPTIONS,
]


def load_scorer(model: str, *, normalize: bool = False, **options: Any) -> Scorer:
    """A saved reward model, ready to score: `load_scorer("runs/my_run").rewards([{"prompt": …, "responses": […]}])`.

    The rewards are those of `rm.evaluate`: what the run's own config.yaml says decides (of a model from elsewhere:
    the defaults), on the accelerator if there is one.

    Args:
        model: the output folder of a run, or a hub name.
        normalize: give (r - mean) / std, over answers of the training set.
        options: of `RewardConfig`, those in `OPTIONS`. `max_length` is no limit unless it is given here, and
            `micro_batch_tokens` twice the training's, or its `eval_micro_batch_tokens`.

    Raises:
        InputError, InputError, InputError: one line.
    """
    for name in options:
        if name not in OPTIONS:
            raise InputError(f"{name}: cannot act in scoring; there are {', '.join(OPTIONS)}")
    model = str(model)
    given = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]
    config = recorded_config(model, ["dataset_name=toy", *given])  # no data set is read
    set_tf32(config.tf32)
    tokenizer = load_tokenizer(model, trust_remote_code=config.trust_remote_code)
    saved, tolerance = load_saved(config, tokenizer)
    as_conversation, why = conversations_from_text(config, tokenizer)
    if tokenizer.chat_template:
        logger.info(RENDERED, "conversations" if as_conversation else "text", why)
    scale = read_scale(model, saved.config, is_adapter=find_adapter(model) is not None) if normalize else None
    has_accelerator = torch.accelerator.is_available()
    budget = config.eval_micro_batch_tokens or 2 * config.micro_batch_tokens
    return Scorer(
        saved,
        tokenizer,
        device=torch.accelerator.current_accelerator() if has_accelerator else torch.device("cpu"),
        layout=config.layout,
        tolerance=tolerance,
        micro_batch_tokens=config.micro_batch_tokens if "micro_batch_tokens" in options else budget,
        autocast={"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision),
        weights=config.eval_dtype,
        scale=scale and (scale["reward_mean"], scale["reward_std"]),
        add_eos=config.add_eos,
        text_as_conversation=as_conversation,
        chat_template_kwargs=config.chat_template_kwargs,
        max_length=config.max_length if "max_length" in options else None,
        overlength=config.overlength if "overlength" in options else "drop",
    )
