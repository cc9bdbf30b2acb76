"""Write report.html of one run, or a leaderboard of several, as one page without network or scripts."""

from pathlib import Path

from rm.config.cli import parse, run_program
from rm.config.errors import InputError
from rm.config.files import write_file
from rm.config.section import Section, option
from rm.log.trackers import print_safely
from rm.report.page import report_html


class Reporting(Section):
    """usage: python -m rm.report OUT [OUT ...] [--output FILE] [--by METRIC]

    Write report.html of a run, or a leaderboard of several runs.
    """

    folders: list[str] = option(..., "output folders of runs, finished or not, as words without an option name")
    output: str | None = option(None, "file to write; none: OUT/report.html (needed for several runs)")
    by: str = option("eval/accuracy", "metric that sorts several runs")


def main(argv: list[str]) -> None:
    """Write the page that the command line asks for."""
    given, _ = parse(argv, Reporting, positional="folders")
    if given.output is None and len(given.folders) > 1:
        raise InputError("several runs: give --output FILE, such as --output comparison.html")
    output = Path(given.output or Path(given.folders[0]) / "report.html")
    write_file(output, report_html(given.folders, given.by))
    print_safely(str(output))


if __name__ == "__main__":
    run_program(main)
