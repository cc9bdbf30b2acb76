"""What became of every pair: counts by vectorised comparison of token hashes, a table and a report of them.

A pair is known here by two int64 hashes, of the chosen and of the rejected token ids, each of length N (pairs).
"""

import hashlib

import numpy as np
from rich.console import Group
from rich.table import Table

KEPT, EMPTY, IDENTICAL, OVER_LENGTH = range(4)  # the status of a row, one of these
DROPPED = {"empty": EMPTY, "identical": IDENTICAL, "over_length": OVER_LENGTH}

MEANING = {  # the counts, in the order of the table
    "weight": "passes over the data set in an epoch",
    "total": "pairs read",
    "over_length": "dropped: longer than max_length",
    "empty": "dropped: a blank answer, or no tokens",
    "identical": "dropped: chosen and rejected are the same tokens",
    "kept": "pairs used",
    "drawn": "pairs in an epoch, by the weight",
    "truncated": "kept, with the start of the prompt cut",
    "duplicate": "kept, though the same pair came before",
    "contradictory": "kept, though the same two answers also come with the opposite label",
    "in_train": "kept, though the train set has the same two answers",
    "mean_tokens": "tokens in a sequence, mean",
    "max_tokens": "tokens in a sequence, longest",
    "mean_shared_prefix": "tokens that chosen and rejected share, mean",
}


def pair_keys(chosen_hash: np.ndarray, rejected_hash: np.ndarray) -> np.ndarray:
    """One uint64 a pair, different for (a, b) and (b, a)."""
    return chosen_hash.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + rejected_hash.view(np.uint64)


def unordered_keys(chosen_hash: np.ndarray, rejected_hash: np.ndarray) -> np.ndarray:
    """One uint64 a pair, the same for (a, b) and (b, a)."""
    return pair_keys(np.minimum(chosen_hash, rejected_hash), np.maximum(chosen_hash, rejected_hash))


def audit_counts(columns: dict[str, np.ndarray]) -> dict[str, int | float]:
    """The counts of `MEANING` but `in_train`, from the columns of all rows, dropped ones included."""
    status = columns["status"]
    kept = status == KEPT
    chosen, rejected = columns["hash_chosen"][kept], columns["hash_rejected"][kept]
    lengths = np.concatenate([columns["length_chosen"][kept], columns["length_rejected"][kept]])
    counts = {"total": len(status)}
    counts |= {name: int((status == code).sum()) for name, code in DROPPED.items()}
    counts["kept"] = len(chosen)
    counts["truncated"] = int(columns["truncated"][kept].sum())
    counts |= _repeats(chosen, rejected)
    counts["mean_tokens"] = round(float(lengths.mean()), 2) if len(lengths) else 0.0
    counts["max_tokens"] = int(lengths.max(initial=0))
    counts["mean_shared_prefix"] = round(float(columns["prefix_length"][kept].mean()), 2) if len(chosen) else 0.0
    return counts


def pooled_counts(audits: list[dict], hashes: dict[str, np.ndarray]) -> dict[str, int | float]:
    """The counts of several data sets together; repeated pairs are found across them too, by all kept pairs' hashes."""
    counts = {name: sum(audit[name] for audit in audits) for name in ("total", *DROPPED, "kept", "truncated")}
    counts |= _repeats(hashes["hash_chosen"], hashes["hash_rejected"])
    counts["max_tokens"] = max(audit["max_tokens"] for audit in audits)
    for name in ("mean_tokens", "mean_shared_prefix"):
        counts[name] = round(sum(audit[name] * audit["kept"] for audit in audits) / counts["kept"], 2)
    return counts


def _repeats(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, int]:
    keys = pair_keys(chosen, rejected)
    contradictory = _count_found(pair_keys(rejected, chosen), keys)
    return {"duplicate": int((np.diff(np.sort(keys)) == 0).sum()), "contradictory": contradictory}


def count_in_train(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> int:
    """Number of test pairs whose two answers are a pair of the train set, whatever their labels."""
    known = unordered_keys(train["hash_chosen"], train["hash_rejected"])
    return _count_found(unordered_keys(test["hash_chosen"], test["hash_rejected"]), known)


def _count_found(keys: np.ndarray, known: np.ndarray) -> int:
    """How many of `keys` are among `known`; by sorting: `np.isin` hashes, 20 times slower for a million keys."""
    known = np.sort(known)
    places = np.searchsorted(known, keys)
    return int((known[np.minimum(places, len(known) - 1)] == keys).sum()) if len(known) else 0


def fingerprint(columns: dict[str, np.ndarray]) -> str:
    """sha256 of the kept pairs' token hashes and margins, in order; the same on every machine."""
    digest = hashlib.sha256()
    for name, dtype in (("hash_chosen", "<i8"), ("hash_rejected", "<i8"), ("margin", "<f4")):
        digest.update(np.ascontiguousarray(columns[name], dtype=dtype))
    return digest.hexdigest()


def audit_table(train, test) -> Table | Group:
    """The counts of two `PairSets` as a small rich table, or as one for each if one of them has several sets, with a
    column for each set and one for all. `train` may be None. Rows that are 0 everywhere are left out."""
    splits = {"train": train, "test": test} if train is not None else {"test": test}
    if not any(pairs.are_several for pairs in splits.values()):
        return _table("Data audit", [(split, pairs.audit) for split, pairs in splits.items()])
    tables = []
    for split, pairs in splits.items():
        columns = [(name, part.audit) for name, part in pairs.sets.items()]
        tables.append(_table(f"Data audit: {split}", [*columns, ("all", pairs.audit)][: None if columns[1:] else 1]))
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


def data_report(train, test) -> dict:
    """The same for `data_report.json`: source, format, fingerprint and every count of each split, zeros included; of
    several sets under their names in "sets", after the counts of all of them."""
    splits = {"train": train, "test": test} if train is not None else {"test": test}
    report = {}
    for split, pairs in splits.items():
        sets = {
            name: {"source": part.source, "format": part.format, "fingerprint": part.fingerprint, **part.audit}
            for name, part in pairs.sets.items()
        }
        names = {key: ", ".join(dict.fromkeys(part[key] for part in sets.values())) for key in ("source", "format")}
        report[split] = names | {"fingerprint": pairs.fingerprint, **pairs.audit}
        report[split] |= {"sets": sets} if pairs.are_several else {}
    return report
