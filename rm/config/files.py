"""Files that are whole after a crash, and what they can hold."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GO_ON = "mend that and go on with --resume_from_checkpoint=latest"


def fsync(path: Path) -> None:
    """Have the operating system bring a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DiskError(OSError):
    """A file of the run cannot be written; `filename` and `strerror` say which and why."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise what goes wrong with writing `path` as `DiskError` with its name: where it was open it has none."""
    try:
        yield
    except OSError as error:
        raise DiskError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file in UTF-8 so that it has the old content or the new one, whenever the machine stops."""
    part = path.with_name(f".{path.name}.part")
    with naming(path):
        part.write_text(text, encoding="utf-8", errors=errors)
        fsync(part)
        part.replace(path)
        fsync(path.parent)


def fsync_folder(folder: Path) -> None:
    """Bring every file in `folder` to the disk, and the list of their names; not what is in folders of it."""
    for path in folder.iterdir():
        if path.is_file():
            fsync(path)
    fsync(folder)


def finite(value: Any) -> Any:
    """`value` as JSON can hold it, with "NaN", "Infinity" and "-Infinity" for such numbers, also in dicts and lists.

    `float()` and pandas read these names back.
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
