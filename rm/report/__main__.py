"""report.html: a run, or several side by side, as one page without network, scripts or anything outside it.

python -m rm.report OUT                                  # OUT/report.html anew, from what lies in the folder
python -m rm.report A B C --output comparison.html       # runs overlaid, with the options in which they differ
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rm.config.files import write_text
from rm.config.redact import safe_line
from rm.report.page import report_html
from rm.report.read_run import ReadError

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> Path:
    """Write the report of the folders on the command line; returns where."""
    parser = argparse.ArgumentParser("python -m rm.report", description="report.html of a run, or of several compared")
    parser.add_argument("folders", nargs="+", metavar="OUT", help="output folder of a run, finished or not")
    parser.add_argument(
        "--output", metavar="FILE", help="where to write; default: OUT/report.html (needed for several)"
    )
    given = parser.parse_args(argv)
    folders = list(dict.fromkeys(given.folders))
    if given.output is None and len(folders) > 1:
        raise ReadError("several runs: give --output FILE, such as --output comparison.html")
    output = Path(given.output or Path(folders[0]) / "report.html")
    page = report_html(folders)
    if output.is_dir() or not output.parent.is_dir():
        raise ReadError(f"--output: '{output}' is no place for a file")
    write_text(output, page, errors="backslashreplace")
    print(output)
    return output


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    try:
        main(sys.argv[1:])
    except (ReadError, OSError) as error:
        sys.exit(print(safe_line(f"error: {error}"), file=sys.stderr) or 2)
