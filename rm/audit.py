"""What became of every pair: counts by vectorised comparison of token hashes, a table and a report of them.

A pair is known here by two int64 hashes, of the chosen and of the rejected token ids, each of length N (pairs).
"""

import hashlib

import numpy as np
from rich.table import Table

KEPT, EMPTY, IDENTICAL, OVER_LENGTH = range(4)  # the status of a row, one of these
DROPPED = {"empty": EMPTY, "identical": IDENTICAL, "over_length": OVER_LENGTH}

MEANING = {  # the counts, in the order of the table
    "total": "pairs read",
    "over_length": "dropped: longer than max_length",
    "empty": "dropped: a blank answer, or no tokens",
    "identical": "dropped: chosen and rejected are the same tokens",
    "kept": "pairs used",
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
    keys = pair_keys(chosen, rejected)
    lengths = np.concatenate([columns["length_chosen"][kept], columns["length_rejected"][kept]])
    counts = {"total": len(status)}
    counts |= {name: int((status == code).sum()) for name, code in DROPPED.items()}
    counts["kept"] = len(keys)
    counts["truncated"] = int(columns["truncated"][kept].sum())
    counts["duplicate"] = int((np.diff(np.sort(keys)) == 0).sum())
    counts["contradictory"] = _count_found(pair_keys(rejected, chosen), keys)
    counts["mean_tokens"] = round(float(lengths.mean()), 2) if len(lengths) else 0.0
    counts["max_tokens"] = int(lengths.max(initial=0))
    counts["mean_shared_prefix"] = round(float(columns["prefix_length"][kept].mean()), 2) if len(keys) else 0.0
    return counts


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


def audit_table(train, test) -> Table:
    """A small rich table of the counts of two `Pairs`; `train` may be None. Rows that are 0 everywhere are left out."""
    splits = {"train": train, "test": test} if train is not None else {"test": test}
    table = Table(title="Data audit", title_justify="left")
    table.add_column("count")
    for name in splits:
        table.add_column(name, justify="right")
    table.add_column("meaning", style="dim")
    for name, meaning in MEANING.items():
        values = [pairs.audit.get(name) for pairs in splits.values()]
        if any(values) or name in ("total", "kept"):
            cells = ["" if value is None else f"{value:,.1f}" if "mean" in name else f"{value:,}" for value in values]
            table.add_row(name, *cells, meaning)
    return table


def data_report(train, test) -> dict:
    """The same for `data_report.json`: source, format, fingerprint and every count of each split, zeros included."""
    splits = {"train": train, "test": test} if train is not None else {"test": test}
    return {
        name: {"source": pairs.source, "format": pairs.format, "fingerprint": pairs.fingerprint, **pairs.audit}
        for name, pairs in splits.items()
    }
