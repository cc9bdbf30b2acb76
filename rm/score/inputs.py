"""JSON lines that are too many for memory: read one by one, and answered in a file that a later start goes on with."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from rm.config.errors import InputError
from rm.data.items import ItemError
from rm.data.load import one_line

START = b'{"line": '  # of every line that is written
MAX_LINE = 64 << 20  # bytes; a longer line is not read
NUM_CHECKED = 4  # lines at each end of an output that are compared with what would be written now


class Stopped(BaseException):
    """A signal asked to stop; no `Exception`, so that nothing on the way catches it. `args[0]` is its number."""


# ---------------------------------------------------------------- what comes in


def open_input(path: str | None) -> tuple[BinaryIO, BinaryIO]:
    """The lines (a file, also .gz; None: stdin), and the raw file whose position tells how far they are read."""
    if path is None:
        return sys.stdin.buffer, sys.stdin.buffer
    raw = open(path, "rb")  # noqa: SIM115
    return (gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw), raw


def read_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line) of every line that is not blank; None for a line longer than `MAX_LINE`.

    Raises:
        InputError: the compressed file is broken, or the disk; after the lines that could be read.
    """
    number = 0
    try:
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            if len(line) <= MAX_LINE:
                if line.strip():
                    yield number, line
                continue
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE)
            yield number, None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name}: cannot be read after line {number}: {one_line(error)}") from error


def windows(lines: Iterator[tuple[int, bytes | None]], size: int) -> Iterator[list[tuple[int, bytes | None]]]:
    """So many lines at a time; what was read before an error comes before the error."""
    window, problem = [], None
    while problem is None:
        try:
            window = []
            for line in itertools.islice(lines, size):
                window.append(line)
        except InputError as error:
            problem = error
        if window:
            yield window
        elif problem is None:
            return
    raise problem


def parse_line(number: int, line: bytes | None) -> dict:
    """The JSON object in a line. Raises `ItemError`."""
    if line is None:
        raise ItemError(f"the line is longer than {MAX_LINE >> 20} MiB")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ItemError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ItemError(f"not JSON: {error}") from None
    if type(record) is not dict:
        raise ItemError("not a JSON object with keys")
    return record


# ---------------------------------------------------------------- what goes out


def to_line(record: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can escape
        return (json.dumps(record) + "\n").encode()


def read_output(path: Path) -> tuple[int, int, list[dict]]:
    """Bytes in whole lines of an output and in all of it (0 if there is none), and its first and last few records.

    Raises:
        InputError: they are not what `rm.score` writes.
    """
    end, size, count, first, last = 0, 0, 0, [], deque(maxlen=NUM_CHECKED)
    fix = "give another --output, or remove it"
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                size += len(line)
                if line.endswith(b"\n"):
                    end += len(line)
                    (first if count < NUM_CHECKED else last).append(line)
                    count += 1
                elif line[: len(START)] != START[: len(line)]:  # torn lines of ours begin so; others' are not cut
                    raise InputError(f"{path}: holds something else than the rewards of earlier lines; {fix}")
    records, before = [], 0
    for line in (*first, *last):
        try:
            record = json.loads(line)
            number = record["line"]
            assert type(number) is int and number > before
        except (ValueError, TypeError, KeyError, AssertionError):
            raise InputError(f"{path}: holds something else than the rewards of earlier lines; {fix}") from None
        records.append(record)
        before = number
    if count > before:
        raise InputError(f"{path}: holds {count} lines, the last of which answers line {before}; {fix}")
    return end, size, records


def open_output(path: Path, end: int, size: int) -> BinaryIO:
    """The output to append to, cut behind its last whole line, and locked: nobody else appends to it.

    Raises:
        InputError: another program writes it, or has done so since it had `size` bytes.
    """
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_size != size:
            raise BlockingIOError
    except BlockingIOError:
        file.close()
        raise InputError(f"{path}: another program is writing it; wait for that, or give another --output") from None
    file.truncate(end)
    return file


class Signals:
    """SIGINT and SIGTERM raise `Stopped`, but not inside `held`: after it."""

    def __init__(self):
        self.is_held, self.received = False, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _) -> None:
        if self.received is not None:  # the second one
            die_of(number)
        self.received = number
        if not self.is_held:
            raise Stopped(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        if self.received is not None:
            raise Stopped(self.received)


def die_of(number: int) -> None:
    """End by the signal, as if nobody had caught it: a shell sees 128 + its number."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
