"""The table of an evaluation: every pair once, with its rewards; metrics, report and comparisons are made from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from rm.config.files import fsync, naming
from rm.config.redact import redact
from rm.data.mixture import OPTIONAL_COLUMNS, PairSets


def pair_table(pairs: PairSets, rewards: np.ndarray | None = None) -> pd.DataFrame:
    """A row for each pair, in the data set's order.

    Columns: `id`; `set` (its evaluation set); `row` (in that set's data, from 0); `prompt` (int64, the same number for
    the same prompt); `reward_chosen`, `reward_rejected` (float64, from `rewards` [n, 2]; None: 0); `data_margin` (0
    where the data give none); `length_chosen`, `length_rejected` (tokens of the whole sequences), `prefix_length`
    (tokens that they share); `subset`, `true_margin` if any set has them.
    """
    parts = []
    for name, part in pairs.sets.items():
        optional = [column for column in OPTIONAL_COLUMNS if column in part.dataset.column_names]
        columns = ["id", "row", "length_chosen", "length_rejected", "prefix_length", "margin", *optional]
        frame = part.dataset.select_columns(columns).with_format(None).to_pandas()
        parts.append(frame.assign(set=redact(name), prompt=part.prompts()))
    table = pd.concat(parts, ignore_index=True).rename(columns={"margin": "data_margin"})
    table["data_margin"] = table["data_margin"].astype(np.float64)
    first = ["id", "set", "row", "prompt"]
    table = table[[*first, *table.columns.difference(first, sort=False)]]
    return with_rewards(table, np.zeros((len(table), 2)) if rewards is None else rewards)


def with_rewards(table: pd.DataFrame, rewards: np.ndarray) -> pd.DataFrame:
    """A copy of the table with these rewards (chosen, rejected), float64 [n, 2]."""
    return table.assign(reward_chosen=rewards[:, 0], reward_rejected=rewards[:, 1])


def sets_of(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The part of each evaluation set, without the columns that this set does not have."""
    parts = {name: part.reset_index(drop=True) for name, part in table.groupby("set", sort=False)}
    return {name: without_missing(part) for name, part in parts.items()}


def without_missing(table: pd.DataFrame) -> pd.DataFrame:
    """Without `true_margin` where a pair has none, and without `subset` where none of the pairs has one."""
    missing = [name for name, some in (("subset", "all"), ("true_margin", "any"))
               if name in table and getattr(table[name].isna(), some)()]  # fmt: skip
    return table.drop(columns=missing)


def worst(table: pd.DataFrame, count: int) -> np.ndarray:
    """The rows of the pairs whose rejected answer is furthest ahead, the worst first; no more than are wrong."""
    margin = (table["reward_chosen"] - table["reward_rejected"]).to_numpy()
    order = np.argsort(margin, kind="stable")[:count]
    return order[margin[order] < 0]


def write_table(table: pd.DataFrame, path: Path) -> None:
    """As Parquet, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with naming(path):
        table.to_parquet(part, index=False)
        fsync(part)
        part.replace(path)
        fsync(path.parent)


def read_table(path: Path) -> pd.DataFrame | None:
    """What `write_table` wrote; None: there is no such file."""
    return pd.read_parquet(path) if path.is_file() else None
