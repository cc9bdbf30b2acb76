"""Files that are whole after a crash."""

from __future__ import annotations

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Have the operating system bring a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it has the old content or the new one, whenever the machine stops."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    fsync(part)
    part.replace(path)
