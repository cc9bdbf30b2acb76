"""Files that are complete after a crash, and values that JSON can hold."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GO_ON = "fix this, then resume with --resume_from_checkpoint=latest"


class DiskError(OSError):
    """A file of the run cannot be written; `filename` and `strerror` say which and why."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise `OSError` as `DiskError` with `path`: an error of an open file does not name it."""
    try:
        yield
    except OSError as error:
        raise DiskError(error.errno, error.strerror, str(path)) from error


def fsync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file in UTF-8; after a crash it has either the old or the new content."""
    write_bytes(path, text.encode("utf-8", errors))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; after a crash it has either the old or the new content."""
    part = path.with_name(f".{path.name}.part")
    with naming(path):
        part.write_bytes(content)
        fsync(part)
        part.replace(path)
        fsync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def finite(value: Any) -> Any:
    """A copy of `value` for JSON: numbers that are not finite become "NaN", "Infinity" or "-Infinity"."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
