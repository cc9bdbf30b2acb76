"""The concatenated chosen+rejected forward pass, and its shared-prefix twin.

Shape suffixes: B pairs, N sequences, R rows, L tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rm.batching import MicroBatch
from rm.collate import Batch, collate
from rm.model import RewardModel

logger = logging.getLogger(__name__)


class LayoutError(ValueError):
    """`shared_prefix` was asked for by name, and the model cannot do it; the message is one line with the reason."""


def shared_prefix_mask(tree_RL: Tensor, branch_RL: Tensor, position_RL: Tensor, window: int | None = None) -> Tensor:
    """Which key each query sees, bool [R, 1, L, L].

    Query i sees key j iff they are of the same tree, j <= i in the row, and j is in the prefix or in i's own branch;
    under a sliding window also position i - position j < window. Padding (tree -1) sees padding before it.
    """
    query, key = (slice(None), slice(None), None), (slice(None), None, slice(None))
    mask_RLL = tree_RL[query] == tree_RL[key]
    mask_RLL &= (branch_RL[key] == 0) | (branch_RL[key] == branch_RL[query])
    mask_RLL &= torch.ones_like(mask_RLL[0]).tril()
    if window is not None:
        mask_RLL &= position_RL[query] - position_RL[key] < window
    return mask_RLL[:, None]


def attention_mask(config: PreTrainedConfig, batch: Batch, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The mask that a model with `config` takes for `batch`: one tensor, or one per layer type.

    Raises ValueError if the model has layers or an attention kernel that such a mask cannot steer.
    """
    if not batch.is_packed:
        return batch.attention_mask_RL
    text = config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation {config._attn_implementation} takes no dense mask")

    def mask(window: int | None) -> Tensor:
        seen = shared_prefix_mask(batch.tree_RL, batch.branch_RL, batch.position_RL, window)
        if config._attn_implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)  # eager adds the mask

    window = getattr(text, "sliding_window", None)
    layer_types = set(getattr(text, "layer_types", None) or ())
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of type {', '.join(sorted(unknown))} take no attention mask")
    if not layer_types:  # one kind of layer; `sliding_window`, if any, holds for all of them
        return mask(window if getattr(text, "use_sliding_window", True) else None)
    masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in layer_types}
    return masks if len(masks) > 1 else masks.popitem()[1]


def score_batch(model: nn.Module, batch: Batch) -> Tensor:
    """Rewards of all sequences of `batch`, float32 [N], tree by tree. `model`: a `RewardModel`, prepared or not."""
    core: RewardModel = getattr(model, "module", model)  # DDP and DeepSpeed keep the model in `.module`
    return model(
        input_ids=batch.input_ids_RL,
        attention_mask=attention_mask(core.config, batch, core.dtype),
        position_ids=batch.position_RL,
        end_row=batch.end_row_N,
        end_index=batch.end_index_N,
    )


def concatenated_forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Rewards of all pairs from one forward pass: (chosen_B, rejected_B), float32 [B] each.

    The rows hold chosen and rejected sequences one below the other (`concatenated`), or trees in which the prompt that
    a pair shares is computed once (`shared_prefix`). Both give the same rewards and the same gradients.
    """
    rewards_B2 = score_batch(model, batch).view(-1, 2)
    return rewards_B2[:, 0], rewards_B2[:, 1]


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
    "concatenated" is taken as it is; "auto" falls back to it where the proof fails. `tolerance` is relative to the
    largest reward (at least 1): 1e-4 suits float32, 5e-2 half precision.

    Raises:
        LayoutError: `layout` is "shared_prefix" and the proof fails.
    """
    core: RewardModel = getattr(model, "module", model)
    if layout == "concatenated":
        return layout, "as configured"
    reason = "the model is an encoder: every token sees the whole sequence" if not core.is_causal else ""
    if not reason:
        was_training = model.training
        model.eval()
        try:
            half = (len(indices) + 1) // 2  # two rows of several trees: packing is part of what is proved
            rows = [list(indices[:half]), list(indices[half:])] if half < len(indices) else [list(indices)]
            packed = collate(dataset, MicroBatch(rows), "shared_prefix", pad_token_id).to(device)
            padded = collate(dataset, MicroBatch([[i] for i in indices]), "concatenated", pad_token_id).to(device)
            rewards, expected = score_batch(model, packed), score_batch(model, padded)
            difference = (rewards - expected).abs().max().item()
            if not difference <= tolerance * max(1.0, expected.abs().max().item()):  # NaN fails too
                reason = f"rewards of {len(indices)} pairs differ by {difference:.2g} between the layouts"
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, IndexError) as error:
            reason = f"the model refuses packed rows ({str(error).splitlines()[0][:150]})"
        model.train(was_training)
    if not reason:
        return "shared_prefix", f"proved: rewards of {len(indices)} pairs agree to {difference:.1g}"
    if layout == "shared_prefix":
        raise LayoutError(f"layout=shared_prefix: {reason}; use layout=auto or concatenated")
    return "concatenated", reason
