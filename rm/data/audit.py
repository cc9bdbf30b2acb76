"""What became of every comparison: counts by vectorised comparison of token hashes; a table and a report of them.

A comparison is known here by two int64 hashes: of the chosen and of the rejected token sequence.
"""

import hashlib
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from rm.data.columns import ANSWER_COLUMNS, COMPARISON_COLUMNS

DROPPED = ("over_length", "empty", "identical")  # the reasons for which a comparison is dropped

MEANING = {  # the counts, in the order of the table
    "weight": "passes over the data set in an epoch",
    "total": "pairs read",
    "over_length": "dropped: longer than max_length",
    "empty": "dropped: a blank answer, or no tokens",
    "identical": "dropped: chosen and rejected have the same tokens",
    "kept": "pairs used",
    "drawn": "pairs in an epoch, by the weight",
    "truncated": "kept, with the start of the prompt removed",
    "duplicate": "kept, although the same pair came before",
    "contradictory": "kept, although the same two answers also come with the opposite label",
    "in_train": "kept, although the train set has the same two answers",
    "mean_tokens": "tokens in a sequence, mean",
    "max_tokens": "tokens in a sequence, longest",
    "mean_shared_prefix": "tokens that the answers of a prompt share, mean",
}


def audit_counts(arrays: dict[str, np.ndarray], dropped: dict[str, int]) -> dict[str, int | float]:
    """The counts of `MEANING` but `in_train`: of the kept rows' arrays (`arrays_of`) and the dropped comparisons."""
    lengths, prefix = arrays["length"], arrays["prefix_length"]
    keys = pd.Series(_keys(arrays["hash_chosen"], arrays["hash_rejected"]))
    return {
        "total": len(keys) + sum(dropped.values()),
        **dropped,
        "kept": len(keys),
        "truncated": int(arrays["truncated"].sum()),
        "duplicate": int(keys.duplicated().sum()),
        "contradictory": int(keys.isin(_keys(arrays["hash_rejected"], arrays["hash_chosen"])).sum()),
        "mean_tokens": round(float(lengths.mean()), 2) if len(lengths) else 0.0,
        "max_tokens": int(lengths.max(initial=0)),
        "mean_shared_prefix": round(float(prefix.mean()), 2) if len(prefix) else 0.0,
    }


def is_in_train(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> pd.Series:
    """Of every test comparison whether its two answers are compared in the train set, with whatever label, bool [C]."""
    sides = [(arrays["hash_chosen"], arrays["hash_rejected"]) for arrays in (train, test)]
    known, keys = (_keys(np.minimum(*pair), np.maximum(*pair)) for pair in sides)
    return pd.Series(keys).isin(known)


def _keys(first_hash: np.ndarray, second_hash: np.ndarray) -> np.ndarray:
    """One uint64 per comparison, different for (a, b) and (b, a)."""
    return first_hash.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + second_hash.view(np.uint64)


def fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """sha256 of the kept prompts, comparisons (by token hashes) and registered columns; the same on every machine."""
    digest = hashlib.sha256()
    for name in ("num_answers", "num_comparisons", "hash_chosen", "hash_rejected"):
        digest.update(np.ascontiguousarray(arrays[name], dtype="<i8"))
    for name in (*COMPARISON_COLUMNS, *ANSWER_COLUMNS):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name], dtype="<f4").tobytes())
    return digest.hexdigest()


def audit_table(train: Any, test: Any) -> Table:
    """The counts of two `PreferenceData` as a small rich table, a column for each split, and before it one for each of
    several sets. Rows that are 0 everywhere are left out."""
    audits = {}
    for split, data in (("train", train), ("test", test)):
        audits |= {f"{split}/{name}": part.audit for name, part in data.sets.items() if data.are_several}
        audits[split] = data.audit
    table = Table("count", title="Data audit", title_justify="left")
    for header in audits:
        table.add_column(header, justify="right", overflow="fold")
    table.add_column("meaning", style="dim")
    for name, meaning in MEANING.items():
        values = [audit.get(name) for audit in audits.values()]
        if any(values) or name in ("total", "kept"):
            form = "{:g}" if name == "weight" else "{:,.1f}" if "mean" in name else "{:,}"
            table.add_row(name, *("" if value is None else form.format(value) for value in values), meaning)
    return table


def data_report(train: Any, test: Any) -> dict:
    """The same for `data_report.json`: source, format, fingerprint and every count of each split, zeros included; of
    several sets under their names in "sets", after the counts of all of them."""
    report = {}
    for split, data in (("train", train), ("test", test)):
        sets = {}
        for name, part in data.sets.items():
            origin = {"source": part.source.name, "format": part.encoding.format, "fingerprint": part.fingerprint}
            sets[name] = origin | part.audit
        names = {key: ", ".join(dict.fromkeys(part[key] for part in sets.values())) for key in ("source", "format")}
        report[split] = names | {"fingerprint": data.fingerprint, **data.audit}
        report[split] |= {"sets": sets} if data.are_several else {}
    return report
