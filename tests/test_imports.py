"""The structure: packages import in one direction, modules stay small, and the main program fits its limits."""

import ast

import pytest
from conftest import ROOT

ORDER = "config data collate model loss forward log visualize_samples score evaluate report train".split()
MODULES = sorted((ROOT / "rm").rglob("*.py"))


def imported(path) -> set[str]:
    """The parts of rm/ that a module imports, at its top or inside of a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rm."):
            found.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("rm.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_packages_import_in_one_direction(path):
    name = path.relative_to(ROOT / "rm").parts[0].removesuffix(".py")
    allowed = ORDER[: ORDER.index(name) + 1] if name in ORDER else []
    assert imported(path) <= set(allowed), f"{name} may import from {', '.join(allowed)}"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def test_the_program_fits_its_limits():
    text = (ROOT / "train_rm.py").read_text(encoding="utf-8")
    length = {type(node).__name__: node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(text))
              if isinstance(node, ast.While) or isinstance(node, ast.FunctionDef) and node.name == "main"}  # fmt: skip
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES) <= 9000
    assert len(text.splitlines()) <= 300 and length["FunctionDef"] <= 180 and length["While"] <= 70, length
