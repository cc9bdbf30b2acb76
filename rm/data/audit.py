"""Data audit: counts of used, dropped, duplicate and contradictory comparisons, as a table and as a report.

Two int64 hashes identify a comparison: that of the chosen and that of the rejected token sequence.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from rich.table import Table

from rm.data.columns import ANSWER_COLUMNS, COMPARISON_COLUMNS

DROPPED = ("over_length", "empty", "identical", "tied", "split")  # reasons to drop a comparison
NOTED = ("truncated", "truncated_answer", "ends_with_user")  # properties of kept rows that are counted

MEANING = yaml.safe_load(Path(__file__).with_name("audit.yaml").read_text(encoding="utf-8"))  # of the counts, in order


def audit_counts(arrays: dict[str, np.ndarray], dropped: dict[str, int]) -> dict[str, int | float]:
    """The counts of `MEANING` without the overlap with the train set. `arrays`: the kept rows (`arrays_of`). `dropped`:
    comparisons by reason. If a prompt has several comparisons, there are three more counts."""
    lengths, prefix = arrays["length"], arrays["prefix_length"]
    keys = pd.Series(_keys(arrays["hash_chosen"], arrays["hash_rejected"]))
    trees = lengths.sum() - (prefix * (arrays["num_answers"] - 1)).sum()
    groups = {"prompts": len(prefix), "tree_tokens": int(trees), "pair_tokens": int(arrays["pair_length"].sum())}
    return (groups if len(keys) > len(prefix) else {}) | {
        "total": len(keys) + sum(dropped.values()),
        **dropped,
        "kept": len(keys),
        **{name: int(arrays[name].sum()) for name in NOTED},
        "duplicate": int(keys.duplicated().sum()),
        "contradictory": int(keys.isin(_keys(arrays["hash_rejected"], arrays["hash_chosen"])).sum()),
        "mean_tokens": round(float(lengths.mean()), 2) if len(lengths) else 0.0,
        "max_tokens": int(lengths.max(initial=0)),
        "mean_shared_prefix": round(float(prefix.mean()), 2) if len(prefix) else 0.0,
    }


def is_in_train(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> pd.Series:
    """For each test comparison, whether the train set compares the same two answers, with either label; bool [C]."""
    sides = [(arrays["hash_chosen"], arrays["hash_rejected"]) for arrays in (train, test)]
    known, keys = (_keys(np.minimum(*pair), np.maximum(*pair)) for pair in sides)
    return pd.Series(keys).isin(known)


def _keys(first_hash: np.ndarray, second_hash: np.ndarray) -> np.ndarray:
    """A uint64 hash of each comparison. (a, b) and (b, a) have different hashes."""
    return first_hash.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + second_hash.view(np.uint64)


def fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """sha256 of the kept prompts, comparisons (by token hashes) and registered columns; the same on every machine."""
    digest = hashlib.sha256()
    for name in ("num_answers", "num_comparisons", "hash_chosen", "hash_rejected"):
        digest.update(np.ascontiguousarray(arrays[name], dtype="<i8"))
    for name in (*COMPARISON_COLUMNS, *ANSWER_COLUMNS):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name], dtype="<f4").tobytes())
    return digest.hexdigest()


def audit_table(train: Any, test: Any = None) -> Table:
    """The counts of one or two `PreferenceData` as a rich table with one column per split. If a split has several sets,
    each set has a column too. Rows that are 0 everywhere are left out."""
    audits = {}
    for split, data in (("train", train), *([("test", test)] if test else [])):
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
    """The content of `data_report.json`: source, format, fingerprint and every count of each split, zeros included.
    If a split has several sets, "sets" has the same entries for each set."""
    report = {}
    for split, data in (("train", train), ("test", test)):
        sets = {}
        for name, part in data.sets.items():
            origin = {"source": part.source.name, "format": part.encoding.format, "fingerprint": part.fingerprint}
            origin |= {"layout": part.encoding.data_layout, "columns": part.encoding.roles}
            sets[name] = origin | part.audit
        text = {key: [part[key] for part in sets.values()] for key in ("source", "format", "layout")}
        names = {key: ", ".join(dict.fromkeys(values)) for key, values in text.items()}
        report[split] = names | {"fingerprint": data.fingerprint, **data.audit}
        report[split] |= {"sets": sets} if data.are_several else {"columns": origin["columns"]}
    return report
