"""Data sets with several answers a prompt, right (`chosen`) and wrong ones (`rejected`), as RewardBench 2 has them."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, LargeList, List, Value

from rm.config.errors import InputError
from rm.data.items import ItemError
from rm.data.load import Source
from rm.data.render import describe
from rm.score.scorer import Scorer

logger = logging.getLogger(__name__)

PIECE = 64  # prompts that are scored in one call: few enough for the memory, enough to be packed well


def is_best_of_n(dataset: Dataset) -> bool:
    """Whether `chosen` and `rejected` are lists of texts."""
    kinds = [dataset.features.get(side) for side in ("chosen", "rejected")]
    texts, empty = (Value("string"), Value("large_string")), Value("null")
    kinds = [kind.feature for kind in kinds if isinstance(kind, List | LargeList)]
    return len(kinds) == 2 and any(k in texts for k in kinds) and all(k in (*texts, empty) for k in kinds)


def best_of_n_table(source: Source, scorer: Scorer, accelerator: Accelerator) -> pd.DataFrame:
    """One row a prompt: `id`, `subset` (if the data have it), `rewards` (float64 [N], chosen answers first) and
    `num_correct`, for `rm.evaluate.rewardbench.best_of_n_metrics`. Collective: every process scores its share.

    A prompt is text or messages. What cannot be scored (an empty answer, one that is too long) is left out, with a
    warning. Raises `InputError`.
    """
    rows = [_item(source, i) for i in range(len(source.dataset))]
    share = range(accelerator.process_index, len(rows), accelerator.num_processes)
    scored = []
    for start in range(0, len(share), PIECE):
        part = share[start : start + PIECE]
        trees = scorer.encode([rows[i][0] for i in part])
        good = [tree for tree in trees if not isinstance(tree, ItemError)]
        rewards = iter(scorer.score(good))
        scored += [
            (i, str(tree) if isinstance(tree, ItemError) else next(rewards))
            for i, tree in zip(part, trees, strict=True)
        ]
    found = dict(gather_object(scored))  # collective
    bad = {i: why for i, why in found.items() if isinstance(why, str)}
    if bad:
        first = min(bad)
        where = f"{source.row_name(first)}: {bad[first]}"
        logger.warning("%d of %d prompts are left out, the first: %s", len(bad), len(rows), where)
    kept = [rows[i][1] | {"rewards": np.asarray(found[i])} for i in range(len(rows)) if i not in bad]
    if not kept:
        raise InputError(f"{source.name}: no prompt could be scored; the first: {where}")
    return pd.DataFrame(kept)


def _item(source: Source, row: int) -> tuple[dict, dict]:
    """What the scorer reads of a row, and its other columns of the table."""
    values = source.dataset[row]
    prompt, answers = values.get("prompt"), []
    for side in ("chosen", "rejected"):
        if not values[side] or not all(type(answer) is str for answer in values[side]):
            raise InputError(f"{source.row_name(row)}: {side!r} must be a list of one text or more")
        answers += values[side]
    if type(prompt) not in (str, list):
        raise InputError(f"{source.row_name(row)}: 'prompt' is {describe(prompt)}, expected text or messages")
    num_correct = len(values["chosen"])
    if values.get("num_correct", num_correct) != num_correct:
        given = values["num_correct"]
        raise InputError(f"{source.row_name(row)}: 'num_correct' is {given}, but 'chosen' has {num_correct} answers")
    if values.get("subset", "") is None:
        raise InputError(f"{source.row_name(row)}: 'subset' is missing (null), expected text or a whole number")
    known = {"id": str(values.get("id", row)), "num_correct": num_correct}
    known |= {"subset": str(values["subset"])} if "subset" in values else {}
    return {"prompt": prompt, "responses": answers}, known
