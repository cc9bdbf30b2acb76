"""The README's commands, paths, options, metrics and diffs match the code."""

import dataclasses
import importlib
import re

from conftest import ROOT
from test_train import SMALL, reset_accelerate

import train_rm
from rm.command_line import parse_config
from rm.config import RewardConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def test_every_path_exists():
    paths = set(re.findall(r"`((?:rm|tests|configs|docs)/[\w./-]*)`", README))
    paths |= set(re.findall(r"\]\((?!http)([\w./-]+)\)", README)) | set(re.findall(r"configs/[\w/]+\.yaml", README))
    assert len(paths) > 15
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_the_tree_lists_every_module():
    tree = section("The tree")
    modules = {path.name for path in (ROOT / "rm").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"^rm/(\w+\.py)", tree, re.M)) == modules


def test_modules_import_only_what_stands_above_them():
    order = re.findall(r"^rm/(\w+)\.py", section("The tree"), re.M)
    for place, name in enumerate(order):
        imported = re.findall(r"^\s*from rm\.(\w+) import", (ROOT / "rm" / f"{name}.py").read_text(), re.M)
        assert set(imported) <= set(order[:place]), f"rm/{name}.py imports {set(imported) - set(order[:place])}"


def test_option_table_is_complete():
    rows = re.findall(r"^\| \*\*(\w+)\*\* \| (.*) \|$", section("Configuration"), re.M)
    listed = [name for _, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert listed == [f.name for f in dataclasses.fields(RewardConfig)]
    assert [title for title, _ in rows] == [
        f.metadata["section"] for f in dataclasses.fields(RewardConfig) if f.metadata["section"]
    ]


def test_glossary_has_every_metric(tmp_path):
    reset_accelerate()
    more = ["--head_learning_rate=1e-3", "--metric_for_best_model=eval/loss", "--eval_steps=2"]
    summary = train_rm.main(["dataset_name=toy", *SMALL, *more, f"--output_dir={tmp_path / 'out'}"])
    lines = (tmp_path / "out" / "metrics.jsonl").read_text()
    emitted = set(summary) | set(re.findall(r'"((?:train|eval|optim|speed)/[\w/]+)"', lines))
    subsets = {name.split("/")[1] for name in emitted if name.count("/") == 2}
    emitted = {re.sub(rf"/({'|'.join(subsets)})/", "/<subset>/", name) for name in emitted} - {"output_dir"}
    of_every_run, _, _ = section("Metrics").partition("**Benchmarks.**")  # the rest: see test_rewardbench.py
    defined = set(re.findall(r"`((?:train|eval|optim|speed)/[\w/<>]+)`", of_every_run))
    assert emitted == defined


def test_commands_parse():
    """Every `train_rm.py` command line of the README is accepted by the parser (files that it names aside)."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    commands = [line.split("train_rm.py", 1)[1] for line in lines if "train_rm.py" in line]
    assert commands
    for command in commands:
        parse_config([str(ROOT / word) if word.startswith("configs/") else word for word in command.split()])


def test_the_test_command_is_what_ci_runs():
    found = re.search(r"<!-- test command -->\n```bash\n(.*?)\n```", README, re.S)[1]
    assert found.startswith("python3 -m venv") and found.endswith("pytest")
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()


def test_benchmarks_import_what_exists():
    """They are not run with the tests, but what they take from rm/ must be there."""
    for path in (ROOT / "tests" / "bench").glob("*.py"):
        for module, names in re.findall(r"^\s*from (rm\.\w+) import ([\w, ]+)", path.read_text(), re.M):
            for name in names.split(","):
                assert hasattr(importlib.import_module(module), name.strip()), f"{path.name}: {module} has no {name}"
