"""Inputs to the records that answer them, and the file of records, which a later start continues."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rm.config.errors import InputError
from rm.data.formats import RowError
from rm.data.tokenize import Tree
from rm.score.inputs import keys_of
from rm.score.scorer import Scorer

NUMBERS = "reward rewards reward_chosen reward_rejected margin p_chosen".split()
KEYS = [*NUMBERS, "line", "best", "best_response", "data_margin", "error"]  # of what is written
START = b'{"line": '  # of every line that is written


def answer_lines(
    scorer: Scorer, lines: Sequence[tuple[int, Any]], only_rewards: bool = False
) -> list[tuple[dict[str, Any], int]]:
    """For each line (its number, and its JSON object or a `RowError`) the record to write, and the tokens it took.

    Of an input that cannot be scored the record has the line, the id if there is one, and the error.
    """
    trees = scorer.encode([record for _, record in lines])
    scored = iter(scorer.score([tree for tree in trees if isinstance(tree, Tree)]))
    answered = []
    for (number, record), tree in zip(lines, trees, strict=True):
        rewards = next(scored) if isinstance(tree, Tree) else tree
        if not isinstance(rewards, RowError) and not np.isfinite(rewards).all():
            rewards = RowError("the reward is not finite")
        if isinstance(rewards, RowError):
            own = {"id": record["id"]} if isinstance(record, dict) and "id" in record else {}
            answered.append(({"line": number, **own, "error": str(rewards)[:500]}, 0))
        else:
            answered.append((answer(number, record, rewards, scorer.std, only_rewards), len(tree)))
    return answered


def answer(number: int, record: dict, rewards: np.ndarray, std: float = 1.0, only_rewards: bool = False) -> dict:
    """The record of an input: its line, its own keys (or its id alone), and the rewards.

    One sequence: reward. N answers: rewards, best (the first index, from 0, of the highest) and best_response. A pair:
    reward_chosen, reward_rejected, margin (their difference) and p_chosen (sigmoid of the margin times `std`). The
    input's own margin becomes data_margin; its other keys of these names are left out.
    """
    values = [_rounded(reward) for reward in rewards]
    own = {key: value for key, value in record.items() if key not in KEYS and (key == "id" or not only_rewards)}
    if keys_of(record) == ("prompt", "responses"):
        best = int(np.argmax(values))
        found = {"rewards": values, "best": best, "best_response": record["responses"][best]}
    elif len(values) == 1:
        found = {"reward": values[0]}
    else:
        margin = float(rewards[0] - rewards[1])
        found = {"data_margin": record["margin"]} if "margin" in record and not only_rewards else {}
        found |= {"reward_chosen": values[0], "reward_rejected": values[1], "margin": _rounded(margin)}
        found["p_chosen"] = _rounded(0.5 * (1 + math.tanh(margin * std / 2)))
    return {"line": number} | own | found


def _rounded(value: float) -> float:
    """With as few digits as distinguish float32 numbers."""
    return float(str(np.float32(value)))


def to_line(record: dict[str, Any]) -> bytes:
    """A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- the file of records


@contextmanager
def open_output(path: Path) -> Iterator[tuple[BinaryIO, dict[str, Any] | None]]:
    """An output to append to, locked and truncated after its last complete line; and its last record, or None.

    Raises:
        InputError: it has something else than records of `rm.score`, or another program writes it.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another program is writing it; give another --output") from None
        file.seek(0)
        end, last = 0, b""
        for line in file:
            if line[: len(START)] != START[: len(line)]:
                raise InputError(f"{path}: has something else than rewards; give another --output, or remove it")
            if line.endswith(b"\n"):
                end, last = end + len(line), line
        file.truncate(end)
        yield file, json.loads(last) if last else None


def skip_answered(scorer: Scorer, lines: Iterator, last: dict[str, Any], path: Path, only_rewards: bool) -> None:
    """Read the lines up to the one that `last` answers; that one is scored again and compared.

    Rewards may differ by rounding, so that the best answer may too.

    Raises:
        InputError: the output is not of this input, model and options.
    """
    number, record = next(((n, r) for n, r in lines if n >= last["line"]), (None, None))
    again = answer_lines(scorer, [(number, record)], only_rewards)[0][0] if number == last["line"] else {}
    tolerance = 2 * scorer.tolerance * max(1, 1 / scorer.std)
    is_same = last.keys() == again.keys() and all(
        np.allclose(last[key], again[key], rtol=tolerance, atol=tolerance)
        if key in NUMBERS
        else last[key] == again[key]
        for key in last.keys() - {"best", "best_response"}
    )
    if not is_same:
        fix = "it is of another input, model or options; give another --output, or remove it"
        raise InputError(f"{path}: line {last['line']} of the input would have another answer now; {fix}")
