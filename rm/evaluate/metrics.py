"""Training meters (sums and counts, one reduce a log) and evaluation metrics from the table of rewards."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from rm.evaluate.statistics import (
    accuracy,
    accuracy_ceiling,
    accuracy_interval,
    calibration_error,
    correlation,
    mean,
    percentiles,
    quantiles,
    ranks,
    resamples,
    share_between,
    share_interval,
    sigmoid,
    standard_deviation,
    temperature,
)
from rm.loss import pairwise_loss

SHARES = ("accuracy", "ties", "null_length_accuracy")  # of pairs
QUANTILES = {"margin_q05": 0.05, "margin_q25": 0.25, "margin_q50": 0.5, "margin_q75": 0.75, "margin_q95": 0.95}


def measures(
    table: pd.DataFrame,
    weight: np.ndarray,
    *,
    center_rewards_coefficient: float | None = None,
    label_smoothing: float = 0.0,
) -> dict[str, np.ndarray]:
    """Every statistic of an evaluation that has an interval, [...] each, in float64; NaN if a reward is not finite.

    Args:
        table: a row for each of n pairs, see `rm.evaluate.table.pair_table`.
        weight: how often each pair counts, [..., n]: ones, or the counts of resamples (`rm.statistics`).
        center_rewards_coefficient, label_smoothing: of the loss.
    """
    chosen, rejected = (table[f"reward_{side}"].to_numpy(np.float64) for side in ("chosen", "rejected"))
    is_finite = bool(np.isfinite(chosen).all() and np.isfinite(rejected).all())
    chosen, rejected = (np.nan_to_num(rewards, posinf=0, neginf=0) for rewards in (chosen, rejected))
    length_chosen, length_rejected = (table[f"length_{side}"].to_numpy() for side in ("chosen", "rejected"))
    margin, longer = chosen - rejected, length_chosen - length_rejected
    p_chosen, rewards = sigmoid(margin), np.concatenate([chosen, rejected])
    both = np.concatenate([weight, weight], axis=-1)  # of the 2n rewards, first those of the chosen answers

    def loss(chosen_B: np.ndarray, rejected_B: np.ndarray) -> np.ndarray:
        loss_B = pairwise_loss(
            torch.tensor(chosen_B),
            torch.tensor(rejected_B),
            torch.tensor(table["data_margin"].to_numpy(np.float64)),
            center_rewards_coefficient=center_rewards_coefficient,
            label_smoothing=label_smoothing,
        )
        return mean(loss_B.numpy(), weight)

    answer_length = np.concatenate([length_chosen, length_rejected]) - np.tile(table["prefix_length"].to_numpy(), 2)
    values = {
        "loss": loss(chosen, rejected),
        "accuracy": accuracy(margin, weight),
        "ties": mean(margin == 0, weight),
        "margin": mean(margin, weight),
        **dict(zip(QUANTILES, quantiles(margin, QUANTILES.values(), weight), strict=True)),
        "reward_chosen": mean(chosen, weight),
        "reward_rejected": mean(rejected, weight),
        "reward_mean": mean(rewards, both),
        "reward_std": standard_deviation(rewards, both),
        "brier": mean((1 - p_chosen) ** 2, weight),
        "ece": calibration_error(p_chosen, margin, weight),
        "temperature": temperature(margin, weight),
        "reward_length_spearman": correlation(ranks(rewards), ranks(answer_length), both),
        "margin_length_spearman": correlation(ranks(margin), ranks(longer), weight),
        "prompt_share": share_between(rewards, np.tile(table["prompt"].to_numpy(), 2), both),
    }
    if not is_finite:  # then no number says anything about all pairs
        values = {name: np.full_like(value, np.nan) for name, value in values.items()}
    values["null_length_accuracy"] = accuracy(longer, weight)
    values["null_prompt_loss"] = loss(np.zeros(len(table)), np.zeros(len(table)))
    if "true_margin" in table:
        true_margin = table["true_margin"].to_numpy(np.float64)
        values["accuracy_ceiling"] = accuracy_ceiling(true_margin, weight)
        if is_finite:
            values["spearman_true_margin"] = correlation(ranks(margin), ranks(true_margin), weight)
    return values


def evaluation_metrics(
    table: pd.DataFrame,
    *,
    center_rewards_coefficient: float | None = None,
    label_smoothing: float = 0.0,
    prefix: str = "eval",
) -> dict[str, float]:
    """Metrics of an evaluation set, from one table in float64: independent of how it was cut into batches.

    Args:
        table: a row for each of n pairs, see `rm.evaluate.table.pair_table`. With a column `subset` there are besides
            `eval/<subset>/accuracy`, its interval and `eval/<subset>/pairs`; with `true_margin`, log-odds that chosen
            is better, the best possible accuracy E[max(p, 1-p)] and the rank correlation of learned and true margins.
        center_rewards_coefficient, label_smoothing: of the loss.
        prefix: what the metrics' names begin with, here and above `eval`.
    """
    options = {"center_rewards_coefficient": center_rewards_coefficient, "label_smoothing": label_smoothing}
    values = {name: float(value) for name, value in measures(table, np.ones(len(table)), **options).items()}
    margin = (table["reward_chosen"] - table["reward_rejected"]).to_numpy()
    low, high = accuracy_interval(margin, table["prompt"].to_numpy())
    rewards = table[["reward_chosen", "reward_rejected"]].to_numpy()
    metrics = {f"{prefix}/{name}": value for name, value in values.items()}
    metrics |= {
        f"{prefix}/accuracy_low": low,
        f"{prefix}/accuracy_high": high,
        f"{prefix}/reward_min": float(rewards.min()),
        f"{prefix}/reward_max": float(rewards.max()),
        f"{prefix}/pairs": len(table),
        f"{prefix}/prompts": table["prompt"].nunique(),
    }
    if "subset" in table:
        for subset, rows in table.assign(margin=margin).groupby("subset"):
            low, high = accuracy_interval(rows["margin"].to_numpy(), rows["prompt"].to_numpy())
            of_subset = {"accuracy": float(accuracy(rows["margin"].to_numpy())), "accuracy_low": low}
            of_subset |= {"accuracy_high": high, "pairs": len(rows)}
            metrics |= {f"{prefix}/{subset}/{name}": value for name, value in of_subset.items()}
    return metrics


def metric_names() -> list[str]:
    """All metrics of an evaluation but those of subsets and sets."""
    number = "reward_chosen reward_rejected data_margin true_margin length_chosen length_rejected prefix_length prompt"
    return list(evaluation_metrics(pd.DataFrame(dict.fromkeys(number.split(), [0, 1]))))


def evaluation_intervals(
    table: pd.DataFrame,
    *,
    center_rewards_coefficient: float | None = None,
    label_smoothing: float = 0.0,
    prefix: str = "eval",
) -> dict[str, tuple[float, float]]:
    """95% intervals of the metrics in `measures`, by the bootstrap over prompts; {} where there is one prompt.

    A number that is an extreme (`reward_min`), a count, or of a subset (`rm.breakdown`) is not among them.
    """
    if table["prompt"].nunique() < 2:
        return {}
    options = {"center_rewards_coefficient": center_rewards_coefficient, "label_smoothing": label_smoothing}
    parts = [measures(table, counts, **options) for counts in resamples(table["prompt"].to_numpy())]
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    intervals = {f"{prefix}/{name}": percentiles(values_R) for name, values_R in values.items()}
    found, num_prompts = measures(table, np.ones(len(table)), **options), table["prompt"].nunique()
    for name in SHARES:
        intervals[f"{prefix}/{name}"] = share_interval(float(found[name]), values[name], num_prompts)
    return intervals
