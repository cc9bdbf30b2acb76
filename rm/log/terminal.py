"""Printing to standard output, which may be closed or full: neither ends a run."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress

from rich.console import Console

logger = logging.getLogger(__name__)


def print_safely(*objects: object, console: Console | None = None) -> None:
    """Print texts (unchanged) and rich tables. If that fails, warn once and discard what is printed from then on."""
    console = console or Console(file=sys.stdout)
    try:
        for item in objects:
            with console.capture() as capture:  # without it, rich ends the process if the pipe is closed
                console.out(item, highlight=False) if isinstance(item, str) else console.print(item)
            console.file.write(capture.get().encode(console.encoding, "backslashreplace").decode(console.encoding))
        console.file.flush()
    except (OSError, ValueError) as error:  # ValueError: the file object is closed
        logger.warning(f"standard output cannot be written ({error}); the run continues without it")
        with suppress(OSError, ValueError):  # otherwise Python flushes it at exit and fails
            os.dup2(os.open(os.devnull, os.O_WRONLY), console.file.fileno())
