"""Progress bars on stderr."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """Bars that appear if the work takes longer than a second. Call it with what is done, how much, and of how much.

    A log file gets a line every ten seconds, not one for every step.
    """

    def __init__(self) -> None:
        self.what = ""
        self.bar: Any = None  # of tqdm

    def __enter__(self) -> Progress:
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if what != self.what:
            self.__exit__()
            self.what = what
            pace = {"dynamic_ncols": True} if sys.stderr.isatty() else {"mininterval": 10}
            self.bar = tqdm(total=total, desc=what, unit="step", delay=1, leave=False, **pace)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
