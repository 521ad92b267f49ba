"""Progress on stderr."""

from __future__ import annotations


class Progress:
    """Bars that appear when the work takes longer than a second; called with (what is done, done, of how many)."""

    def __init__(self) -> None:
        self.what, self.bar = "", None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if what != self.what:
            self.__exit__()
            self.what = what
            self.bar = tqdm(total=total, desc=what, unit="step", delay=1, leave=False, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
