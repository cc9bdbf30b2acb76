"""metrics.jsonl: the record of every number that a run logs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from rm.config.errors import InputError
from rm.config.files import finite, naming, write_text

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends JSON objects to a file, one per line; `num_lines` is their number.

    An existing file keeps its first `resume_lines` lines (None: it starts empty). If other content is removed, the old
    file stays as metrics.jsonl.bak. Raises `InputError` if it is not UTF-8, and `DiskError` if it cannot be written.
    """

    def __init__(self, path: Path, resume_lines: int | None = None):
        self.path, wanted = path, resume_lines or 0
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_bytes() if path.exists() else b""
            complete = [line for line in old.splitlines(keepends=True) if line.endswith((b"}\n", b"}\r\n"))]
            kept = complete[:wanted]  # a crash may have torn the last line
            try:
                (b"".join(kept) if len(kept) == wanted else old).decode()
            except UnicodeDecodeError:
                raise InputError(f"{path}: is not UTF-8; restore it, or remove it to resume without it") from None
            if len(kept) < wanted:
                logger.warning(f"{path}: has {len(kept)} of the {wanted} lines before the checkpoint")
            if b"".join(kept) != old:
                shutil.copyfile(path, path.with_name("metrics.jsonl.bak"))
                write_text(path, b"".join(kept).decode())
            self.num_lines, self._file = len(kept), path.open("a", encoding="utf-8", newline="\n")

    def append(self, metrics: dict[str, Any], step: int) -> None:
        """Write {"step": step, "time": seconds since 1970, **metrics}. It is in the file when this returns.

        NaN and infinities, which JSON does not have, become "NaN", "Infinity" and "-Infinity"; `float()` reads them.
        """
        line = {"step": step, "time": round(time.time(), 3)} | finite(metrics)
        with naming(self.path):
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        self.num_lines += 1

    def sync(self) -> int:
        """Write the file to the disk; returns `num_lines`."""
        with naming(self.path):
            os.fsync(self._file.fileno())
        return self.num_lines

    def close(self) -> None:
        self._file.close()
