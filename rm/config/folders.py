"""Folders that are complete or absent, with a manifest of their files; and the lock of a folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO, Any

from rm.config.errors import InputError
from rm.config.files import fsync

try:
    import fcntl
except ImportError:  # Windows: folders are not locked
    fcntl = None

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOCK, LOCK_SECONDS = ".run_lock", 60.0  # a requeued job may start while the old one still writes its checkpoint


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def new_folder(final: Path) -> Path:
    """An empty hidden folder beside `final`."""
    shutil.rmtree(hidden := final.with_name(f".{final.name}.partial"), ignore_errors=True)
    hidden.mkdir(parents=True)
    return hidden


def publish_folder(hidden: Path, final: Path) -> None:
    """Add the manifest to a folder, flush all of it to the disk, and rename it to `final`. Raises OSError."""
    files = sorted(path for path in hidden.rglob("*") if path.is_file())
    manifest = {path.relative_to(hidden).as_posix(): digest(path) for path in files}
    (hidden / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in (*hidden.rglob("*"), hidden):
        fsync(path)
    hidden.rename(final)
    fsync(final.parent)
    fsync(final.parent.parent)


def discard_folder(folder: Path) -> None:
    """Remove a folder; at no moment is an incomplete one visible."""
    shutil.rmtree(hidden := folder.with_name(f".{folder.name}.partial"), ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def damage(folder: Path, needed: str = "") -> str | None:
    """What is wrong with a published folder, or None: every file agrees with the manifest, and `needed` is in it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(manifest, dict) or not manifest or needed and needed not in manifest:
            return f"{MANIFEST} does not name {needed}"
        for name, expected in manifest.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if not isinstance(expected, dict) or (folder / name).stat().st_size != expected.get("size"):
                return f"{name} has another size than {MANIFEST} states"
            if digest(folder / name) != expected:
                return f"the content of {name} has changed (sha256)"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is damaged"
    return None


def lock_folder(folder: Path) -> IO[str]:
    """Lock `folder` until the returned file is closed or this process ends, also by SIGKILL.

    The lock is a POSIX record lock: forked workers do not inherit it, and it works on NFS (with lockd) and Lustre (with
    `-o flock`). Raises `InputError` if another process has not released it within `LOCK_SECONDS`.
    """
    file, deadline = open(folder / LOCK, "a+", encoding="utf-8"), 0.0
    while fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # POSIX allows both
            holder = (folder / LOCK).read_text(encoding="utf-8")
            if not deadline:
                logger.warning(f"{folder} is used by {holder}; waiting up to {LOCK_SECONDS:g} s")
                deadline = time.monotonic() + LOCK_SECONDS
            if time.monotonic() > deadline:
                file.close()
                raise InputError(f"output_dir={folder} is used by {holder}; choose another") from None
            time.sleep(0.2)
        except OSError as error:
            logger.warning(f"{folder} cannot be locked ({error.strerror}): start no second run in it")
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file
