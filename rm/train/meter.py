"""Sums over the pairs since the last log."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Meter:
    """Sums over pairs since the last log, kept on the device; `read` is the only place that synchronises."""

    NAMES = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected")

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.sums = torch.zeros(len(self.NAMES) + 2, dtype=dtype, device=device)
        self.before_step = self.sums.clone()

    def begin_step(self) -> None:
        """Remember the sums, for `undo_step`."""
        self.before_step.copy_(self.sums)

    def undo_step(self) -> None:
        """Forget what was added since `begin_step`: the step is repeated, or left out."""
        self.sums.copy_(self.before_step)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.sums).all())  # syncs the device here

    def update(self, loss_B: Tensor, chosen_B: Tensor, rejected_B: Tensor, weight_B: Tensor, num_tokens: int) -> None:
        """Add the pairs of one micro-batch; `weight_B` 0 leaves a filler out. `num_tokens`: padded tokens computed."""
        margin_B = (chosen_B - rejected_B).detach()
        accuracy_B = (margin_B > 0) + 0.5 * (margin_B == 0)  # a tie counts half
        values_KB = torch.stack([v.detach().float() for v in (loss_B, accuracy_B, margin_B, chosen_B, rejected_B)])
        self.sums[:-2] += (values_KB * weight_B).to(self.sums.dtype).sum(1)
        self.sums[-2] += weight_B.sum()
        self.sums[-1] += num_tokens

    def read(self, reduce: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], float, float]:
        """(means over all processes' pairs under `train/…`, pairs, padded tokens); starts afresh. Collective."""
        *sums, pairs, tokens = reduce(self.sums).tolist()  # syncs the device here
        self.sums.zero_()
        means = {f"train/{n}": s / pairs if pairs else math.nan for n, s in zip(self.NAMES, sums, strict=True)}
        return means, pairs, tokens

    def state(self, gather: Callable[[Tensor], Tensor]) -> list[list[float]]:
        """Every process's sums since the last log, for a checkpoint. Collective."""
        return gather(self.sums[None]).tolist()

    def load_state(self, state: list[list[float]], process_index: int, num_processes: int) -> None:
        """Put `state` back; on another number of processes than it was made on, all of it on the main process."""
        if len(state) != num_processes:
            state = [[sum(column) for column in zip(*state, strict=True)], *[[0.0] * len(self.sums)] * num_processes]
        self.sums.copy_(torch.tensor(state[process_index], dtype=torch.float64))
