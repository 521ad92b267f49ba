"""Progress on stderr."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """Bars that appear when the work takes longer than a second; called with (what is done, done, of how many).

    A log file gets a line now and then, not one for every step.
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
