"""Prompts → tensors, in two layouts.

`shared_prefix`: a row is one or more trees `[prefix | answer 1 | answer 2 | …]`; the prompt is in the row once. Each
token knows its tree, its branch (0: prefix, n: answer n) and its position (every answer continues at `len(prefix)`).

`concatenated`: every sequence by itself. For kernels that compute tree by tree, a row of trees with one answer and no
prefix. Otherwise one sequence per row, padded on the right; the first answers of all prompts, then the second ones.

Shape suffixes: N answers (of all prompts of the batch), C comparisons, R rows, L tokens in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rm.data.dataset import PreferenceData
from rm.data.plan import ROW_MULTIPLE, Layout, MicroBatch
from rm.data.tokenize import Tree


@dataclass
class Batch:
    """One micro-batch. Answers are numbered prompt by prompt: for pairs, 2p is the first answer and 2p + 1 the second.

    input_ids_RL: int64. end_row_N, end_index_N: where each sequence's last token is, int64.
    attention_mask_RL: int64, only in padded rows of one sequence. tree_RL (-1: padding), branch_RL, position_RL: int64,
    only in rows of trees. tree_parts: if there is one such row, for each tree the tokens of its prefix and its answers.
    chosen_C, rejected_C: the compared answers, int64 indices into N. prompt_C: the prompt of each comparison, int64.
    num_answers_P: answers of each prompt, int64. share_C: 1 / comparisons of the prompt, float32 (0 in a dummy
    micro-batch). columns: every registered column by name, float32; also as `batch.margin_C`,
    `batch.score_N` and so on.
    """

    input_ids_RL: Tensor
    end_row_N: Tensor
    end_index_N: Tensor
    attention_mask_RL: Tensor | None = None
    tree_RL: Tensor | None = None
    branch_RL: Tensor | None = None
    position_RL: Tensor | None = None
    tree_parts: list[list[int]] | None = None
    chosen_C: Tensor | None = None
    rejected_C: Tensor | None = None
    prompt_C: Tensor | None = None
    num_answers_P: Tensor | None = None
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
        prompt_C=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        num_answers_P=torch.from_numpy(num_answers),
        share_C=torch.from_numpy(0 * share if micro_batch.is_dummy else share),
        columns={name: torch.tensor(values) for name, values in labels.items()},
    )


def collate_trees(trees: Sequence[Tree], micro_batch: MicroBatch, layout: Layout) -> Batch:
    """The tokens of a micro-batch, without labels; `trees` in the order of `micro_batch.prompts`."""
    if layout.name == "concatenated" and not layout.by_tree:
        return _concatenate(trees, layout.pad_token_id)
    rest = iter(trees)
    rows = [[next(rest) for _ in row] for row in micro_batch.rows]
    if layout.name == "concatenated":
        rows = [[Tree(tree.prefix[:0], [ids]) for tree in row for ids in tree.sequences()] for row in rows]
    length = max(sum(map(len, row)) for row in rows)
    return _pack(rows, length + (0 if layout.by_tree else -length % ROW_MULTIPLE), layout.pad_token_id)


def _concatenate(trees: Sequence[Tree], pad_token_id: int) -> Batch:
    """Every sequence in a row of its own, padded on the right: all first answers, then all second ones, and so on."""
    sequences = [torch.from_numpy(ids).long() for tree in trees for ids in tree.sequences()]
    order = np.argsort([n for tree in trees for n in range(len(tree.answers))], kind="stable")
    input_ids_RL = pad_sequence([sequences[n] for n in order], batch_first=True, padding_value=pad_token_id)
    length_N = torch.tensor([len(ids) for ids in sequences])
    return Batch(
        input_ids_RL=input_ids_RL,
        attention_mask_RL=(torch.arange(input_ids_RL.shape[1]) < length_N[order, None]).long(),
        end_row_N=torch.from_numpy(np.argsort(order)),  # the inverse permutation
        end_index_N=length_N - 1,
    )


def _pack(rows: Sequence[Sequence[Tree]], length: int, pad_token_id: int) -> Batch:
    """Each row's trees one after the other, padded on the right to `length`."""
    shape = (len(rows), length)
    input_ids, tree_ids = np.full(shape, pad_token_id), np.full(shape, -1)
    branch_ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    ends = []
    for r, row in enumerate(rows):
        stop = 0
        for t, tree in enumerate(row):
            for b, tokens in enumerate((tree.prefix, *tree.answers)):
                start, stop = stop, stop + len(tokens)
                piece, offset = (r, slice(start, stop)), len(tree.prefix) if b else 0
                input_ids[piece], tree_ids[piece], branch_ids[piece] = tokens, t, b
                positions[piece] = np.arange(offset, offset + len(tokens))
                if b:
                    ends.append((r, stop - 1))
    end_row_N, end_index_N = torch.tensor(ends).unbind(1)
    return Batch(
        input_ids_RL=torch.from_numpy(input_ids),
        end_row_N=end_row_N,
        end_index_N=end_index_N,
        tree_RL=torch.from_numpy(tree_ids),
        branch_RL=torch.from_numpy(branch_ids),
        position_RL=torch.from_numpy(positions),
        tree_parts=[[len(t.prefix), *map(len, t.answers)] for t in rows[0]] if positions.size == stop else None,
    )
