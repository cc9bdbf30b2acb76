"""What became of every comparison: counts by vectorised comparison of token hashes; a table and a report of them.

A comparison is known here by two int64 hashes: of the chosen and of the rejected token sequence.
"""

import hashlib
from typing import Any

import numpy as np
from rich.console import Group
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


def pair_keys(chosen_hash: np.ndarray, rejected_hash: np.ndarray) -> np.ndarray:
    """One uint64 per comparison, different for (a, b) and (b, a)."""
    return chosen_hash.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + rejected_hash.view(np.uint64)


def unordered_keys(chosen_hash: np.ndarray, rejected_hash: np.ndarray) -> np.ndarray:
    """One uint64 per comparison, the same for (a, b) and (b, a)."""
    return pair_keys(np.minimum(chosen_hash, rejected_hash), np.maximum(chosen_hash, rejected_hash))


def audit_counts(arrays: dict[str, np.ndarray], dropped: dict[str, int]) -> dict[str, int | float]:
    """The counts of `MEANING` but `in_train`: of the kept rows' arrays (`arrays_of`) and the dropped comparisons."""
    kept, lengths = len(arrays["hash_chosen"]), arrays["length"]
    counts = {"total": kept + sum(dropped.values()), **dropped, "kept": kept}
    counts["truncated"] = int(arrays["truncated"].sum())
    counts |= _repeats(arrays)
    counts["mean_tokens"] = round(float(lengths.mean()), 2) if len(lengths) else 0.0
    counts["max_tokens"] = int(lengths.max(initial=0))
    counts["mean_shared_prefix"] = round(float(arrays["prefix_length"].mean()), 2) if len(lengths) else 0.0
    return counts


def pooled_counts(audits: list[dict], arrays: dict[str, np.ndarray]) -> dict[str, int | float]:
    """The counts of several data sets together; repeated pairs are found across them too."""
    counts = {name: sum(audit[name] for audit in audits) for name in ("total", *DROPPED, "kept", "truncated")}
    counts |= _repeats(arrays)
    counts["max_tokens"] = max(audit["max_tokens"] for audit in audits)
    for name in ("mean_tokens", "mean_shared_prefix"):
        counts[name] = round(sum(audit[name] * audit["kept"] for audit in audits) / counts["kept"], 2)
    return counts


def _repeats(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    keys = pair_keys(arrays["hash_chosen"], arrays["hash_rejected"])
    contradictory = _count_found(pair_keys(arrays["hash_rejected"], arrays["hash_chosen"]), keys)
    return {"duplicate": int((np.diff(np.sort(keys)) == 0).sum()), "contradictory": contradictory}


def count_in_train(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> int:
    """Number of test comparisons whose two answers are compared in the train set, with whatever label."""
    known = unordered_keys(train["hash_chosen"], train["hash_rejected"])
    return _count_found(unordered_keys(test["hash_chosen"], test["hash_rejected"]), known)


def _count_found(keys: np.ndarray, known: np.ndarray) -> int:
    """How many of `keys` are among `known`; by sorting: `np.isin` hashes, 20 times slower for a million keys."""
    known = np.sort(known)
    places = np.searchsorted(known, keys)
    return int((known[np.minimum(places, len(known) - 1)] == keys).sum()) if len(known) else 0


def fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """sha256 of the kept prompts, comparisons (by token hashes) and registered columns; the same on every machine."""
    digest = hashlib.sha256()
    for name in ("num_answers", "num_comparisons", "hash_chosen", "hash_rejected"):
        digest.update(np.ascontiguousarray(arrays[name], dtype="<i8"))
    for name in (*COMPARISON_COLUMNS, *ANSWER_COLUMNS):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name], dtype="<f4").tobytes())
    return digest.hexdigest()


def audit_table(train: Any, test: Any) -> Table | Group:
    """The counts of two `PreferenceData` as a small rich table, or one for each where one of them has several sets,
    with a column for each set and one for all. `train` may be None. Rows that are 0 everywhere are left out."""
    splits = {"train": train, "test": test} if train is not None else {"test": test}
    if not any(data.are_several for data in splits.values()):
        return _table("Data audit", [(split, data.audit) for split, data in splits.items()])
    tables = []
    for split, data in splits.items():
        columns = [(name, part.audit) for name, part in data.sets.items()]
        tables.append(_table(f"Data audit: {split}", [*columns, ("all", data.audit)][: None if columns[1:] else 1]))
    return Group(*tables)


def _table(title: str, columns: list[tuple[str, dict]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("count")
    for header, _ in columns:
        table.add_column(header, justify="right", overflow="fold")
    table.add_column("meaning", style="dim")
    for name, meaning in MEANING.items():
        values = [audit.get(name) for _, audit in columns]
        if any(values) or name in ("total", "kept"):
            table.add_row(name, *("" if value is None else _cell(name, value) for value in values), meaning)
    return table


def _cell(name: str, value: int | float) -> str:
    return f"{value:g}" if name == "weight" else f"{value:,.1f}" if "mean" in name else f"{value:,}"


def data_report(train: Any, test: Any) -> dict:
    """The same for `data_report.json`: source, format, fingerprint and every count of each split, zeros included; of
    several sets under their names in "sets", after the counts of all of them."""
    splits = {"train": train, "test": test} if train is not None else {"test": test}
    report = {}
    for split, data in splits.items():
        sets = {}
        for name, part in data.sets.items():
            origin = {"source": part.source.name, "format": part.encoding.format, "fingerprint": part.fingerprint}
            sets[name] = origin | part.audit
        names = {key: ", ".join(dict.fromkeys(part[key] for part in sets.values())) for key in ("source", "format")}
        report[split] = names | {"fingerprint": data.fingerprint, **data.audit}
        report[split] |= {"sets": sets} if data.are_several else {}
    return report
