"""The concatenated chosen+rejected forward pass, and its shared-prefix twin.

Shape suffixes: B pairs, N sequences, R rows, L tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rm.collate import Batch, collate
from rm.config.errors import InputError
from rm.data.plan import MicroBatch
from rm.model.attention import SDPA_BY_TREE, attention_mask, block_size
from rm.model.reward_model import RewardModel

logger = logging.getLogger(__name__)


def score_batch(model: nn.Module, batch: Batch) -> Tensor:
    """Rewards of all sequences of `batch`, float32 [N], tree by tree. `model`: a `RewardModel`, prepared or not."""
    core: RewardModel = getattr(model, "module", model)  # DDP and DeepSpeed keep the model in `.module`
    return model(
        input_ids=batch.input_ids_RL,
        attention_mask=attention_mask(core.config, batch, core.dtype),
        position_ids=batch.position_RL,
        end_row=batch.end_row_N,
        end_index=batch.end_index_N,
        tree_lengths=batch.tree_lengths if core.config._attn_implementation == SDPA_BY_TREE else None,
        **({} if core.neftune_noise_alpha is None else {"length_RL": sequence_lengths(batch)}),
    )


def sequence_lengths(batch: Batch) -> Tensor:
    """Tokens in the sequence that each token is part of, int64 [R, L]; of those that several share, in the longest."""
    if not batch.is_packed:
        return batch.attention_mask_RL.sum(1, keepdim=True).expand_as(batch.attention_mask_RL)
    row_R1 = torch.arange(len(batch.tree_RL), device=batch.tree_RL.device)[:, None]
    tree_RL = row_R1 * (batch.tree_RL.shape[1] + 1) + batch.tree_RL + 1  # -1 is padding
    branch_RL = tree_RL * (batch.branch_RL.max() + 1) + batch.branch_RL

    def longest(group_RL: Tensor) -> Tensor:
        lengths = torch.zeros(int(group_RL.max()) + 1, dtype=torch.int64, device=group_RL.device)
        lengths.scatter_reduce_(0, group_RL.flatten(), batch.position_RL.flatten() + 1, "amax")
        return lengths[group_RL]

    return torch.where(batch.branch_RL == 0, longest(tree_RL), longest(branch_RL))


def concatenated_forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Rewards of all pairs from one forward pass: (chosen_B, rejected_B), float32 [B] each.

    The rows hold chosen and rejected sequences one below the other (`concatenated`), or trees in which the prompt that
    a pair shares is computed once (`shared_prefix`). Both give the same rewards and the same gradients.
    """
    rewards_B2 = score_batch(model, batch).view(-1, 2)
    return rewards_B2[:, 0], rewards_B2[:, 1]


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Lift the autocast that Accelerate lays around `forward`: its rounding would hide or feign a difference.

    Weights that are themselves of half precision, and FSDP's or DeepSpeed's casts, stay as they are.
    """
    core: RewardModel = getattr(model, "module", model)
    forward = core.forward
    core.forward = getattr(core, "_original_forward", forward)
    try:
        yield
    finally:
        core.forward = forward


@torch.compiler.set_stance("force_eager")  # what is proved here holds for compiled layers too
@torch.no_grad()
def resolve_layout(
    layout: str,
    model: nn.Module,
    dataset,
    indices: Sequence[int],
    pad_token_id: int,
    device: torch.device,
    tolerance: float = 1e-4,
) -> tuple[str, str]:
    """Choose the layout, proving `shared_prefix` on real pairs: (layout, reason in words).

    Scores the pairs `indices` in both layouts; collective under FSDP, so every process must call it. `layout`
    "concatenated" is taken as it is; "auto" falls back to it where the proof fails. `tolerance` is
    relative to the largest reward (at least 1): 1e-4 suits float32, 5e-2 half precision. Autocast is lifted.

    Raises:
        InputError: `layout` is "shared_prefix" and the proof fails.
    """
    core: RewardModel = getattr(model, "module", model)
    if layout == "concatenated":
        return layout, "as configured"
    if not core.is_causal:
        reason = "the model is an encoder: every token sees the whole sequence"
    else:
        reason, difference = _compare_layouts(model, dataset, indices, pad_token_id, device, tolerance)
        if reason and core.config._attn_implementation == SDPA_BY_TREE:  # a model that does not pass the trees on
            core.bare.set_attn_implementation("sdpa")
            reason, difference = _compare_layouts(model, dataset, indices, pad_token_id, device, tolerance)
    if not reason:
        return "shared_prefix", f"proved: rewards of {len(indices)} pairs agree to {difference:.1g}"
    if layout == "shared_prefix":
        raise InputError(f"layout=shared_prefix: {reason}; use layout=auto or concatenated")
    return "concatenated", reason


def _compare_layouts(model, dataset, indices, pad_token_id, device, tolerance) -> tuple[str, float]:
    """(why `shared_prefix` cannot be used, or "", largest difference of a reward); several trees in a row."""
    half = len(indices) if block_size(model) else (len(indices) + 1) // 2
    rows = [list(row) for row in (indices[:half], indices[half:]) if len(row)]
    was_training, difference = model.training, math.nan
    model.eval()
    try:
        packed = collate(dataset, MicroBatch(rows), "shared_prefix", pad_token_id).to(device)
        padded = collate(dataset, MicroBatch([[i] for i in indices]), "concatenated", pad_token_id).to(device)
        with without_autocast(model):
            rewards, expected = score_batch(model, packed), score_batch(model, padded)
        difference = (rewards - expected).abs().max().item()
        if difference <= tolerance * max(1.0, expected.abs().max().item()):  # not so for NaN
            return "", difference
        return f"rewards of {len(indices)} pairs differ by {difference:.2g} between the layouts", difference
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, IndexError) as error:
        return f"the model refuses packed rows ({str(error).splitlines()[0][:150]})", difference
    finally:
        model.train(was_training)
