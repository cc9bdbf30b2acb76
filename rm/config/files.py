"""Files and folders that are complete after a crash, values that JSON can hold, and the lock of a folder."""

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from rm.config.errors import InputError

logger = logging.getLogger(__name__)

GO_ON = "fix this, then resume with --resume_from_checkpoint=latest"
MANIFEST = "manifest.json"
LOCK, LOCK_SECONDS = ".run_lock", 60.0  # a requeued job may start while the old one still writes its checkpoint


class DiskError(OSError):
    """A file of the run cannot be written; `filename` and `strerror` say which and why."""


@contextmanager
def naming(what: Path | str, partial: Path | None = None) -> Iterator[None]:
    """Raise a failure to write as `DiskError` with `what`, which the error of an open file or of safetensors does not
    name, after removing the folder `partial`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
        problem = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DiskError(getattr(error, "errno", None), problem, str(what)) from error


def fsync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file (text in UTF-8, lone surrogates escaped); after a crash it has the old or the new content."""
    part = path.with_name(f".{path.name}.part")
    with naming(path):
        part.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
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


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def new_folder(final: Path) -> Path:
    """An empty hidden folder beside `final`."""
    shutil.rmtree(hidden := final.with_name(f".{final.name}.partial"), ignore_errors=True)
    with naming(hidden):
        hidden.mkdir(parents=True)
    return hidden


def publish_folder(hidden: Path, final: Path, known: Mapping[str, Any] | None = None) -> None:
    """Add the manifest to a folder, flush all of it to the disk, and rename it to `final`. Raises OSError.

    `known`: digests of some of its files, by name.
    """
    names = sorted(path.relative_to(hidden).as_posix() for path in hidden.rglob("*") if path.is_file())
    manifest = {name: (known or {}).get(name) or digest(hidden / name) for name in names}
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
    manifest = read_json(folder / MANIFEST)
    if not manifest or (needed and needed not in manifest):
        return f"{folder / MANIFEST} is missing or damaged"
    try:
        changed = [name for name, expected in manifest.items() if digest(folder / name) != expected]
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except ValueError as error:  # a name that no file can have
        return f"{folder / MANIFEST} is damaged ({error})"
    return f"the content of {changed[0]} has changed (size or sha256)" if changed else None


def lock_folder(folder: Path) -> IO[str]:
    """Lock `folder` until the returned file is closed or this process ends, also by SIGKILL.

    The lock is a POSIX record lock: forked workers do not inherit it, and it works on NFS (with lockd) and Lustre (with
    `-o flock`). Raises `InputError` if another process has not released it within `LOCK_SECONDS`.
    """
    file, started, holder = open(folder / LOCK, "a+", encoding="utf-8", errors="replace"), time.monotonic(), ""
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # POSIX allows both
            if not holder:
                holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace") or "another process"
                logger.warning(f"{folder} is used by {holder}; waiting up to {LOCK_SECONDS:g} s")
            if time.monotonic() - started > LOCK_SECONDS:
                raise InputError(f"output_dir={folder} is used by {holder}; choose another") from None
            time.sleep(0.2)
        except OSError as error:
            logger.warning(f"{folder} cannot be locked ({error.strerror}): start no second run in it")
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file
