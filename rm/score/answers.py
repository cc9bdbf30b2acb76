"""Lines of JSON to the records that answer them: rewards, or what is wrong with the line."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from rm.collate import Tree
from rm.data.items import ItemError, form_of
from rm.score.inputs import parse_line
from rm.score.scorer import Scorer

logger = logging.getLogger(__name__)

NUMBERS = "reward rewards reward_chosen reward_rejected margin p_chosen".split()
KEYS = [*NUMBERS, "line", "best", "best_response", "data_margin", "error"]  # of what is written


def answer_lines(
    scorer: Scorer, lines: Sequence[tuple[int, bytes | None]], only_rewards: bool = False
) -> list[tuple[dict[str, Any], int]]:
    """For each line (its number, and what it holds) the record to write, and the tokens that it took.

    The record is that of `answer`; of what could not be scored the line, the id if it has one, and why.
    """
    items = []
    for number, line in lines:
        try:
            items.append(parse_line(number, line))
        except ItemError as error:
            items.append(error)
    encoded = iter(scorer.encode([item for item in items if not isinstance(item, ItemError)]))
    trees = [item if isinstance(item, ItemError) else next(encoded) for item in items]
    scored = iter(_score(scorer, [tree for tree in trees if isinstance(tree, Tree)]))
    records = []
    for (number, _), item, tree in zip(lines, items, trees, strict=True):
        rewards = next(scored) if isinstance(tree, Tree) else tree
        if not isinstance(rewards, ItemError) and not np.isfinite(rewards).all():
            rewards = ItemError("the reward is not finite")
        if isinstance(rewards, ItemError):
            own = {"id": item["id"]} if isinstance(item, dict) and "id" in item else {}
            records.append(({"line": number, **own, "error": str(rewards)[:500]}, 0))
        else:
            std = scorer.scale[1] if scorer.scale else 1.0
            records.append((answer(number, item, rewards, std=std, only_rewards=only_rewards), len(tree)))
    return records


def _score(scorer: Scorer, trees: list[Tree]) -> list[np.ndarray | ItemError]:
    """The rewards of each tree. Out of memory: in two parts, until one alone does not fit."""
    try:
        return scorer.score(trees)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
    clear_device_cache()
    if len(trees) == 1:
        return [ItemError(f"out of memory with {len(trees[0])} tokens; give a smaller micro_batch_tokens")]
    logger.warning("out of memory: scored in smaller parts; a smaller micro_batch_tokens saves the attempt")
    half = len(trees) // 2
    return _score(scorer, trees[:half]) + _score(scorer, trees[half:])


def answer(
    number: int, item: dict, rewards: np.ndarray, *, std: float = 1.0, only_rewards: bool = False
) -> dict[str, Any]:
    """What is written for an item: its line, its own keys (or its id alone), and by what it is

    one sequence: reward. N answers: rewards, best (the first index, from 0, of the highest) and best_response. A pair:
    reward_chosen, reward_rejected, margin (their difference) and p_chosen, sigmoid of the margin as the model gives it,
    which is `std` times the one here. A margin of the item's own becomes data_margin; else its keys of these names go.
    """
    values = [float(str(np.float32(reward))) for reward in rewards]  # as few digits as tell float32 numbers apart
    record = {key: value for key, value in item.items() if key not in KEYS and (key == "id" or not only_rewards)}
    form = form_of(item)
    if form == "single":
        record |= {"reward": values[0]}
    elif form == "answers":
        best = int(np.argmax(values))
        record |= {"rewards": values, "best": best, "best_response": item["responses"][best]}
    else:
        margin = float(rewards[0] - rewards[1])
        shown = {"reward_chosen": values[0], "reward_rejected": values[1], "margin": float(str(np.float32(margin)))}
        p_chosen = 0.5 * (1 + math.tanh(margin * std / 2))
        given = {"data_margin": item["margin"]} if "margin" in item and not only_rewards else {}
        record |= given | shown | {"p_chosen": float(str(np.float32(p_chosen)))}
    return {"line": number} | record


def is_same(before: dict[str, Any], now: dict[str, Any], scorer: Scorer) -> bool:
    """Whether two records answer one line alike, but for the rounding of rewards; an error may have been of memory."""
    if "error" in before:
        return True
    return set(before) == set(now) and all(_is_close(before[key], now[key], key, scorer) for key in before)


def _is_close(before: Any, now: Any, key: str, scorer: Scorer) -> bool:
    if key in ("best", "best_response"):  # near ties
        return True
    if key not in NUMBERS:
        return before == now
    try:
        difference = np.abs(np.subtract(before, now))
        allowed = 2 * scorer.tolerance * np.maximum(1, np.abs(now)) * max(1, 1 / scorer.scale[1] if scorer.scale else 1)
        return bool((difference <= allowed).all())
    except (ValueError, TypeError):
        return False
