"""Optimizer and learning-rate schedule. To add an optimizer: `OPTIMIZERS`, and `Optimizer` in rm/config/options.py."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import get_scheduler
from transformers.optimization import Adafactor

from rm.config.errors import InputError
from rm.config.options import FOLLOW_EVALUATIONS, RewardConfig
from rm.model.reward_model import RewardModel, find_head

# name -> (class, arguments that transformers passes to it)
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
    "adamw_torch": (torch.optim.AdamW, {}),
    "adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}),
    "sgd": (torch.optim.SGD, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


def parameter_groups(model: RewardModel, config: RewardConfig) -> list[dict[str, Any]]:
    """The trained parameters in groups: backbone before head; in each of them, matrices before vectors.

    Weight decay applies to matrices only, not to biases and norm weights. The head has separate groups only if it has
    its own learning rate.
    """
    has_own_rate = config.head_learning_rate is not None
    head = {id(p) for p in find_head(model.classifier).parameters()} if has_own_rate else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = []
    for is_head, lr in ((False, config.learning_rate), (True, config.head_learning_rate)):
        for is_matrix, decay in ((True, config.weight_decay), (False, 0.0)):
            params = [p for p in trained if (id(p) in head, p.ndim >= 2) == (is_head, is_matrix)]
            groups += [{"params": params, "lr": lr, "weight_decay": decay}] if params else []
    return groups


def make_optimizer(model: RewardModel, config: RewardConfig) -> torch.optim.Optimizer:
    """The optimizer `config.optim` with the arguments `optim_args`. Raises `InputError` for unknown arguments."""
    make, options = OPTIMIZERS[config.optim]
    if make is torch.optim.AdamW:
        options = options | {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    own = ("params", "lr", "weight_decay")  # set by other options
    known = [name for name in inspect.signature(make).parameters if name not in own]
    for name in config.optim_args or {}:
        if name not in known:
            raise InputError(f"optim_args: {config.optim} takes no {name!r} here; it takes {', '.join(known)}")
    groups, options = parameter_groups(model, config), options | (config.optim_args or {})
    try:
        return make(groups, lr=config.learning_rate, **options)
    except (TypeError, ValueError) as error:  # raised by torch for wrong values
        raise InputError(f"optim_args={config.optim_args}: {error}") from None


def make_scheduler(
    optimizer: torch.optim.Optimizer, total_steps: int, config: RewardConfig, greater_is_better: bool
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule `config.lr_scheduler_type`. `greater_is_better`: direction of the metric that the schedule follows.

    Do not pass it to `accelerator.prepare`: Accelerate would step it once per process.
    Raises `InputError` for unknown `lr_scheduler_kwargs`.
    """
    name, kwargs = config.lr_scheduler_type, dict(config.lr_scheduler_kwargs or {})
    if name in FOLLOW_EVALUATIONS:
        kwargs = {"mode": "max" if greater_is_better else "min"} | kwargs
    elif name in ("constant", "constant_with_warmup") and kwargs:  # transformers ignores them
        raise InputError(f"lr_scheduler_kwargs={kwargs}: lr_scheduler_type={name} takes no arguments")
    ratio = config.warmup_steps if 0 < config.warmup_steps < 1 else config.warmup_ratio
    warmup = int(config.warmup_steps) or math.ceil(ratio * total_steps)
    try:
        return get_scheduler(name, optimizer, warmup, total_steps, kwargs)
    except (TypeError, ValueError) as error:  # raised by transformers for unknown or wrong arguments
        raise InputError(f"lr_scheduler_kwargs={kwargs or None}: {error}") from None
