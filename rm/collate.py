"""Pairs → tensors, in two layouts.

`concatenated`: one sequence a row, padded on the right; all chosen rows, then all rejected rows.

`shared_prefix`: a row is one or more trees `[prefix | branch 1 | branch 2 | …]`; the prompt stands there once. Each
token knows its tree, its branch (0: prefix) and its position (every branch continues at `len(prefix)`).

Shape suffixes: B pairs (or trees), N sequences, R rows, L tokens in a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from rm.data.plan import MicroBatch

COLUMNS = ["input_ids_chosen", "input_ids_rejected", "prefix_length", "margin"]  # what `collate` reads


@dataclass(frozen=True)
class Tree:
    """N token sequences with a common prefix: sequence n is `prefix + branches[n]`. A pair is (chosen, rejected)."""

    prefix: np.ndarray
    branches: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))

    def sequences(self) -> list[np.ndarray]:
        return [np.concatenate([self.prefix, branch]) for branch in self.branches]


@dataclass
class Batch:
    """One micro-batch. Sequences are numbered tree by tree: for pairs, 2b is chosen and 2b + 1 is rejected.

    input_ids_RL: int64. end_row_N, end_index_N: where each sequence's last token stands, int64.
    attention_mask_RL: int64, in `concatenated` rows only. tree_RL (-1: padding), branch_RL, position_RL: int64, in
    `shared_prefix` rows only. tree_lengths: tokens of each tree (and of the padding) if there is one such row.
    margin_B, weight_B: float32 (weight 0: a filler). index_B: the pairs' indices in the data set, int64.
    """

    input_ids_RL: Tensor
    end_row_N: Tensor
    end_index_N: Tensor
    margin_B: Tensor
    weight_B: Tensor
    index_B: Tensor
    attention_mask_RL: Tensor | None = None
    tree_RL: Tensor | None = None
    branch_RL: Tensor | None = None
    position_RL: Tensor | None = None
    tree_lengths: list[int] | None = None

    @property
    def is_packed(self) -> bool:
        return self.tree_RL is not None

    def to(self, device: torch.device) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()})


def pair_tree(example: dict) -> Tree:
    """The tree of one row of the tokenized data set (`input_ids_chosen`, `input_ids_rejected`, `prefix_length`)."""
    chosen, rejected = np.asarray(example["input_ids_chosen"]), np.asarray(example["input_ids_rejected"])
    cut = int(example["prefix_length"])
    return Tree(chosen[:cut], (chosen[cut:], rejected[cut:]))


def concatenate(trees: Sequence[Tree], pad_token_id: int) -> dict[str, Tensor]:
    """Every sequence in a row of its own, padded on the right: all first branches, then all second ones, and so on."""
    sequences = [sequence for tree in trees for sequence in tree.sequences()]
    branch = [b for tree in trees for b in range(len(tree.branches))]
    order = sorted(range(len(sequences)), key=lambda n: branch[n])  # stable: chosen rows first, then rejected rows
    input_ids = np.full((len(sequences), max(map(len, sequences))), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    end_row = np.empty(len(sequences), dtype=np.int64)
    for row, n in enumerate(order):
        input_ids[row, : len(sequences[n])] = sequences[n]
        attention_mask[row, : len(sequences[n])] = 1
        end_row[n] = row
    return dict(
        input_ids_RL=torch.from_numpy(input_ids),
        attention_mask_RL=torch.from_numpy(attention_mask),
        end_row_N=torch.from_numpy(end_row),
        end_index_N=torch.tensor([len(sequence) - 1 for sequence in sequences]),
    )


def pack(rows: Sequence[Sequence[Tree]], pad_token_id: int, pad_to_multiple_of: int = 1) -> dict:
    """Each row's trees one after the other, padded on the right to the longest row, rounded up to a multiple."""
    longest = max(sum(map(len, row)) for row in rows)
    shape = (len(rows), math.ceil(longest / pad_to_multiple_of) * pad_to_multiple_of)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    tree_ids = np.full(shape, -1, dtype=np.int64)
    branch_ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    end_row, end_index = [], []
    for r, row in enumerate(rows):
        start = 0
        for t, tree in enumerate(row):
            tree_ids[r, start : start + len(tree)] = t
            for b, tokens in enumerate((tree.prefix, *tree.branches)):
                stop = start + len(tokens)
                input_ids[r, start:stop] = tokens
                branch_ids[r, start:stop] = b
                offset = len(tree.prefix) if b else 0
                positions[r, start:stop] = np.arange(offset, offset + len(tokens))
                if b:
                    end_row.append(r)
                    end_index.append(stop - 1)
                start = stop
    tree_lengths = [len(tree) for tree in rows[0]] + [shape[1] - longest] * (shape[1] > longest)
    return dict(
        tree_lengths=tree_lengths if len(rows) == 1 else None,
        input_ids_RL=torch.from_numpy(input_ids),
        tree_RL=torch.from_numpy(tree_ids),
        branch_RL=torch.from_numpy(branch_ids),
        position_RL=torch.from_numpy(positions),
        end_row_N=torch.tensor(end_row),
        end_index_N=torch.tensor(end_index),
    )


def collate_trees(rows: Sequence[Sequence[Tree]], layout: str, pad_token_id: int, pad_to_multiple_of: int = 1) -> dict:
    """What `Batch` holds of `rows` of trees under `layout`; N runs over the trees in the order given."""
    if layout == "shared_prefix":
        return pack(rows, pad_token_id, pad_to_multiple_of)
    return concatenate([tree for row in rows for tree in row], pad_token_id)


def collate(dataset, micro_batch: MicroBatch, layout: str, pad_token_id: int) -> Batch:
    """Read a micro-batch's pairs from the tokenized `dataset` and lay them out.

    Args:
        dataset: a `datasets.Dataset` with `input_ids_chosen`, `input_ids_rejected`, `prefix_length` and `margin`.
        layout: "shared_prefix" or "concatenated".
    """
    indices = [i for row in micro_batch.rows for i in row]
    columns = dataset[indices]
    examples = iter([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
    rows = [[pair_tree(next(examples)) for _ in row] for row in micro_batch.rows]
    weight = 0.0 if micro_batch.is_filler else 1.0
    return Batch(
        **collate_trees(rows, layout, pad_token_id, micro_batch.pad_to_multiple_of),
        margin_B=torch.as_tensor(np.asarray(columns["margin"], dtype=np.float32)),
        weight_B=torch.full((len(indices),), weight),
        index_B=torch.tensor(indices),
    )
