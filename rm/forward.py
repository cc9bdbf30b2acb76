"""The forward pass: rewards of all answers of a batch, and the concatenated chosen+rejected forward pass.

Shape suffixes: N answers, C comparisons, K outputs of the head, R rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from rm.model.attention import SDPA_BY_TREE, attention_mask, attention_pieces, packing_problem
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
    if reward_model.config._attn_implementation == SDPA_BY_TREE and batch.tree_parts:
        packed["pieces"] = attention_pieces(batch.tree_parts)
    return model(
        input_ids=batch.input_ids_RL,
        attention_mask=attention_mask(reward_model.config, batch, unwrapped(reward_model.classifier).dtype),
        end_row=batch.end_row_N,
        end_index=batch.end_index_N,
        **packed,
    )


def concatenated_forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of all comparisons from one forward pass, (chosen_C, rejected_C), and of all answers, rewards_N; float32.

    The rows hold chosen and rejected sequences one below the other (`concatenated`), or trees in which the prompt is
    computed once and each answer once (`shared_prefix`). Both give the same rewards and the same gradients.
    """
    rewards_N = score_batch(model, batch)
    return rewards_N[batch.chosen_C], rewards_N[batch.rejected_C], rewards_N


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
    problem = packing_problem(model)
    if not problem:
        packed = Layout("shared_prefix", pad_token_id, unwrapped(model).config._attn_implementation == SDPA_BY_TREE)
        problem, agreement = _compare_layouts(packed, padded, model, data, tolerance)
        if dist.is_initialized():  # all or none
            problem = next(filter(None, gather_object([problem])), "")  # collective
        if not problem:
            return replace(packed, reason=agreement)
    if name == "shared_prefix":
        raise InputError(f"layout=shared_prefix: {problem}; use layout=auto or concatenated")
    return replace(padded, reason=problem)


@torch.compiler.set_stance("force_eager")  # a result for the layers is valid for compiled layers too
@torch.no_grad()
def _compare_layouts(packed: Layout, padded: Layout, model: nn.Module, data: Any, tolerance: float) -> tuple[str, str]:
    """(why `packed` cannot be used, or "", how well the rewards agree), from short prompts, so that it is quick."""
    order = np.argsort(data.costs(packed), kind="stable")
    indices = order[len(order) // 10 :][:NUM_VERIFIED].tolist()
    was_training, rewards, device = model.training, [], next(model.parameters()).device
    model.eval()
    try:
        for layout, rows in ((packed, [indices]), (padded, [[i] for i in indices])):
            batch = collate_trees(data.trees(indices), MicroBatch(rows), layout).to(device)
            with without_autocast(model):
                rewards.append(score_batch(model, batch))
    except InputError as error:
        return str(error), ""
    finally:
        model.train(was_training)
    difference, count = (rewards[0] - rewards[1]).abs().max().item(), len(indices)
    if difference <= tolerance * max(1.0, rewards[1].abs().max().item()):  # false for NaN
        return "", f"verified: rewards of {count} prompts agree to {difference:.1g}"
    return f"rewards of {count} prompts differ by {difference:.2g} between the layouts", ""
