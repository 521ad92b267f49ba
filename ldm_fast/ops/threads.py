"""How many threads a CPU kernel may use: PyTorch's number, but one in a forked process whose threads are lost.

A fork copies only the thread that called it. The OpenMP runtime does not know this, and waits for the others for ever,
in our kernels as in PyTorch's own. With one thread nobody is waited for.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch


def _foreign_threads() -> int | None:
    """Return how many threads other than Python's this process has, None where that cannot be known."""
    try:
        return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()
    except OSError:
        return None


class _Fork:
    """Whether OpenMP's threads had been started when this process forked, and whether it is such a fork.

    They are told by their number alone, so those that `torch.set_num_threads` starts (not OpenMP's) count as well.
    """

    def __init__(self) -> None:
        self.at_import = _foreign_threads()  # NumPy's library of linear algebra has some, which it starts again itself
        self.had_threads = self.lost_threads = False

    def before(self) -> None:
        now = _foreign_threads()
        self.had_threads = now is None or self.at_import is None or now > self.at_import

    def after_in_child(self) -> None:
        self.lost_threads = self.lost_threads or self.had_threads


_fork = _Fork()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_fork.before, after_in_child=_fork.after_in_child)


def usable_threads() -> int:
    """Return how many threads a kernel may use."""
    return 1 if _fork.lost_threads else torch.get_num_threads()
