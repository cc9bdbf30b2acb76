"""Rewards of any number of answers to a prompt, the prompt computed once, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from rm.collate import Batch, Tree, collate_trees
from rm.data.items import ItemError, encode_items
from rm.data.plan import plan_micro_batches
from rm.forward import resolve_layout, score_batch
from rm.model.attention import block_size
from rm.model.precision import cast_weights
from rm.model.reward_model import RewardModel, max_positions

TREE_TOKENS = 512  # 30 answers of 60 tokens to a prompt of 120, SmolLM2 on a CPU: 0.87 of the time of one tree


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
    if not trees:
        return []
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
        scored = score_batch(model, batch).view(len(batch.end_row_N), -1)[:, 0].cpu().numpy()  # the first output
        order = [i for row in micro_batch.rows for i in row]
        ends = np.cumsum([len(trees[i].branches) for i in order])
        for i, values in zip(order, np.split(scored, ends[:-1]), strict=True):
            rewards[i] = values
    model.train(was_training)
    return rewards


class Scorer:
    """A reward model in eval mode on its device, with all that decides how an item becomes tokens.

    Args:
        model: not prepared by Accelerate.
        layout: as configured; "shared_prefix" is proved on random tokens here (`InputError`).
        tolerance: of that proof.
        autocast: type of Accelerate's mixed precision; None: off.
        weights: type that the weights are cast to (`eval_dtype`). None: as they are.
        scale: mean and standard deviation, with which rewards are given as (r - mean) / std. None: as they are.
        encoding: the options of `rm.data.items.encode_items`.
    """

    def __init__(
        self,
        model: RewardModel,
        tokenizer: Any,
        *,
        device: torch.device,
        layout: str = "auto",
        tolerance: float = 1e-4,
        micro_batch_tokens: int = 16384,
        autocast: torch.dtype | None = None,
        weights: str | None = None,
        scale: tuple[float, float] | None = None,
        **encoding: Any,
    ):
        is_placed = getattr(model.bare, "is_quantized", False)  # bitsandbytes chose the device
        self.model = model.eval() if is_placed else model.eval().to(device)
        self.tokenizer, self.device, self.autocast, self.scale = tokenizer, device, autocast, scale
        self.micro_batch_tokens, self.tolerance = micro_batch_tokens, tolerance
        self.encoding = encoding | {"max_positions": max_positions(model)}
        proof = _random_pairs(tokenizer)
        self.layout, self.reason = resolve_layout(
            layout, model, proof, range(len(proof)), tokenizer.pad_token_id, device, tolerance=tolerance
        )
        self._cast = ExitStack()  # for as long as the scorer lives
        self._cast.enter_context(cast_weights(model, weights))

    def rewards(self, items: Sequence[dict]) -> list[np.ndarray]:
        """The rewards of each item's answers, float64 [1], [N] or [2] (chosen, rejected); see `rm.items`.

        Raises:
            ItemError: an item cannot be scored; names its index.
        """
        trees = self.encode(items)
        for i, tree in enumerate(trees):
            if isinstance(tree, ItemError):
                raise ItemError(f"item {i}: {tree}")
        return self.score(trees)

    def encode(self, items: Sequence[Any]) -> list[Tree | ItemError]:
        """Each item's token ids, or what is wrong with it."""
        return encode_items(items, self.tokenizer, **self.encoding)

    def score(self, trees: Sequence[Tree]) -> list[np.ndarray]:
        """The rewards of each tree's sequences, float64 [N], in the order given."""
        pieces = [piece for tree in trees for piece in self._cut(tree)]
        autocast = torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()
        with autocast:
            scored = score_trees(
                self.model,
                pieces,
                layout=self.layout,
                micro_batch_tokens=self.micro_batch_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                device=self.device,
            )
        ends = np.cumsum([len(tree.branches) for tree in trees])
        rewards = np.concatenate([*scored, np.empty(0)]).astype(np.float64)
        if self.scale is not None:
            rewards = (rewards - self.scale[0]) / self.scale[1]
        return np.split(rewards, ends[:-1]) if len(trees) else []

    def _cut(self, tree: Tree) -> list[Tree]:
        """The tree in several, each with its prompt, so that one fits into a forward pass if a single answer does.

        A kernel that computes a tree's whole square, though no answer sees another one, gets trees of `TREE_TOKENS`,
        or of twice the prompt.
        """
        limit = self.micro_batch_tokens
        if (block_size(self.model) or 1) == 1:
            limit = min(limit, max(TREE_TOKENS, 2 * len(tree.prefix)))
        cuts, size = [[]], 0
        for branch in tree.branches:
            if cuts[-1] and len(tree.prefix) + size + len(branch) > limit:
                cuts.append([])
                size = 0
            cuts[-1].append(branch)
            size += len(branch)
        return [Tree(tree.prefix, branches) for branches in cuts]


def _random_pairs(tokenizer: Any, num_pairs: int = 4) -> Any:
    """Pairs of random ordinary tokens, to prove the layout on: as `rm.collate.collate` reads them."""
    from datasets import Dataset

    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    vocabulary, rng = np.array(sorted(ordinary) or [tokenizer.pad_token_id]), np.random.default_rng(0)
    rows = []
    for number in range(num_pairs):
        prefix, chosen, rejected = (rng.choice(vocabulary, n).tolist() for n in (20 + number, 8, 5 + number))
        sides = {"input_ids_chosen": prefix + chosen, "input_ids_rejected": prefix + rejected}
        rows.append(sides | {"prefix_length": len(prefix), "margin": 0.0})
    return Dataset.from_list(rows).with_format("numpy")
