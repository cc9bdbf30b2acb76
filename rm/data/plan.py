"""The step plan: which prompts make which optimizer step, on which process, in which micro-batch.

Everything here is a pure function of (seed, step, number of processes). Which prompts make a step depends on the seed
alone. How they are split into rows and micro-batches depends on the hardware and changes results by rounding only.
"""

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

ROW_TOKENS = 256  # rows with a dense mask are filled up to this, or to their largest tree: a mask costs length squared
ROW_MULTIPLE = 64  # tokens: the lengths of these rows are multiples of it, so that there are few shapes


@dataclass(frozen=True)
class Layout:
    """How prompts become the rows of a batch.

    name: "shared_prefix" (trees: the prompt once, then its answers) or "concatenated" (every sequence by itself).
    reason: why it was chosen. by_tree: the attention kernel computes tree by tree, so that one long row costs no more
    than several short ones. A micro-batch is then one row of trees without padding, of `concatenated` too.
    """

    name: str
    pad_token_id: int
    by_tree: bool = False
    reason: str = "as configured"


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass on one process: for each row, the prompts in it (indices into the data).

    A dummy micro-batch repeats a prompt with weight 0, so that every process runs the same number of forward passes.
    """

    rows: list[list[int]]
    is_dummy: bool = False

    @property
    def prompts(self) -> list[int]:
        """The prompts in the order of the batch."""
        return [i for row in self.rows for i in row]


@lru_cache(maxsize=2)  # a step may look at two epochs
def epoch_order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of all prompts, int64 [num_prompts]: a function of (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_prompts)


def balance(costs: Sequence[int], num_bins: int) -> list[list[int]]:
    """Distribute positions of `costs` over bins of nearly equal total cost: the largest first, into the lightest bin.

    Source: Graham 1969, LPT rule (at most 4/3 of the best possible maximum).
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for i in np.argsort(-np.asarray(costs), kind="stable").tolist():
        load, b = heapq.heappop(heap)
        bins[b].append(i)
        heapq.heappush(heap, (load + int(costs[i]), b))
    return bins


def group_rows(costs: Sequence[int], row_tokens: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """Groups of rows of positions of `costs`: (rows in the group) x (their length) <= `micro_batch_tokens`, or one row.

    The length is that of the longest prompt that is left. With `row_tokens` > 0 it is at least that, and each row is
    filled with the largest prompts that still fit (first-fit decreasing, Johnson 1973). 0: one in each row. Rows that
    share a group are padded: their length is rounded up.
    """
    order, groups = np.argsort(-np.asarray(costs), kind="stable")[::-1].tolist(), []
    ascending = [int(costs[i]) for i in order]
    while order:
        length, group = max(ascending[-1], row_tokens), []
        length += -length % ROW_MULTIPLE if 0 < row_tokens < micro_batch_tokens else 0
        while order and (not group or (len(group) + 1) * length <= micro_batch_tokens):
            row, room = [order.pop()], length - ascending.pop()
            while row_tokens and (n := bisect.bisect(ascending, room)):
                row.append(order.pop(n - 1))
                room -= ascending.pop(n - 1)
            group.append(row)
        groups.append(group)
    return groups


def plan_micro_batches(
    indices: np.ndarray, costs: np.ndarray, layout: Layout, micro_batch_tokens: int, num_processes: int = 1
) -> list[list[MicroBatch]]:
    """Split prompts into micro-batches for every process, with balanced token counts.

    Args:
        indices: prompts of one optimizer step (or of a whole evaluation set), int [n].
        costs: tokens of each of those prompts under `layout`, int [n].
        micro_batch_tokens: tokens of one forward pass, padding included; a larger prompt runs alone.

    Returns:
        For each process its micro-batches; all lists have the same length.
    """
    plans: list[list[MicroBatch]] = []
    for share in balance(costs, num_processes):
        row_tokens = min(ROW_TOKENS, micro_batch_tokens) if layout.name == "shared_prefix" else 0
        row_tokens = micro_batch_tokens if layout.by_tree else row_tokens
        groups = group_rows(costs[share], row_tokens, micro_batch_tokens)
        plans.append([MicroBatch([[int(indices[share[i]]) for i in row] for row in group]) for group in groups])
    dummy = MicroBatch([[int(indices[int(np.argmin(costs))])]], is_dummy=True)
    longest = max(map(len, plans))
    return [plan + [dummy] * (longest - len(plan)) for plan in plans]


class StepPlan:
    """The prompts of every optimizer step, and this process's micro-batches of it.

    Args:
        data: the training data, with `len()` and `costs(layout)`.
        config: the options `micro_batch_tokens` and `seed` (which decides the order).
        train_batch_size: prompts per optimizer step over all processes; the last step of an epoch has the rest.
    """

    def __init__(
        self, data: Any, layout: Layout, config: Any, train_batch_size: int, process_index: int, num_processes: int
    ):
        self.costs, self.num_prompts = data.costs(layout), len(data)
        self.layout, self.train_batch_size = layout, train_batch_size
        self.micro_batch_tokens, self.seed = config.micro_batch_tokens, config.seed
        self.process_index, self.num_processes = process_index, num_processes
        self.steps_per_epoch = math.ceil(self.num_prompts / train_batch_size)

    def total_steps(self, num_train_epochs: float, max_steps: int = -1) -> int:
        """Optimizer steps of the whole run; `max_steps` > 0 overrides the epochs."""
        return max_steps if max_steps > 0 else max(1, math.ceil(num_train_epochs * self.steps_per_epoch))

    def prompts(self, step: int) -> np.ndarray:
        """The prompts of optimizer step `step` (from 0) over all processes, int64 [n]."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.train_batch_size
        return epoch_order(self.num_prompts, self.seed, epoch)[first : first + self.train_batch_size]

    def step(self, step: int) -> tuple[list[MicroBatch], int]:
        """This process's micro-batches of optimizer step `step`, and the number of prompts over all processes."""
        prompts = self.prompts(step)
        costs = self.costs[prompts]
        plans = plan_micro_batches(prompts, costs, self.layout, self.micro_batch_tokens, self.num_processes)
        return plans[self.process_index], len(prompts)

    def halve_micro_batches(self, step: int) -> bool:
        """Halve `micro_batch_tokens`; False if the largest prompt of `step` would run alone as it did before."""
        if self.micro_batch_tokens <= int(self.costs[self.prompts(step)].max()):
            return False
        self.micro_batch_tokens //= 2
        return True
