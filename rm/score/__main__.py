"""Rewards for the inputs in a file: JSON lines in, JSON lines out.

python -m rm.score --model OUT --input x.jsonl --output y.jsonl       # run again, it continues where it was
zcat x.jsonl.gz | python -m rm.score --model OUT > y.jsonl
"""

import fcntl
import gzip
import json
import logging
import math
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from rm.config.cli import parse, run_program
from rm.config.errors import InputError
from rm.config.files import finite
from rm.config.redact import safe_line
from rm.config.section import Section, option
from rm.data.example import RowError
from rm.data.layouts import NUMBERS
from rm.data.load import one_line
from rm.score.scorer import ACCEPTED, Scorer, form_of

logger = logging.getLogger(__name__)

REWARDS = "reward rewards reward_chosen reward_rejected margin p_chosen".split()
KEYS = [*REWARDS, *"line best best_response data_margin error".split()]
SORTED = ("responses", "input_ids", "attention_mask", *NUMBERS)  # by --rank: they have a value for each answer
START = b'{"line": '  # of every line that is written


class Score(Section):
    """usage: python -m rm.score --model OUT [--input FILE] [--output FILE] [--key=value ...]

    Rewards for JSON lines. Options of the training have by default the values that they had then.
    """

    model: str = option(..., "output folder of a run, or hub name")
    input: str | None = option(None, "JSON lines, also .gz; none or -: stdin")
    output: str | None = option(None, "file to append to, after the lines that it has; none or -: stdout")
    normalize: bool = option(False, "write (r - mean) / std, over answers of the training set, instead of the reward r")
    only_rewards: bool = option(False, "leave the input's own keys out of the output, except id")
    rank: bool = option(False, "sort the answers of a group by reward, best first, and write their indices as ranking")
    window_size: int = option(256, "lines read, scored and written at a time; no reward depends on it", gt=0)


def main(argv: list[str]) -> int:
    """Score the input; returns the exit code: 0, or 1 if there are lines and none could be scored."""
    own, options = parse(argv, Score, accepts=ACCEPTED)
    source, target = (None if path == "-" else path for path in (own.input, own.output))
    if not target and getattr(sys.stdout, "name", "") == os.devnull:  # by `open_streams`
        raise InputError("standard output is closed; give --output")
    file = open(source, "rb") if source else sys.stdin.buffer
    size = os.path.getsize(source) if source else 0  # 0 also for a pipe
    with open_output(Path(target)) if target else nullcontext((sys.stdout.buffer, {})) as (output, last):
        scorer = Scorer(own.model, normalize=own.normalize, **options)
        about = f"{scorer.layout.name} ({scorer.layout.reason}) on {scorer.device}"
        logger.info(f"{own.model}: {about}; scores the lines from {last.get('line', 0) + 1} on")
        stream = gzip.open(file) if source and source.endswith(".gz") else file
        lines = read_lines(stream, source or "stdin", last.get("line", 1))
        if last:
            number, record = next(lines, (0, None))
            now = {"line": number} | answer(record, scorer.results([record])[0], scorer.std, own)
            if not is_same(last, finite(now), scorer.rounding):
                raise InputError(f"{target}: of another input, model or options; give another --output, or remove it")
        num_lines, num_errors, first_error = 0, 0, ""
        bar = tqdm(total=size or None, unit="B" if size else "line", unit_scale=True, dynamic_ncols=True)
        while window := list(islice(lines, own.window_size)):
            for (number, record), rewards in zip(window, scorer.results([line[1] for line in window]), strict=True):
                found = finite({"line": number} | answer(record, rewards, scorer.std, own))
                # a lone surrogate, which UTF-8 cannot hold, becomes its JSON escape
                output.write((json.dumps(found, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
                if "error" in found:
                    first_error = first_error or f"; the first error, line {number}: {found['error']}"
                    num_errors += 1
            output.flush()
            num_lines += len(window)
            bar.update(file.tell() - bar.n if size else len(window))
        bar.close()
    print(safe_line(f"{num_lines:,} lines, {num_errors:,} errors{first_error}"), file=sys.stderr)
    return int(0 < num_lines == num_errors and not last)


def read_lines(stream: BinaryIO, name: str, first_line: int) -> Iterator[tuple[int, Any]]:
    """(number, JSON value or `RowError`) of the lines from `first_line` on. Raises `InputError` for a broken file."""
    number = 0
    try:
        for number, line in enumerate(stream, start=1):
            if number < first_line or not line.strip():
                continue
            try:
                record = json.loads(line)
                finite(record)  # what is nested too deeply for this could not be written
            except (ValueError, RecursionError) as error:
                record = RowError(f"not JSON: {error}")
            yield number, record
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name}: cannot be read after line {number}: {one_line(error)}") from error


def answer(record: Any, rewards: np.ndarray | RowError, std: float, options: Score) -> dict[str, Any]:
    """The input's own keys (or its id alone) and its rewards; or its id and what is wrong with it.

    One sequence: reward. A group: rewards, best (the first index, from 0, of the highest) and best_response; with
    --rank rewards and `SORTED`, best first, and ranking (indices in the input). A pair: reward_chosen, reward_rejected,
    margin (their difference), p_chosen (sigmoid of the margin times `std`). The input's margin becomes data_margin; its
    other keys of these names are left out.
    """
    if isinstance(rewards, RowError):
        own = {"id": record["id"]} if isinstance(record, dict) and "id" in record else {}
        return own | {"error": str(rewards)[:500]}
    own = {key: value for key, value in record.items() if key not in KEYS and (key == "id" or not options.only_rewards)}
    values = [_rounded(reward) for reward in rewards]
    _, key = form_of(record)
    if key and options.rank:
        order = np.argsort(-np.array(values), kind="stable").tolist()
        own.pop("comparisons", None)  # they name answers by their indices in the input
        lists = [name for name in SORTED if type(own.get(name)) is list and len(own[name]) == len(order)]
        own |= {name: [own[name][n] for n in order] for name in lists}
        return own | {"rewards": [values[n] for n in order], "ranking": order}
    if key:
        best = int(np.argmax(values))
        return own | {"rewards": values, "best": best, "best_response": record[key][best]}
    if len(values) == 1:
        return own | {"reward": values[0]}
    if "margin" in record and not options.only_rewards:
        own["data_margin"] = record["margin"]
    margin = float(rewards[0] - rewards[1])
    own |= {"reward_chosen": values[0], "reward_rejected": values[1], "margin": _rounded(margin)}
    return own | {"p_chosen": _rounded(0.5 * (1 + math.tanh(margin * std / 2)))}


def is_same(last: dict[str, Any], now: dict[str, Any], rounding: float) -> bool:
    """Whether two answers to a line agree; rewards, and so the order, may differ by rounding."""
    rounded = {*REWARDS, "best", "best_response", "ranking", *(SORTED if "ranking" in last else ())}
    is_equal = last.keys() == now.keys() and all(last[key] == now[key] for key in last.keys() - rounded)
    old, new = ([value for key in REWARDS for value in np.ravel(line.get(key, []))] for line in (last, now))
    return is_equal and len(old) == len(new) and np.allclose(old, new, rounding, rounding)


def _rounded(value: float) -> float:
    return float(str(np.float32(value)))  # as few digits as distinguish float32 numbers


@contextmanager
def open_output(path: Path) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
    """An output to append to, locked and cut after its last complete line; this line, or {}. Raises `InputError`."""
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
        yield file, json.loads(last or b"{}")


if __name__ == "__main__":
    run_program(lambda argv: sys.exit(main(argv)))
