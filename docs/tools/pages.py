"""What is put into the pages when they are built, so that they show the tree as it is: functions, and the help texts.

`{{ source PATH NAME }}` becomes the source of a function or class, `{{ help }}` what every command says of itself.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[2]


def source(path: str, name: str) -> str:
    """Return the definition of a function or class at the top level of a file, as a code block."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = text.splitlines()[start - 1 : node.end_lineno]
            return "\n".join([f'```python title="{path}"', *lines, "```"])
    raise PluginError(f"{path} defines no {name}")


def help_texts() -> str:
    """Return what `ldm-fast COMMAND --help` prints, for every command."""
    os.environ["COLUMNS"] = "100"  # argparse asks how wide the terminal is
    from ldm_fast.cli.options import build_parser

    parser = build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    return "\n\n".join(f"## {name}\n\n```text\n{command.format_help()}```" for name, command in commands.items())


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the text of every page."""
    markdown = re.sub(r"\{\{ source (\S+) (\S+) \}\}", lambda found: source(found[1], found[2]), markdown)
    return markdown.replace("{{ help }}", help_texts()) if "{{ help }}" in markdown else markdown
