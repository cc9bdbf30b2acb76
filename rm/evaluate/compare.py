"""Two reward models on the same pairs: the paired difference of their metrics, with its interval."""

from __future__ import annotations

import numpy as np
import pandas as pd

from rm.evaluate.metrics import measures
from rm.evaluate.statistics import percentiles, resamples, share_interval

KEYS = ["set", "row"]  # what makes a pair the same in two tables: the place in the data, not the tokens
COMPARED = ("accuracy", "loss", "brier", "ece", "null_length_accuracy", "margin_length_spearman")


def same_pairs(table: pd.DataFrame, other: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The pairs that are in both tables, in the order of the first. Tokenizers differ, and with them what is too long.

    Raises:
        ValueError: there is none.
    """
    common = table[KEYS].merge(other[KEYS], on=KEYS)
    if not len(common):
        raise ValueError("the two models have no pair in common")
    return common.merge(table, on=KEYS), common.merge(other, on=KEYS)


def compare_tables(
    table: pd.DataFrame,
    other: pd.DataFrame,
    *,
    center_rewards_coefficient: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Metrics of both models on the pairs that both have, and their differences: (values, 95% intervals).

    `compare/NAME` is the first model's value, `compare/other_NAME` the other's, `compare/NAME_difference` first minus
    other. Both are measured on the same resamples of prompts, so that what a prompt does to both falls out.
    `compare/agreement`: share of pairs that both order alike; `compare/only_this_right`, `compare/only_other_right`:
    share of pairs that one of them has right and the other has not (a tie is not right).
    """
    table, other = same_pairs(table, other)
    options = {"center_rewards_coefficient": center_rewards_coefficient, "label_smoothing": label_smoothing}
    order, other_order = (np.sign((t["reward_chosen"] - t["reward_rejected"]).to_numpy()) for t in (table, other))

    def both(weight: np.ndarray) -> dict[str, np.ndarray]:
        ours, theirs = measures(table, weight, **options), measures(other, weight, **options)
        values = {}
        for name in COMPARED:
            values |= {name: ours[name], f"other_{name}": theirs[name], f"{name}_difference": ours[name] - theirs[name]}
        shares = {
            "agreement": order == other_order,
            "only_this_right": (order > 0) & (other_order <= 0),
            "only_other_right": (order <= 0) & (other_order > 0),
        }
        return values | {name: weight @ share / weight.sum(-1) for name, share in shares.items()}

    values = {f"compare/{name}": float(value) for name, value in both(np.ones(len(table))).items()}
    values["compare/pairs"] = len(table)
    if table["prompt"].nunique() < 2:
        return values, {}
    parts = [both(counts) for counts in resamples(table["prompt"].to_numpy())]
    resampled = {f"compare/{name}": np.concatenate([part[name] for part in parts]) for name in parts[0]}
    intervals = {name: percentiles(values_R) for name, values_R in resampled.items()}
    for name in ("accuracy", "other_accuracy", "agreement", "only_this_right", "only_other_right"):
        key = f"compare/{name}"
        intervals[key] = share_interval(values[key], resampled[key], table["prompt"].nunique())
    return values, intervals
