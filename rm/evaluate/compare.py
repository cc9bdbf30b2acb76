"""Two reward models on the same comparisons: paired differences of their metrics with 95% intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd

from rm.config.errors import InputError
from rm.config.options import LossOptions
from rm.evaluate.metrics import PLAIN_LOSS, measures
from rm.evaluate.statistics import bootstrap

KEYS = ["set", "row", "number"]  # the same comparison in two tables has the same place in the data, whatever its tokens
COMPARED = ("accuracy", "loss", "brier", "ece", "longer_answer_baseline_accuracy", "margin_length_spearman")
FRACTIONS = ("accuracy", "other_accuracy", "agreement", "only_this_right", "only_other_right")


def same_pairs(table: pd.DataFrame, other: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The comparisons in both tables, in the order of the first; raises `InputError` if there is none."""
    table, other = (t.assign(number=t.groupby(["set", "row"]).cumcount()) for t in (table, other))
    common = table[KEYS].merge(other[KEYS], on=KEYS)
    if not len(common):
        raise InputError("the two models have no pair in common")
    return common.merge(table, on=KEYS), common.merge(other, on=KEYS)


def compare_tables(
    table: pd.DataFrame, other: pd.DataFrame, options: LossOptions = PLAIN_LOSS
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Values and 95% intervals of metrics of both models on the comparisons that both have, from the same resamples.

    `compare/NAME` is of the first model, `compare/other_NAME` of the other one, `compare/NAME_difference` first minus
    other. `compare/agreement`: both prefer the same answer; `compare/only_this_right`, `compare/only_other_right`: one
    model prefers the chosen answer and the other does not (fractions of the comparisons).
    """
    table, other = same_pairs(table, other)
    ours, theirs = (np.sign(t["reward_chosen"] - t["reward_rejected"]).to_numpy() for t in (table, other))
    shares = {"agreement": ours == theirs, "only_this_right": (ours > 0) & (theirs <= 0)}
    shares["only_other_right"] = (ours <= 0) & (theirs > 0)

    def both(counts: np.ndarray) -> dict[str, np.ndarray]:
        this, that = (measures(t, counts, COMPARED, options) for t in (table, other))
        weight, values = counts * table["share"].to_numpy(), {}
        for name in COMPARED:
            values |= {name: this[name], f"other_{name}": that[name], f"{name}_difference": this[name] - that[name]}
        values |= {name: weight @ share / weight.sum(-1) for name, share in shares.items()}
        return {f"compare/{name}": value for name, value in values.items()}

    values = {name: float(value) for name, value in both(np.ones(len(table))).items()} | {"compare/pairs": len(table)}
    return values, bootstrap(both, table["prompt"].to_numpy(), [f"compare/{name}" for name in FRACTIONS])
