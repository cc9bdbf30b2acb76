"""Rewards of any number of answers to a prompt, the prompt computed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rm.attention import block_size
from rm.batching import plan_micro_batches
from rm.collate import Batch, Tree, collate_trees
from rm.forward import score_batch


@torch.no_grad()
def score_trees(
    model: nn.Module,
    trees: Sequence[Tree],
    *,
    layout: str,
    micro_batch_tokens: int,
    pad_token_id: int,
    device: torch.device,
) -> list[np.ndarray]:
    """Rewards of the N sequences of every tree, float32 [N] each, in the order given.

    Args:
        model: a `RewardModel`, prepared or not; it is put into eval mode for the call.
        trees: a common prompt and its answers, as token ids (`Tree(prompt, answers)`); N may differ from tree to tree.
        layout: "shared_prefix" or "concatenated"; `rm.forward.resolve_layout` says which the model can do.
        micro_batch_tokens: padded tokens of one forward pass; a larger tree runs alone.
    """
    sizes = [len(tree) for tree in trees]
    if layout == "concatenated":
        sizes = [len(tree.branches) * (len(tree.prefix) + max(map(len, tree.branches))) for tree in trees]
    indices, block = np.arange(len(trees)), block_size(model)
    (plan,) = plan_micro_batches(indices, np.asarray(sizes), layout, micro_batch_tokens, block_size=block)
    rewards: list[np.ndarray] = [np.empty(0)] * len(trees)
    was_training, empty = model.training, torch.zeros(0)
    model.eval()
    for micro_batch in plan:
        rows = [[trees[i] for i in row] for row in micro_batch.rows]
        tensors = collate_trees(rows, layout, pad_token_id, micro_batch.pad_to_multiple_of)
        batch = Batch(**tensors, margin_B=empty, weight_B=empty, index_B=empty).to(device)
        scored = score_batch(model, batch).cpu().numpy()
        order = [i for row in micro_batch.rows for i in row]
        ends = np.cumsum([len(trees[i].branches) for i in order])
        for i, values in zip(order, np.split(scored, ends[:-1]), strict=True):
            rewards[i] = values
    model.train(was_training)
    return rewards
