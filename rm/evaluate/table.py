"""The evaluation table: a row for each comparison with its rewards; metrics, report and model comparison read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from rm.config.errors import InputError
from rm.config.files import write_bytes
from rm.config.redact import redact
from rm.data.dataset import PreferenceData
from rm.evaluate.metrics import METRICS

# further columns, computed once from the texts: {column: function of {"prompt": str, "chosen": str, "rejected": str}}
TEXT_COLUMNS: dict[str, Callable[[dict[str, str]], float]] = {}


def evaluation_table(data: PreferenceData) -> pd.DataFrame:
    """A row for each comparison, in the order of the data; raises `InputError` for a set with the name of a metric.

    Columns: `id`; `set`; `row` (in the raw data of the set, from 0); `prompt` (int64, equal for equal prompts);
    `length_chosen`, `length_rejected` (tokens of the whole sequences), `prefix_length` (tokens that all answers share);
    `share` (1 / comparisons of the prompt); every registered column (`true_margin` only if a comparison has one);
    `subset` if a set has it; `TEXT_COLUMNS`; `reward_chosen`, `reward_rejected` (float64, 0 here).
    """
    for name in data.sets if data.are_several else ():
        if name in METRICS:  # eval/NAME would be both
            fix = "give it another name: eval_dataset_name={NAME: FILE, ...}"
            raise InputError(f"the evaluation set {name!r} has the name of a metric; {fix}")
    index = data.comparisons["index"].to_numpy()
    names = np.repeat([redact(name) for name in data.sets], [part.size for part in data.sets.values()])
    first = {"id": np.array(data.dataset["id"][:], object)[index], "set": names[index]}
    first |= {"row": np.array(data.dataset["row"][:])[index], "prompt": data.prompt_hashes()[index]}
    table = pd.DataFrame(first).join(data.comparisons.drop(columns=["index", "chosen", "rejected"]))
    subsets = np.array(data.dataset["subset"][:], object)[index]
    if pd.notna(subsets).any():
        table["subset"] = subsets
    if table["true_margin"].isna().all():
        table = table.drop(columns="true_margin")
    for column, function in TEXT_COLUMNS.items():
        table[column] = [float(function(data.comparison_texts(i))) for i in range(len(table))]
    return table.assign(reward_chosen=0.0, reward_rejected=0.0)


def worst(table: pd.DataFrame, count: int) -> np.ndarray:
    """Rows of at most `count` wrong comparisons, the one with the largest difference of rewards first."""
    margin = (table["reward_chosen"] - table["reward_rejected"]).where(table["p_chosen"] != 0.5, 0).to_numpy()
    order = np.argsort(margin, kind="stable")[:count]
    return order[margin[order] < 0]


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write Parquet; after a crash the file has either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, table.to_parquet(index=False))
