"""Names of files, which are bytes: how to show and to open those that are not UTF-8, and how long they may be.

Python gives such a name as a str with a lone surrogate for each byte that is not UTF-8 (PEP 383). No text file, and few
libraries in other languages, take one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

MOST_BYTES = 255  # of a name, in all common file systems


def printable(text: str) -> str:
    r"""Return text that any UTF-8 file can hold: a byte of a name becomes \xe9, say, another lone surrogate \ud800."""
    return re.sub("[\ud800-\udfff]", _escaped, text)


def _escaped(surrogate: re.Match[str]) -> str:
    number = ord(surrogate[0])
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else f"\\u{number:04x}"


def fitting_name(stem: str, ending: str, most: int = MOST_BYTES) -> str:
    """Return stem + ending, the stem cut at whole letters so that the name has at most so many bytes."""
    while len(os.fsencode(stem + ending)) > most:
        stem = stem[:-1]
    return stem + ending


@contextlib.contextmanager
def readable_by_others(path: str | Path) -> Iterator[str | Path]:
    """Yield a path of this file for code that takes only names in UTF-8; it leads to the file inside the block."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with Path(path).open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield path
