"""Where a reward model is right and where it is not: the accuracy in parts of an evaluation's table."""

from __future__ import annotations

import numpy as np
import pandas as pd

from rm.evaluate.statistics import BINS, accuracy, accuracy_interval, confidence_bin, sigmoid


def by_set(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each evaluation set, as in `by_subset`."""
    named = table.groupby("set", sort=False)
    return _parts(table, [(name, None, None, rows.index) for name, rows in named])


def by_subset(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each `subset` (of each set, where there are several): `bin` (its name), `pairs`, `accuracy` and its 95%
    interval `accuracy_low`, `accuracy_high` (`rm.statistics.accuracy_interval`). Empty where the data have none."""
    if "subset" not in table:
        return _parts(table, [])
    several = table["set"].nunique() > 1
    named = table.dropna(subset="subset").groupby(["set", "subset"] if several else ["subset"])
    return _parts(table, [("/".join(names), None, None, rows.index) for names, rows in named])


def by_margin(table: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """The same by |r_chosen - r_rejected|, how sure the model is: bins of about equally many pairs, `low` to `high`."""
    return _by_value(table, _margin(table).abs(), bins, "{:.3g} to {:.3g}")


def by_data_margin(table: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """The same by the margin that the data give, how clear the preference is; of the sets that give one."""
    given = table.groupby("set")["data_margin"].transform("any")
    return _by_value(table, table["data_margin"][given], bins, "{:.3g} to {:.3g}")


def by_length_difference(table: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """The same by tokens of the chosen answer minus tokens of the rejected one: a model that goes by length is right
    at the one end and wrong at the other."""
    return _by_value(table, table["length_chosen"] - table["length_rejected"], bins, "{:+.0f} to {:+.0f}")


def reliability(table: pd.DataFrame) -> pd.DataFrame:
    """The same by confidence max(p, 1 - p), p = sigmoid(r_chosen - r_rejected), in the bins of the expected calibration
    error, equally wide; `confidence` is the mean in the bin, which a calibrated model's accuracy equals."""
    table = table[np.isfinite(_margin(table))]
    p_chosen = sigmoid(_margin(table).to_numpy())
    confidence, bin_P = np.maximum(p_chosen, 1 - p_chosen), confidence_bin(p_chosen)
    edges = 0.5 + np.arange(BINS + 1) / (2 * BINS)
    parts = [(f"{edges[b]:.2f} to {edges[b + 1]:.2f}", edges[b], edges[b + 1], table.index[bin_P == b])
             for b in np.unique(bin_P)]  # fmt: skip
    return _parts(table, parts).assign(confidence=[confidence[bin_P == b].mean() for b in np.unique(bin_P)])


def breakdowns(table: pd.DataFrame) -> dict[str, list[dict]]:
    """All of these as JSON takes them, without those that are empty."""
    functions = (by_set, by_subset, by_margin, by_data_margin, by_length_difference, reliability)
    return {f.__name__: part.to_dict("records") for f in functions if len(part := f(table))}


def _margin(table: pd.DataFrame) -> pd.Series:
    return table["reward_chosen"] - table["reward_rejected"]


def _by_value(table: pd.DataFrame, value: pd.Series, bins: int, label: str) -> pd.DataFrame:
    """Equal values stand in one bin, so that there may be fewer bins; `low` and `high` are values that occur."""
    value = value[np.isfinite(value)]
    bin_of = (value.rank(method="min") - 1) * bins // max(len(value), 1)
    parts = []
    for rows in value.groupby(bin_of).groups.values():
        low, high = float(value[rows].min()), float(value[rows].max())
        parts.append((label.format(low, high), low, high, rows))
    return _parts(table, parts)


def _parts(table: pd.DataFrame, parts: list[tuple[str, float | None, float | None, pd.Index]]) -> pd.DataFrame:
    rows = []
    for name, low, high, index in parts:
        part = table.loc[index]
        margin, prompt = _margin(part).to_numpy(), part["prompt"].to_numpy()
        row = {"bin": name, "low": low, "high": high, "pairs": len(part), "accuracy": float(accuracy(margin))}
        rows.append(row | dict(zip(("accuracy_low", "accuracy_high"), accuracy_interval(margin, prompt), strict=True)))
    columns = ["bin", "low", "high", "pairs", "accuracy", "accuracy_low", "accuracy_high"]
    return pd.DataFrame(rows, columns=columns).set_index(pd.RangeIndex(len(rows)))
