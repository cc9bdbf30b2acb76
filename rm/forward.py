"""The forward pass: rewards of all answers of a batch, and the concatenated chosen+rejected forward pass.

Shape suffixes: N answers, C comparisons, K outputs of the head, R rows, L tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor, nn

from rm.collate import Batch, collate_trees
from rm.config.errors import InputError
from rm.data.plan import Layout, MicroBatch
from rm.model.attention import TreesNotPassed, attends_by_tree, attention_mask, mask_problem
from rm.model.reward_model import unwrapped

NUM_VERIFIED = 4  # prompts on which the layout is verified


def score_batch(model: nn.Module, batch: Batch) -> Tensor:
    """Rewards of all answers, float32 [N], prompt by prompt: the first output of the head.

    `model`: a `RewardModel`, prepared or not.
    """
    return forward_batch(model, batch)[:, 0]


def forward_batch(model: nn.Module, batch: Batch) -> Tensor:
    """All outputs of the head at the end of every sequence, float32 [N, K]."""
    reward_model = unwrapped(model)
    packed = {"position_ids": batch.position_RL} if batch.is_packed else {}
    if attends_by_tree(model) and batch.tree_lengths:
        packed["tree_lengths"] = batch.tree_lengths
    return model(
        input_ids=batch.input_ids_RL,
        attention_mask=attention_mask(reward_model.config, batch, unwrapped(reward_model.classifier).dtype),
        end_row=batch.end_row_N,
        end_index=batch.end_index_N,
        **packed,
    )


def concatenated_forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Rewards of all comparisons from one forward pass: (chosen_C, rejected_C), float32 [C] each.

    The rows hold chosen and rejected sequences one below the other (`concatenated`), or trees in which the prompt is
    computed once and each answer once (`shared_prefix`). Both give the same rewards and the same gradients.
    """
    rewards_N = score_batch(model, batch)
    return rewards_N[batch.chosen_C], rewards_N[batch.rejected_C]


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Remove the autocast that Accelerate adds to `forward`: its rounding would hide or imitate a difference.

    Half-precision weights and the casts of FSDP or DeepSpeed stay as they are.
    """
    reward_model = unwrapped(model)
    forward = reward_model.forward
    reward_model.forward = getattr(reward_model, "_original_forward", forward)
    try:
        yield
    finally:
        reward_model.forward = forward


# ---------------------------------------------------------------- which layout


def choose_layout(name: str, model: nn.Module, data: Any, pad_token_id: int, tolerance: float = 1e-4) -> Layout:
    """The layout for `model`: "auto" is `shared_prefix` where a model supports it, verified on a few prompts of `data`.

    Scores the prompts in both layouts without autocast. Collective under FSDP: every process must call it.

    Args:
        name: the option `layout`: "auto", "shared_prefix" or "concatenated" (which is not verified).
        data: prompts with `costs(layout)` and `trees(indices)`.
        tolerance: relative to the largest reward (at least 1): 1e-4 suits float32, 5e-2 half precision.

    Raises:
        InputError: `name` is "shared_prefix" and the model does not support it.
    """
    padded = Layout("concatenated", pad_token_id)
    if name == "concatenated":
        return padded
    problem = _unsupported(model)
    if not problem:
        packed = Layout("shared_prefix", pad_token_id, attends_by_tree(model))
        try:
            problem, difference = _compare_layouts(packed, padded, model, data, tolerance)
        except TreesNotPassed as error:
            problem, difference = str(error), math.inf
        if problem and packed.by_tree:
            unwrapped(unwrapped(model).classifier).set_attn_implementation("sdpa")
            packed = replace(packed, by_tree=False)
            problem, difference = _compare_layouts(packed, padded, model, data, tolerance)
        if dist.is_initialized():  # all or none
            problem = next(filter(None, gather_object([problem])), "")  # collective
        if not problem:
            count = min(NUM_VERIFIED, len(data))
            return replace(packed, reason=f"verified: rewards of {count} prompts agree to {difference:.1g}")
    if name == "shared_prefix":
        raise InputError(f"layout=shared_prefix: {problem}; use layout=auto or concatenated")
    return replace(padded, reason=problem)


def _unsupported(model: nn.Module) -> str:
    """Why a model does not support packed rows; empty: it may."""
    reward_model = unwrapped(model)
    if not reward_model.is_causal:
        return "the model is an encoder: every token sees the whole sequence"
    backbone = unwrapped(reward_model.classifier).base_model
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{type(backbone).__name__} takes no position_ids"
    return mask_problem(reward_model.config)


@torch.compiler.set_stance("force_eager")  # a result for the layers is valid for compiled layers too
@torch.no_grad()
def _compare_layouts(
    packed: Layout, padded: Layout, model: nn.Module, data: Any, tolerance: float
) -> tuple[str, float]:
    """(why `packed` cannot be used, or "", largest difference of a reward); several trees in a row."""
    indices = _short_prompts(data.costs(packed))
    half = len(indices) if packed.by_tree else (len(indices) + 1) // 2
    rows = [list(row) for row in (indices[:half], indices[half:]) if len(row)]
    was_training, rewards, device = model.training, [], next(model.parameters()).device
    model.eval()
    try:
        for layout, micro_batch in ((packed, MicroBatch(rows)), (padded, MicroBatch([[i] for i in indices]))):
            batch = collate_trees(data.trees(indices), micro_batch, layout).to(device)
            with without_autocast(model):
                rewards.append(score_batch(model, batch))
    finally:
        model.train(was_training)
    difference = (rewards[0] - rewards[1]).abs().max().item()
    if difference <= tolerance * max(1.0, rewards[1].abs().max().item()):  # false for NaN
        return "", difference
    return f"rewards of {len(indices)} prompts differ by {difference:.2g} between the layouts", difference


def _short_prompts(costs: Sequence[int]) -> list[int]:
    """Indices of a few prompts from the tenth percentile of costs on, so that the check is quick."""
    order = np.argsort(costs, kind="stable")
    return order[min(len(order) // 10, max(len(order) - NUM_VERIFIED, 0)) :][:NUM_VERIFIED].tolist()
