"""Accuracy in slices of an evaluation table: where a reward model is right and where it is wrong.

A slice has `bin` (its name), `low` and `high` (the values it spans, if it is a range) and the numbers of `accuracy_of`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from rm.evaluate.metrics import accuracy_of
from rm.evaluate.statistics import BINS, confidence


def by_set(table: pd.DataFrame) -> pd.DataFrame:
    """A slice for each evaluation set."""
    return _slices((name, None, None, part) for name, part in table.groupby("set", sort=False))


def by_subset(table: pd.DataFrame) -> pd.DataFrame:
    """A slice for each subset, of each set if there are several; empty if the data have no subsets."""
    keys = ["set", "subset"] if table["set"].nunique() > 1 else ["subset"]
    parts = table.dropna(subset="subset").groupby(keys) if "subset" in table else ()
    return _slices(("/".join(names), None, None, part) for names, part in parts)


def by_margin(table: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """Bins of about equally many comparisons by |reward_chosen - reward_rejected|."""
    return _by_value(table, _margin(table).abs(), bins, "{:.3g} to {:.3g}")


def by_data_margin(table: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """The same by the margin in the data, of the sets that have one."""
    has_margin = table.groupby("set")["margin"].transform("any")
    return _by_value(table, table["margin"].where(has_margin), bins, "{:.3g} to {:.3g}")


def by_length_difference(table: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """The same by length_chosen - length_rejected in tokens."""
    return _by_value(table, table["length_chosen"] - table["length_rejected"], bins, "{:+.0f} to {:+.0f}")


def reliability(table: pd.DataFrame) -> pd.DataFrame:
    """The bins of the expected calibration error; their mean `confidence` equals the accuracy of a calibrated model."""
    table = table[np.isfinite(_margin(table))]
    confidence_C, bin_C = confidence(_margin(table).to_numpy())
    edges = 0.5 + np.arange(BINS + 1) / (2 * BINS)
    parts = table.assign(confidence=confidence_C).groupby(bin_C)
    bins = _slices((f"{edges[b]:.2f} to {edges[b + 1]:.2f}", edges[b], edges[b + 1], part) for b, part in parts)
    return bins.assign(confidence=parts["confidence"].mean().to_numpy())


def slices(table: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """All of these that are not empty, as JSON."""
    functions = (by_set, by_subset, by_margin, by_data_margin, by_length_difference, reliability)
    return {f.__name__: found.to_dict("records") for f in functions if len(found := f(table))}


def _margin(table: pd.DataFrame) -> pd.Series:
    return table["reward_chosen"] - table["reward_rejected"]


def _by_value(table: pd.DataFrame, value: pd.Series, bins: int, label: str) -> pd.DataFrame:
    """Equal values are in one bin, so there may be fewer bins."""
    value = value[np.isfinite(value)]
    parts = value.groupby((value.rank(method="min") - 1) * bins // max(len(value), 1))
    ranges = ((float(part.min()), float(part.max()), table.loc[part.index]) for _, part in parts)
    return _slices((label.format(low, high), low, high, part) for low, high, part in ranges)


def _slices(parts: Iterable[tuple[str, float | None, float | None, pd.DataFrame]]) -> pd.DataFrame:
    rows = [{"bin": name, "low": low, "high": high} | accuracy_of(part) for name, low, high, part in parts]
    return pd.DataFrame(rows, columns=["bin", "low", "high", "pairs", "accuracy", "accuracy_low", "accuracy_high"])
