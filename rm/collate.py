"""Prompts → tensors, in two layouts.

`concatenated`: one sequence per row, padded on the right; the first answers of all prompts, then the second, and so on.

`shared_prefix`: a row is one or more trees `[prefix | answer 1 | answer 2 | …]`; the prompt is in the row once. Each
token knows its tree, its branch (0: prefix, n: answer n) and its position (every answer continues at `len(prefix)`).

Shape suffixes: N answers (of all prompts of the batch), C comparisons, R rows, L tokens in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from rm.data.dataset import PreferenceData
from rm.data.plan import Layout, MicroBatch
from rm.data.tokenize import Tree


@dataclass
class Batch:
    """One micro-batch. Answers are numbered prompt by prompt: for pairs, 2p is the first answer and 2p + 1 the second.

    input_ids_RL: int64. end_row_N, end_index_N: where each sequence's last token is, int64.
    attention_mask_RL: int64, only in `concatenated` rows. tree_RL (-1: padding), branch_RL, position_RL: int64, only in
    `shared_prefix` rows. tree_lengths: tokens of each tree (and of the padding) if there is one such row.
    chosen_C, rejected_C: the compared answers, int64 indices into N. share_C: 1 / comparisons of the prompt, float32 (0
    in a dummy micro-batch). columns: every registered column by name, float32; also as `batch.margin_C`,
    `batch.score_N` and so on.
    """

    input_ids_RL: Tensor
    end_row_N: Tensor
    end_index_N: Tensor
    attention_mask_RL: Tensor | None = None
    tree_RL: Tensor | None = None
    branch_RL: Tensor | None = None
    position_RL: Tensor | None = None
    tree_lengths: list[int] | None = None
    chosen_C: Tensor | None = None
    rejected_C: Tensor | None = None
    share_C: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor:
        columns = self.__dict__.get("columns", {})
        if name[-2:] in ("_C", "_N") and name[:-2] in columns:
            return columns[name[:-2]]
        raise AttributeError(name)

    @property
    def is_packed(self) -> bool:
        return self.tree_RL is not None

    @property
    def length_N(self) -> Tensor:
        """Tokens of each sequence, prompt included, int64."""
        return (self.position_RL[self.end_row_N, self.end_index_N] if self.is_packed else self.end_index_N) + 1

    def to(self, device: torch.device) -> Batch:
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, columns={k: v.to(device, non_blocking=True) for k, v in self.columns.items()})


def collate(data: PreferenceData, micro_batch: MicroBatch, layout: Layout) -> Batch:
    """Read the prompts of a micro-batch from the tokenized `data` and lay them out."""
    batch = collate_trees(data.trees(micro_batch.prompts), micro_batch, layout)
    counts, labels = data.labels(micro_batch.prompts)
    num_answers = data.num_answers[micro_batch.prompts]
    first = np.repeat(np.cumsum(num_answers) - num_answers, counts)
    share = np.repeat(1 / counts, counts).astype(np.float32)
    return replace(
        batch,
        chosen_C=torch.from_numpy(first + labels.pop("chosen")),
        rejected_C=torch.from_numpy(first + labels.pop("rejected")),
        share_C=torch.from_numpy(0 * share if micro_batch.is_dummy else share),
        columns={name: torch.tensor(values) for name, values in labels.items()},
    )


def collate_trees(trees: Sequence[Tree], micro_batch: MicroBatch, layout: Layout) -> Batch:
    """The tokens of a micro-batch, without labels; `trees` in the order of `micro_batch.prompts`."""
    if layout.name == "concatenated":
        return _concatenate(trees, layout.pad_token_id)
    rest = iter(trees)
    return _pack([[next(rest) for _ in row] for row in micro_batch.rows], layout.pad_token_id)


def _concatenate(trees: Sequence[Tree], pad_token_id: int) -> Batch:
    """Every sequence in a row of its own, padded on the right: all first answers, then all second ones, and so on."""
    sequences = [sequence for tree in trees for sequence in tree.sequences()]
    answer = [n for tree in trees for n in range(len(tree.answers))]
    order = sorted(range(len(sequences)), key=lambda n: answer[n])  # stable: chosen rows first, then rejected rows
    input_ids = np.full((len(sequences), max(map(len, sequences))), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    end_row = np.empty(len(sequences), dtype=np.int64)
    for row, n in enumerate(order):
        input_ids[row, : len(sequences[n])] = sequences[n]
        attention_mask[row, : len(sequences[n])] = 1
        end_row[n] = row
    return Batch(
        input_ids_RL=torch.from_numpy(input_ids),
        attention_mask_RL=torch.from_numpy(attention_mask),
        end_row_N=torch.from_numpy(end_row),
        end_index_N=torch.tensor([len(sequence) - 1 for sequence in sequences]),
    )


def _pack(rows: Sequence[Sequence[Tree]], pad_token_id: int) -> Batch:
    """Each row's trees one after the other, padded on the right to the longest row."""
    shape = (len(rows), max(sum(map(len, row)) for row in rows))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    tree_ids = np.full(shape, -1, dtype=np.int64)
    branch_ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    end_row, end_index = [], []
    for r, row in enumerate(rows):
        start = 0
        for t, tree in enumerate(row):
            tree_ids[r, start : start + len(tree)] = t
            for b, tokens in enumerate((tree.prefix, *tree.answers)):
                stop = start + len(tokens)
                input_ids[r, start:stop] = tokens
                branch_ids[r, start:stop] = b
                offset = len(tree.prefix) if b else 0
                positions[r, start:stop] = np.arange(offset, offset + len(tokens))
                if b:
                    end_row.append(r)
                    end_index.append(stop - 1)
                start = stop
    return Batch(
        input_ids_RL=torch.from_numpy(input_ids),
        end_row_N=torch.tensor(end_row),
        end_index_N=torch.tensor(end_index),
        tree_RL=torch.from_numpy(tree_ids),
        branch_RL=torch.from_numpy(branch_ids),
        position_RL=torch.from_numpy(positions),
        tree_lengths=[len(tree) for tree in rows[0]] if len(rows) == 1 else None,
    )
