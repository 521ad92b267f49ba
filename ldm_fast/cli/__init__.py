"""The command line: `ldm-fast generate | reconstruct | evaluate | train | doctor | bench`.

This file is what every command shares: where it starts, and how its errors reach the user. The options are in
options.py, the commands in commands.py, one function each. A command imports by itself what takes time to import.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from typing import TextIO

from ldm_fast.cli.commands import Stopped
from ldm_fast.cli.options import build_parser

EXPECTED_ERRORS = (ValueError, TypeError, OSError, RuntimeError, MemoryError)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    That is 1 after an error, and 128 plus the number of the signal that stopped the command, as shells count. An error
    in the input is one line on stderr.
    """
    options = build_parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _show_warning
        try:
            return int(options.run(options) or 0)
        except KeyboardInterrupt:
            return _fail(options, "interrupted", 130)
        except Stopped as stopped:
            return _fail(options, _one_line(stopped), 128 + stopped.signal)
        except Exception as error:
            expected = isinstance(error, EXPECTED_ERRORS)
            name = "" if expected else f"this is a bug; --debug shows where: {type(error).__name__}: "
            return _fail(options, name + _one_line(error), 1)


def _fail(options: argparse.Namespace, message: str, code: int) -> int:
    if options.debug:
        traceback.print_exc()
    _report(message)
    return code


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError) or "not enough memory" in str(error):
        return "not enough memory for this size and number of images"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        _report(f"warning: {' '.join(str(message).split())}")


def _report(message: str) -> None:
    from ldm_fast.files.file_names import printable

    print(f"ldm-fast: {printable(message)}", file=sys.stderr)
