"""What mkdocstrings is told besides: a comment on a field of a class describes that field in the reference.

Our dataclasses say what a field means in a comment behind it, or in the lines before it. This extension of griffe adds
those comments to the docstring of the class, as its "Attributes" section.
"""

from __future__ import annotations

import tokenize
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from griffe import Attribute, Class, ExprCall, Extension


@cache
def comments(path: Path) -> tuple[Mapping[int, str], frozenset[int]]:
    """The comments of a file by line, and the lines that are nothing but a comment."""
    with tokenize.open(path) as file:
        tokens = [t for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.COMMENT]
    found = {t.start[0]: t.string.removeprefix("#").strip() for t in tokens}
    return found, frozenset(t.start[0] for t in tokens if t.line.lstrip().startswith("#"))


def describe(field: Attribute, path: Path) -> str:
    """Return the comment lines before a field and the comment behind it, as one text."""
    found, alone = comments(path)
    first = last = field.lineno or 0
    while first - 1 in alone:
        first -= 1
    last = field.endlineno or last
    return " ".join(found[line] for line in range(first, last + 1) if line in found)


class FieldComments(Extension):
    """Adds the comments on a class's fields to its docstring."""

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Called by griffe when it has read a class."""
        path = Path(str(cls.filepath))
        lines = []
        for name, field in cls.attributes.items():
            if field.annotation is None or name.startswith("_") or field.inherited:
                continue
            if isinstance(field.value, ExprCall) and str(field.value.function) == "free":
                field.value = field.value.arguments[0]  # `free(500)` is a field with the default 500
            text = describe(field, path)
            if text and not field.docstring:
                lines.append(f"    {name}: {text}")
        if lines and cls.docstring is not None and "Attributes:" not in cls.docstring.value:
            cls.docstring.value = "\n".join([cls.docstring.value.rstrip(), "", "Attributes:", *lines])
