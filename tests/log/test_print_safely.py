"""Tests of `print_safely`: what is printed arrives; a closed or full standard output does not end the program."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from rm.log.trackers import print_safely

ROOT = Path(__file__).resolve().parents[2]


def test_texts_and_tables(capsys):
    table = Table("a")
    table.add_row("[x]")
    long = '{"[red]": "' + "word " * 100 + '"}'  # neither wrapped nor taken for markup
    print_safely(long, table)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == long and len(shown) == 6


def test_ascii(tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        print_safely("é", console=Console(file=file))
    assert (tmp_path / "out").read_text() == "\\xe9\n"


@pytest.mark.parametrize("where", [">/dev/full", ">&-", "| true"])
def test_stdout_that_is_lost(where, tmp_path):
    code = "import sys, time; from rich.table import Table; from rm.log.trackers import print_safely; time.sleep(0.2)\n"
    code += "for _ in range(3): print_safely('x' * 100_000, Table('a'))\nprint('end', file=sys.stderr)"
    command = f'set -o pipefail; {sys.executable} -c "$CODE" {where}'
    options = {"cwd": ROOT, "env": {"CODE": code}, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", command], **options)
    assert done.returncode == 0 and done.stderr.endswith("end\n"), done.stderr
    assert done.stderr.count("cannot be written") == (where != ">&-")
