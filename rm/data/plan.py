"""The step plan: which pairs make which optimizer step, on which process, in which micro-batch.

Everything here is a pure function of (seed, step, number of processes). Which pairs make a step depends on the seed
alone; how they are cut into rows and micro-batches depends on the hardware and changes no result beyond rounding.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Packed rows are filled up to this, or to the longest pair: a dense mask costs the row's square.
ROW_TOKENS = 256


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass on one process: for each row, the data set's indices of the pairs in it.

    A filler repeats a pair with weight 0, so that every process runs the same number of forward passes. Packed rows are
    padded to a multiple of `pad_to_multiple_of`.
    """

    rows: list[list[int]]
    is_filler: bool = False
    pad_to_multiple_of: int = 1

    @property
    def num_pairs(self) -> int:
        """Pairs that count (0 for a filler)."""
        return 0 if self.is_filler else sum(map(len, self.rows))


@dataclass(frozen=True)
class PairLengths:
    """Lengths in tokens, one entry a pair: of both full sequences, and of the prefix that they share."""

    chosen: np.ndarray
    rejected: np.ndarray
    prefix: np.ndarray

    def cost(self, layout: str) -> np.ndarray:
        """Tokens that a pair takes: its shared-prefix row, or two rows padded to the longer sequence."""
        if layout == "shared_prefix":
            return self.chosen + self.rejected - self.prefix
        return 2 * np.maximum(self.chosen, self.rejected)

    def short_ones(self, count: int = 4) -> list[int]:
        """Indices of `count` pairs, or all, from the tenth percentile of lengths on: for a check that must be quick."""
        order = np.argsort(self.cost("shared_prefix"), kind="stable")
        return order[min(len(order) // 10, max(len(order) - count, 0)) :][:count].tolist()


@lru_cache(maxsize=2)  # a step may look at two epochs
def epoch_order(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of all pairs [num_pairs], a function of (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_pairs)


def deal(costs: Sequence[int], num_bins: int) -> list[list[int]]:
    """Deal items to bins of nearly equal total cost: the largest first, each to the lightest bin.

    Returns the positions in `costs` for each bin (Graham's LPT rule: at most 4/3 of the best possible maximum).
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for item in np.argsort(-np.asarray(costs), kind="stable").tolist():
        load, b = heapq.heappop(heap)
        bins[b].append(item)
        heapq.heappush(heap, (load + int(costs[item]), b))
    return bins


def pack_rows(costs: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Pack items into as few rows of nearly equal length as fit in `row_tokens` (or in the longest item)."""
    if len(costs) == 0:
        return []
    capacity = max(row_tokens, int(np.max(costs)))
    num_rows = math.ceil(int(np.sum(costs)) / capacity)
    while True:
        rows = deal(costs, num_rows)
        if max(sum(int(costs[i]) for i in row) for row in rows) <= capacity:
            return rows
        num_rows += 1 + num_rows // 50


def cut_micro_batches(rows: list[list[int]], widths: Sequence[int], micro_batch_tokens: int) -> list[list[list[int]]]:
    """Group rows, longest first, so that (rows in the group) x (its longest width) <= `micro_batch_tokens`.

    A row that is wider than the budget on its own is a group of one.
    """
    groups: list[list[list[int]]] = []
    width = 0
    for r in np.argsort(-np.asarray(widths), kind="stable").tolist():
        if groups and (len(groups[-1]) + 1) * width <= micro_batch_tokens:
            groups[-1].append(rows[r])
        else:
            groups.append([rows[r]])
            width = int(widths[r])
    return groups


def plan_micro_batches(
    indices: np.ndarray,
    costs: np.ndarray,
    layout: str,
    micro_batch_tokens: int,
    num_processes: int = 1,
    block_size: int | None = None,
) -> list[list[MicroBatch]]:
    """Cut the pairs `indices` into micro-batches for every process, with balanced token counts.

    Args:
        indices: data set indices of the pairs of one optimizer step (or of a whole evaluation set), int [n].
        costs: tokens of each of those pairs under `layout` (`PairLengths.cost`), int [n].
        layout: "shared_prefix" (several pairs packed in a row) or "concatenated" (a pair is two padded rows).
        micro_batch_tokens: padded tokens of one forward pass; a longer pair runs alone.
        block_size: tokens in a block, where the attention kernel skips blocks in which nothing is seen: a micro-batch
            is then one row of whole blocks. None: rows are short, since the kernel computes their whole square.

    Returns:
        For each process its list of micro-batches; all lists are equally long.
    """
    plans: list[list[MicroBatch]] = []
    row_tokens = micro_batch_tokens if block_size else min(ROW_TOKENS, micro_batch_tokens)
    multiple = block_size or 1
    for share in deal(costs, num_processes):
        share_costs = costs[share]
        if layout == "shared_prefix":
            rows = pack_rows(share_costs, row_tokens)
        else:
            rows = [[i] for i in range(len(share))]
        widths = [int(share_costs[row].sum()) for row in rows]
        groups = cut_micro_batches(rows, widths, micro_batch_tokens)
        named = [[[int(indices[share[i]]) for i in row] for row in group] for group in groups]
        plans.append([MicroBatch(group, pad_to_multiple_of=multiple) for group in named])
    filler = MicroBatch([[int(indices[int(np.argmin(costs))])]], is_filler=True, pad_to_multiple_of=multiple)
    longest = max(map(len, plans))
    return [plan + [filler] * (longest - len(plan)) for plan in plans]


class StepPlan:
    """The pairs of every optimizer step, and this process's micro-batches of it.

    Args:
        lengths: of all training pairs.
        train_batch_size: pairs per optimizer step over all processes; the last step of an epoch has what is left.
        layout, micro_batch_tokens, block_size: see `plan_micro_batches`.
        seed: decides the order.
    """

    def __init__(
        self,
        lengths: PairLengths,
        *,
        train_batch_size: int,
        layout: str,
        micro_batch_tokens: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        block_size: int | None = None,
    ):
        self.costs = lengths.cost(layout)
        self.num_pairs = len(self.costs)
        self.train_batch_size = train_batch_size
        self.layout, self.micro_batch_tokens, self.seed = layout, micro_batch_tokens, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.block_size = block_size
        self.steps_per_epoch = math.ceil(self.num_pairs / train_batch_size)

    def total_steps(self, num_train_epochs: float, max_steps: int = -1) -> int:
        """Optimizer steps of the whole run; `max_steps` > 0 overrides the epochs."""
        return max_steps if max_steps > 0 else max(1, math.ceil(num_train_epochs * self.steps_per_epoch))

    def indices(self, step: int) -> np.ndarray:
        """Data set indices of the pairs in optimizer step `step` (from 0) over all processes."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.train_batch_size
        return epoch_order(self.num_pairs, self.seed, epoch)[first : first + self.train_batch_size]

    def step(self, step: int) -> tuple[list[MicroBatch], int]:
        """This process's micro-batches of optimizer step `step`, and the number of pairs over all processes."""
        indices = self.indices(step)
        plans = plan_micro_batches(
            indices,
            self.costs[indices],
            self.layout,
            self.micro_batch_tokens,
            self.num_processes,
            self.block_size,
        )
        return plans[self.process_index], len(indices)

    def halve_micro_batches(self, step: int) -> bool:
        """Halve `micro_batch_tokens`; False if the longest pair of `step` would run alone as it did before."""
        if self.micro_batch_tokens <= int(self.costs[self.indices(step)].max()):
            return False
        self.micro_batch_tokens //= 2
        return True
