"""README.md and docs/: paths, commands, links and limits. No test reads what a sentence says."""

import ast
import importlib
import itertools
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

from rm.config import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
BASH = "".join(re.findall(r"^```bash\n(.*?)^```$", "\n".join(TEXTS.values()), re.M | re.S)).replace("\\\n", " ")


def commands() -> list[tuple[str, list[str]]]:
    """(program, arguments) of each command line with one of our programs."""
    lines = [iter(shlex.split(line, comments=True)) for line in BASH.splitlines()]
    programs = [next((word for word in line if re.fullmatch(r"train_rm\.py|rm\.\w+", word)), None) for line in lines]
    rests = [list(itertools.takewhile(lambda word: word not in ("|", ">", "&&"), line)) for line in lines]
    return [(program, rest) for program, rest in zip(programs, rests, strict=True) if program]


@pytest.mark.parametrize("page", TEXTS)
def test_paths_and_links_exist(page):
    for path in re.findall(r"(?<![\w/.])((?:rm|docs|tests|configs)/[\w./-]*\w)", TEXTS[page]):
        assert re.search(r"\b[A-Z]{2,}\b", path) or (ROOT / path).exists(), path  # NAME: any file
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


def test_commands_are_accepted(monkeypatch):
    """The parser of each program takes them; nothing is run, and files of the reader need not exist."""

    def only_parse(*given, **options):
        cli.parse(*given, **options)
        raise KeyboardInterrupt

    for program, arguments in commands():
        if program == "train_rm.py":
            cli.parse_config(arguments)
        else:
            module = importlib.import_module(f"{program}.__main__")
            monkeypatch.setattr(module, "parse", only_parse)
            pytest.raises(KeyboardInterrupt, module.main, arguments)


def test_limits_and_test_command_of_the_readme():
    lines = [re.sub(r"\]\([^)]*\)", "", line) for text in TEXTS.values() for line in text.splitlines()]
    assert max(map(len, lines)) <= 200
    assert len(TEXTS["README.md"].split()) <= 2400 and TEXTS["README.md"].count("\n") <= 300
    find = re.search(r"command=\$\((.*)\)", (ROOT / ".ci" / "run").read_text())[1]  # what .ci/run runs
    assert "pytest" in subprocess.run(find, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_benchmarks_import_what_exists():
    trees = [ast.parse(script.read_text(encoding="utf-8")) for script in (ROOT / "tests" / "bench").glob("*.py")]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if node.module.split(".")[0] == "rm":
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == [], node.module
