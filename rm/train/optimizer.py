"""Optimizer and learning-rate schedule, by transformers' names, on parameter groups of a reward model.

Neither is wrapped or registered anywhere: another optimizer is one more line in `OPTIMIZERS`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler
from transformers.optimization import Adafactor

from rm.config.errors import InputError
from rm.model.reward_model import find_head

# name -> (class, arguments that transformers gives it)
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
    "adamw_torch": (torch.optim.AdamW, {}),
    "adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}),
    "sgd": (torch.optim.SGD, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
}
FOLLOW_A_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that are stepped by evaluations, not by steps


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, head_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """The trained weights of a `RewardModel` as groups: backbone before head, and in each matrices before the rest.

    Only matrices decay; biases and the weights of norms, which have one dimension, do not. A group without weights is
    left out. The head is a group of its own if it has a learning rate of its own.
    """
    head = {id(p) for p in find_head(model.bare).parameters()} if head_learning_rate is not None else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = []
    for is_head, lr in ((False, learning_rate), (True, head_learning_rate)):
        members = [p for p in trained if (id(p) in head) == is_head]
        for is_matrix, decay in ((True, weight_decay), (False, 0.0)):
            params = [p for p in members if (p.ndim >= 2) == is_matrix]
            groups += [{"params": params, "lr": lr, "weight_decay": decay}] if params else []
    return groups


def make_optimizer(
    groups: list[dict[str, Any]],
    *,
    optim: str = "adamw_torch_fused",
    optim_args: dict[str, Any] | None = None,
    learning_rate: float = 1e-4,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    """The optimizer `optim` on parameter groups; `optim_args` are keyword arguments of its class.

    Raises `InputError`: an argument that the class does not take, or a value that it refuses.
    """
    make, options = OPTIMIZERS[optim]
    if make is torch.optim.AdamW:
        options = options | {"betas": (adam_beta1, adam_beta2), "eps": adam_epsilon}
    known = list(inspect.signature(make).parameters)[1:]  # the first are the weights
    for name in optim_args or {}:
        if name not in known or name in ("lr", "weight_decay"):
            rest = ", ".join(other for other in known if other not in ("lr", "weight_decay"))
            raise InputError(f"optim_args: {optim} takes no {name!r} here; it takes {rest}")
    options = options | (optim_args or {})
    try:
        trial = nn.Parameter(torch.zeros(2, 2))  # most classes look at their arguments in the first step only
        trial.grad = torch.ones_like(trial)
        make([trial], lr=learning_rate, **options).step()
        return make(groups, lr=learning_rate, **options)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        cause = f"{error}".splitlines()[0]
        raise InputError(f"optim_args={optim_args} does not suit {optim}: {cause}") from None


def make_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    warmup_ratio: float = 0.0,
    warmup_steps: float = 0,
    kwargs: dict[str, Any] | None = None,
    greater_is_better: bool = False,
    steps_done: int = 0,
    state: dict[str, Any] | None = None,
):
    """The schedule `name` of transformers, after `steps_done` steps. Not to be prepared: Accelerate steps it once per
    process.

    Args:
        warmup_steps: below 1 it is a ratio, as in transformers.
        kwargs: what that schedule takes besides.
        greater_is_better: for the schedules in `FOLLOW_A_METRIC`, whether more of the metric is better.
        state: for these, their `state_dict` after those steps; the others are functions of the step.

    Raises `InputError`: the schedule does not take `kwargs`.
    """
    kwargs = dict(kwargs or {})
    if name in FOLLOW_A_METRIC:
        kwargs = {"mode": "max" if greater_is_better else "min"} | kwargs
    elif name in ("constant", "constant_with_warmup") and kwargs:  # transformers drops them in silence
        raise InputError(f"lr_scheduler_kwargs={kwargs}: lr_scheduler_type={name} takes none")
    fraction = warmup_steps if 0 < warmup_steps < 1 else warmup_ratio
    warmup = int(warmup_steps) or math.ceil(fraction * total_steps)
    try:
        scheduler = get_scheduler(name, optimizer, warmup, total_steps, kwargs)
        with warnings.catch_warnings(action="ignore"):  # "scheduler.step() before optimizer.step()"
            for _ in range(0 if name in FOLLOW_A_METRIC else steps_done):
                scheduler.step()
            if name in FOLLOW_A_METRIC:  # which look at their arguments at the first evaluation
                rates = [{"params": [torch.zeros(1)], "lr": group["lr"]} for group in optimizer.param_groups]
                trial = get_scheduler(name, torch.optim.SGD(rates), warmup, total_steps, kwargs)
                for value in (0.0, math.nan):  # better, and not
                    trial.step(value)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"lr_scheduler_kwargs={kwargs or None}: {error}") from None
    if name in FOLLOW_A_METRIC and state is not None:
        scheduler.load_state_dict(state)
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
    return scheduler
