"""Training meters (sums and counts, one reduce a log) and evaluation metrics from the table of rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rm.loss import pairwise_loss


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


def accuracy(margin: np.ndarray) -> float:
    """Fraction of pairs whose chosen answer has the higher reward; a tie counts half. `margin` = r_c - r_r, [n]."""
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


def wilson_interval(p: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% score interval of a proportion `p` of `n` independent pairs (Wilson 1927)."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation with mean ranks for ties, as `scipy.stats.spearmanr`; NaN if one side is constant."""
    ranks = [pd.Series(v).rank().to_numpy() for v in (x, y)]
    if any(r.std() == 0 for r in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def accuracy_ceiling(true_margin: np.ndarray) -> float:
    """The best possible accuracy, mean of max(p, 1 - p) with p = sigmoid(true_margin); `true_margin`: log-odds, [n]."""
    return float(np.mean(1 / (1 + np.exp(-np.abs(true_margin)))))


def evaluation_metrics(
    rewards: np.ndarray,
    *,
    margin: np.ndarray,
    subset: Sequence[str] | None = None,
    true_margin: np.ndarray | None = None,
    center_rewards_coefficient: float | None = None,
    label_smoothing: float = 0.0,
    prefix: str = "eval",
) -> dict[str, float]:
    """Metrics of an evaluation set, from one table in float64: independent of how it was cut into batches.

    Args:
        rewards: (chosen, rejected) of each pair, [n, 2].
        margin: the data's margins, [n] (they enter the loss).
        subset: group of each pair; adds `eval/<subset>/accuracy` and `eval/<subset>/pairs`.
        true_margin: log-odds that chosen is better, [n], where the data's true reward is known; adds the best possible
            accuracy E[max(p, 1-p)] and the rank correlation of learned and true reward differences.
        prefix: what the metrics' names begin with, here and above `eval`.
    """
    table = torch.from_numpy(np.ascontiguousarray(rewards, dtype=np.float64))
    loss = pairwise_loss(
        table[:, 0],
        table[:, 1],
        torch.from_numpy(np.asarray(margin, dtype=np.float64)),
        center_rewards_coefficient=center_rewards_coefficient,
        label_smoothing=label_smoothing,
    )
    learned = rewards[:, 0] - rewards[:, 1]
    low, high = wilson_interval(accuracy(learned), len(learned))
    metrics = {
        f"{prefix}/loss": loss.mean().item(),
        f"{prefix}/accuracy": accuracy(learned),
        f"{prefix}/accuracy_low": low,
        f"{prefix}/accuracy_high": high,
        f"{prefix}/ties": float(np.mean(learned == 0)),
        f"{prefix}/margin": float(learned.mean()),
        f"{prefix}/reward_chosen": float(rewards[:, 0].mean()),
        f"{prefix}/reward_rejected": float(rewards[:, 1].mean()),
        f"{prefix}/reward_std": float(rewards.std()),
        f"{prefix}/pairs": len(learned),
    }
    if true_margin is not None:
        metrics[f"{prefix}/accuracy_ceiling"] = accuracy_ceiling(np.asarray(true_margin, dtype=np.float64))
        metrics[f"{prefix}/spearman_true_margin"] = spearman(learned, np.asarray(true_margin))
    if subset is not None:
        groups = np.asarray(subset, dtype=str)
        for group in np.unique(groups):
            metrics[f"{prefix}/{group}/accuracy"] = accuracy(learned[groups == group])
            metrics[f"{prefix}/{group}/pairs"] = int(np.sum(groups == group))
    return metrics
