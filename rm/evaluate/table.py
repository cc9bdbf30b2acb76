"""The evaluation table (one row per comparison, with rewards): its metrics, slices, and the comparison of two models.

A slice has `bin` (its name), `low` and `high` (the ends of its range, or None) and the numbers of `accuracy_of`.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from rm.config.options import LossOptions
from rm.config.redact import redact
from rm.data.columns import ANSWER_COLUMNS
from rm.data.dataset import PreferenceData
from rm.evaluate.metrics import METRICS, Rows
from rm.evaluate.rewardbench import rewardbench_metrics
from rm.evaluate.statistics import BINS, bootstrap, confidence

PLAIN_LOSS = LossOptions()
# further columns, computed once from the texts: {column: function of {"prompt": str, "chosen": str, "rejected": str}}
TEXT_COLUMNS: dict[str, Callable[[dict[str, str]], float]] = {}
COMPARED = ("accuracy", "loss", "brier", "ece", "longer_answer_baseline_accuracy", "margin_length_spearman")


def evaluation_table(data: PreferenceData) -> pd.DataFrame:
    """One row per comparison, in the order of the data.

    Columns: `id`; `set`; `row` (row of the raw data of the set, from 0); `number_chosen`, `number_rejected` (numbers of
    the answers in the raw data); `prompt` (hash of the prompt, int64); `index` (index of the prompt in `data`);
    `chosen`, `rejected` (numbers of the answers in that prompt); `length_chosen`, `length_rejected` (tokens of prompt
    and answer); `prefix_length` (tokens that all answers share); `share` (1 / comparisons of the prompt); `subset` and
    every registered column that has values; `TEXT_COLUMNS`; `reward_chosen`, `reward_rejected` (float64, 0 here).
    """
    names = np.repeat([redact(name) for name in data.sets], [part.size for part in data.sets.values()])
    prompts = {"id": data.dataset["id"][:], "set": names, "subset": np.array(data.dataset["subset"][:], object)}
    prompts |= {"prompt": np.array(data.dataset["prompt"][:])}
    table = pd.DataFrame(prompts).loc[data.comparisons["index"]].reset_index(drop=True).join(data.comparisons)
    answers = data.answers.set_index(["index", "answer"])[["number", *ANSWER_COLUMNS]]
    for side in ("chosen", "rejected"):
        table = table.join(answers.add_suffix(f"_{side}"), on=["index", side])
    table = table.drop(columns=[name for name in table if table[name].isna().all()])
    for column, function in TEXT_COLUMNS.items():
        table[column] = [float(function(data.comparison_texts(i))) for i in range(len(table))]
    return table.assign(reward_chosen=0.0, reward_rejected=0.0)


def has_several(table: pd.DataFrame) -> bool:
    """Whether any prompt has more than one comparison."""
    return bool((table["share"] < 1).any())


def difference(table: pd.DataFrame) -> pd.Series:
    """The reward difference: reward_chosen - reward_rejected."""
    return table["reward_chosen"] - table["reward_rejected"]


def worst(table: pd.DataFrame, count: int) -> np.ndarray:
    """Rows of at most `count` wrong comparisons, one per prompt, the lowest reward difference first. Without ties."""
    margin = difference(table).where(table["p_chosen"] != 0.5, 0)
    order = margin[margin < 0].sort_values(kind="stable").index
    return order[~table.loc[order, "index"].duplicated()][:count].to_numpy()


# ---------------------------------------------------------------- metrics and intervals
def measures(
    table: pd.DataFrame, counts: np.ndarray, names: Iterable[str], options: LossOptions = PLAIN_LOSS
) -> dict[str, Any]:
    """The metrics among `names` that the table has, for counts of each comparison [..., C]; [...] each.

    A comparison weighs its count times its `share`, so that a prompt counts once; in the loss also its `weight`.
    """
    rows, weight, values = Rows(table, options), counts * table["share"].to_numpy(), {}
    for name in names:
        if METRICS[name].only_if(table):
            try:
                with np.errstate(invalid="ignore", divide="ignore"):
                    values[name] = METRICS[name].function(rows, weight)
            except FloatingPointError:
                values[name] = np.full(counts.shape[:-1], np.nan)
    return values


def accuracy_of(table: pd.DataFrame) -> dict[str, float]:
    """`comparisons`, `accuracy`, `accuracy_low` and `accuracy_high` of these comparisons."""
    measure = partial(measures, table, names=["accuracy"])
    low, high = bootstrap(measure, table["prompt"].to_numpy(), ["accuracy"])["accuracy"]
    accuracy = float(measure(np.ones(len(table)))["accuracy"])
    return {"comparisons": len(table), "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}


def evaluation_metrics(table: pd.DataFrame, options: LossOptions) -> dict[str, float]:
    """All metrics of an evaluation: `eval/NAME`, `eval/SUBSET/accuracy`, scores of RewardBench.

    With several sets `eval/NAME` is of all comparisons, and `eval/SET/NAME` and so on of each set.
    """
    metrics = {}
    for prefix, part, subsets in _parts(table):
        values = measures(part, np.ones(len(part)), METRICS, options) | accuracy_of(part)
        for subset, rows in subsets.items():
            values |= {f"{subset}/{name}": value for name, value in accuracy_of(rows).items()}
        values |= rewardbench_metrics(subsets)
        metrics |= {f"{prefix}/{name}": v if isinstance(v, int) else float(v) for name, v in values.items()}
    return metrics


def evaluation_intervals(table: pd.DataFrame, options: LossOptions) -> dict[str, tuple[float, float]]:
    """95% intervals of the metrics of `evaluation_metrics` that have one, without those of subsets."""
    names = [name for name, definition in METRICS.items() if definition.has_interval]
    intervals, fractions = {}, [name for name in names if METRICS[name].unit == "fraction"]
    for prefix, part, subsets in _parts(table):
        measure = partial(measures, part, names=names, options=options)
        found = bootstrap(measure, part["prompt"].to_numpy(), fractions)
        found |= rewardbench_metrics(subsets, intervals=True)
        intervals |= {f"{prefix}/{name}": ends for name, ends in found.items()}
    return intervals


def _parts(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, dict[str, pd.DataFrame]]]:
    """(prefix of names, comparisons, their subsets) of the whole table and of each set, if there are several."""
    sets = {f"eval/{name}": part for name, part in table.groupby("set", sort=False)}
    sets = {"eval": table} if len(sets) == 1 else {"eval": table.drop(columns="subset", errors="ignore")} | sets
    for prefix, part in sets.items():
        yield prefix, part, dict(list(part.groupby("subset"))) if "subset" in part else {}


# ---------------------------------------------------------------- slices
def by_set(table: pd.DataFrame) -> pd.DataFrame:
    """One slice per evaluation set."""
    return _slices((name, None, None, part) for name, part in table.groupby("set", sort=False))


def by_subset(table: pd.DataFrame) -> pd.DataFrame:
    """One slice per subset, or per set and subset if there are several sets. Empty if the data have no subsets."""
    keys = ["set", "subset"] if table["set"].nunique() > 1 else ["subset"]
    parts = table.dropna(subset="subset").groupby(keys) if "subset" in table else ()
    return _slices(("/".join(names), None, None, part) for names, part in parts)


def by_margin(table: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """Bins of |reward_chosen - reward_rejected| with about equally many comparisons."""
    return _by_value(table, difference(table).abs(), bins, "{:.3g} to {:.3g}")


def by_data_margin(table: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """Bins of the margin in the data with about equally many comparisons. Sets without margins are left out."""
    has_margin = table.groupby("set")["margin"].transform("any")
    return _by_value(table, table["margin"].where(has_margin), bins, "{:.3g} to {:.3g}")


def by_length_difference(table: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """Bins of length_chosen - length_rejected (tokens) with about equally many comparisons."""
    return _by_value(table, table["length_chosen"] - table["length_rejected"], bins, "{:+.0f} to {:+.0f}")


def reliability(table: pd.DataFrame) -> pd.DataFrame:
    """The bins of the expected calibration error. If the model is calibrated, accuracy equals mean `confidence`."""
    table = table[np.isfinite(difference(table))]
    confidence_C, bin_C = confidence(difference(table).to_numpy())
    edges = 0.5 + np.arange(BINS + 1) / (2 * BINS)
    parts = table.assign(confidence=confidence_C).groupby(bin_C)
    bins = _slices((f"{edges[b]:.2f} to {edges[b + 1]:.2f}", edges[b], edges[b + 1], part) for b, part in parts)
    return bins.assign(confidence=parts["confidence"].mean().to_numpy())


def slices(table: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """All non-empty slices, for JSON: {name of the function above: list of slices}."""
    functions = (by_set, by_subset, by_margin, by_data_margin, by_length_difference, reliability)
    return {f.__name__: found.to_dict("records") for f in functions if len(found := f(table))}


def _by_value(table: pd.DataFrame, value: pd.Series, bins: int, label: str) -> pd.DataFrame:
    """At most `bins` slices: equal values share a bin."""
    value = value[np.isfinite(value)]
    parts = value.groupby((value.rank(method="min") - 1) * bins // max(len(value), 1))
    ranges = ((float(part.min()), float(part.max()), table.loc[part.index]) for _, part in parts)
    return _slices((label.format(low, high), low, high, part) for low, high, part in ranges)


def _slices(parts: Iterable[tuple[str, float | None, float | None, pd.DataFrame]]) -> pd.DataFrame:
    rows = [{"bin": name, "low": low, "high": high} | accuracy_of(part) for name, low, high, part in parts]
    return pd.DataFrame(rows, columns="bin low high comparisons accuracy accuracy_low accuracy_high".split())


# ---------------------------------------------------------------- two models
def compare_tables(
    table: pd.DataFrame, other: pd.DataFrame, options: LossOptions = PLAIN_LOSS
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Metrics of two models on their common comparisons: values, and 95% intervals from the same bootstrap resamples.

    `compare/NAME` belongs to the first model and `compare/other_NAME` to the other one. `compare/NAME_difference` is
    the first minus the other.
    """
    place = ["set", "row", "number_chosen", "number_rejected"]  # in the raw data: does not depend on the tokenizer
    table, other = (t.set_index([*place, t.groupby(place).cumcount()]) for t in (table, other))
    common = table.index.intersection(other.index, sort=False)
    table, other = table.loc[common], other.loc[common]

    def both(counts: np.ndarray) -> dict[str, np.ndarray]:
        this, that = (measures(t, counts, COMPARED, options) for t in (table, other))
        values = {}
        for name in COMPARED:
            values |= {name: this[name], f"other_{name}": that[name], f"{name}_difference": this[name] - that[name]}
        return {f"compare/{name}": value for name, value in values.items()}

    values = {name: float(value) for name, value in both(np.ones(len(common))).items()}
    values["compare/comparisons"] = len(common)
    return values, bootstrap(both, table["prompt"].to_numpy(), ["compare/accuracy", "compare/other_accuracy"])
