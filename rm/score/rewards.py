"""The one loop that scores prompts: for evaluation, for token rewards and for `rm.score`.

Shape suffixes: N answers, R rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from rm.collate import Batch, collate_trees
from rm.data.plan import Layout, plan_micro_batches
from rm.data.tokenize import Tree
from rm.forward import score_batch


class TreeList(list[Tree]):
    """Trees in memory, with what scoring needs of `PreferenceData`."""

    @property
    def num_answers(self) -> np.ndarray:
        return np.array([len(tree.answers) for tree in self], np.int64)

    def costs(self, layout: Layout) -> np.ndarray:
        if layout.name == "shared_prefix":
            return np.array([len(tree) for tree in self], np.int64)
        lengths = [list(map(len, tree.sequences())) for tree in self]
        return np.array([sum(each) if layout.by_tree else len(each) * max(each) for each in lengths], np.int64)

    def trees(self, indices: Sequence[int]) -> list[Tree]:
        return [self[i] for i in indices]


@torch.no_grad()
def score_prompts(
    model: nn.Module,
    data: Any,
    layout: Layout,
    micro_batch_tokens: int,
    accelerator: Accelerator | None = None,
    every_token: bool = False,
) -> list[np.ndarray]:
    """Rewards of the N answers of every prompt, float64 [N] each, in the order of `data`. Collective.

    Each process scores its share and writes it into a table of zeros; the sum over processes is the whole table. So no
    prompt is scored twice, and the result depends on batches, layout and processes by float rounding only.

    Args:
        model: a `RewardModel`, prepared or not; in eval mode during the call.
        data: `PreferenceData` or a `TreeList`.
        micro_batch_tokens: tokens of one forward pass, padding included; a larger prompt runs alone.
        accelerator: None: one process.
        every_token: return the reward of every beginning of every answer's sequence instead, one answer after the other
            (float64 [tokens of all sequences]). For causal models.
    """
    if not len(data):
        return []
    counts = data.num_answers
    if every_token:
        counts = np.array([sum(map(len, tree.sequences())) for tree in data.trees(range(len(data)))], np.int64)
    num_processes, process = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    plans = plan_micro_batches(np.arange(len(data)), data.costs(layout), layout, micro_batch_tokens, num_processes)
    ends, device = np.cumsum(counts), next(model.parameters()).device
    table = torch.zeros(int(ends[-1]), 2, device=device)  # reward (float32 as computed), times scored
    was_training = model.training
    model.eval()
    for micro_batch in plans[process]:
        prompts = micro_batch.prompts
        batch = collate_trees(data.trees(prompts), micro_batch, layout).to(device)
        rewards = score_batch(model, _at_every_token(batch) if every_token else batch)
        if not micro_batch.is_dummy:
            places = torch.from_numpy(np.concatenate([np.arange(ends[p] - counts[p], ends[p]) for p in prompts]))
            table[places.to(device)] += torch.stack([rewards, torch.ones_like(rewards)], dim=1)
    model.train(was_training)
    table = (accelerator.reduce(table, "sum") if accelerator else table).cpu().numpy()  # collective
    assert (table[:, 1] == 1).all(), "an answer was scored twice or not at all"
    return np.split(table[:, 0].astype(np.float64), ends[:-1])


def _at_every_token(batch: Batch) -> Batch:
    """The batch with every token of each sequence, from its first to its last, as the end of a sequence."""
    places = []
    for row, end in zip(batch.end_row_N, batch.end_index_N, strict=True):
        is_own_L = torch.arange(batch.input_ids_RL.shape[1], device=end.device) <= end
        if batch.is_packed:
            tree_L, branch_L = batch.tree_RL[row], batch.branch_RL[row]
            is_own_L = (tree_L == tree_L[end]) & ((branch_L == 0) | (branch_L == branch_L[end]))
        places.append(is_own_L.nonzero()[:, 0])
    counts = torch.tensor(list(map(len, places)), device=batch.end_row_N.device)
    return replace(batch, end_row_N=batch.end_row_N.repeat_interleave(counts), end_index_N=torch.cat(places))
