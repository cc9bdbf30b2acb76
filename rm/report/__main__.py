"""Write report.html of one run, or a leaderboard of several, as one page without network or scripts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rm.config.cli import parse
from rm.config.errors import InputError
from rm.config.files import write_text
from rm.config.redact import safe_line
from rm.config.section import Section, option
from rm.report.page import report_html


class Reporting(Section):
    """usage: python -m rm.report OUT [OUT ...] [--output FILE] [--by METRIC]

    Write report.html of a run, or a leaderboard of several runs.
    """

    folders: list[str] = option(..., "output folders of runs, finished or not; also without --folders")
    output: str | None = option(None, "file to write; none: OUT/report.html (needed for several runs)")
    by: str = option("eval/accuracy", "metric that sorts several runs")


def main(argv: Sequence[str]) -> Path:
    """Write the page that the command line asks for; returns its path."""
    given, _ = parse(list(argv), Reporting, positional="folders")
    folders = list(dict.fromkeys(given.folders))
    if given.output is None and len(folders) > 1:
        raise InputError("several runs: give --output FILE, such as --output comparison.html")
    output = Path(given.output or Path(folders[0]) / "report.html")
    page = report_html(folders, given.by)
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output: '{output}' is a directory, or its directory does not exist")
    write_text(output, page, errors="backslashreplace")
    print(output)
    return output


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        sys.exit(print(safe_line(f"error: {error}"), file=sys.stderr) or 2)
