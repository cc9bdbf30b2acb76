"""The registry of the numbers that preference data may give for each comparison and for each answer.

One line here adds a column: it is read from the data, is part of the token cache and of the fingerprint, gets its
default in mixtures, and is `batch.<name>_C` in the training loop and a column of the evaluation table.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rm.config.errors import InputError


@dataclass(frozen=True)
class Column:
    """One number per comparison, or per answer.

    default: the value where the data have none. low, high: the allowed range, ends included.
    option: the option that names another data column. by_name: read under its own name where the data have it.
    is_signed: the value changes its sign when chosen and rejected are swapped.
    """

    default: float
    low: float = -math.inf
    high: float = math.inf
    option: str | None = None
    by_name: bool = True
    is_signed: bool = False


COMPARISON_COLUMNS = {
    "margin": Column(0.0, option="margin_column", is_signed=True),  # log-odds; Llama 2, eq. 2
    "weight": Column(1.0, low=0.0, option="weight_column", by_name=False),  # factor of the loss
    "p_chosen": Column(1.0, low=0.0, high=1.0, option="probability_column", by_name=False),  # soft label
    "true_margin": Column(math.nan, is_signed=True),  # log-odds of the true reward; for evaluation only
}
ANSWER_COLUMNS = {
    "score": Column(math.nan),  # any unit; higher is better
}


def columns_to_read(names: Iterable[str], config: Any, source: str) -> dict[str, str]:
    """{comparison column: data column} of those that data with the columns `names` give.

    Raises:
        InputError: an option names a column that does not exist.
    """
    names, found = set(names), {}
    for name, column in COMPARISON_COLUMNS.items():
        given = column.option and getattr(config, column.option, None)
        if given and given.split(".")[0] not in names:
            there = ", ".join(sorted(names))
            raise InputError(f"{source}: {column.option}={given}: there is no such column; there are {there}")
        if given or (column.by_name and name in names):
            found[name] = given or name
    return found
