"""A bare fork after parallel work: our kernels go on, and PyTorch's own ops do once they are told to use one thread."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ldm_fast.ops import native

pytestmark = [
    pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="no fork, or no GNU OpenMP"),
    pytest.mark.skipif(native.extension() is None, reason="there are no native CPU kernels"),
]

# Works on two threads, forks, and works again in the child, which an alarm ends if it hangs. argv: what to do before.
PROGRAM = """
import os, signal, sys
import torch
from ldm_fast import ops
from ldm_fast.ops.threads import usable_threads

q, x, z = torch.randn(2, 8, 256, 40), torch.randn(2, 64, 64, 64), torch.randn(5000, 8)
weight, codebook = torch.ones(64), torch.randn(512, 8)
if "work" in sys.argv:
    torch.set_num_threads(2)

def ours():
    return [
        ops.attention(q, q, q, impl="cpu"),
        ops.group_norm_silu(x, 32, weight, weight, impl="cpu"),
        ops.nearest_codebook(z, codebook, impl="cpu"),
    ]

def pytorchs():
    return [torch.relu(x), x + x, torch.nn.functional.conv2d(x, x[:1])]

if "work" in sys.argv:
    before = ours() if "ours" in sys.argv else ours() + pytorchs()
    assert usable_threads() == 2
child = os.fork()
if child == 0:
    signal.alarm(30)
    if "one thread" in sys.argv:
        torch.set_num_threads(1)
    if "work" not in sys.argv:
        os._exit(0 if usable_threads() == torch.get_num_threads() and ours() else 2)
    after = ours() if "ours" in sys.argv else ours() + pytorchs()
    same = all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(ours(), before))
    os._exit(0 if same and usable_threads() == 1 else 2)
_, status = os.waitpid(child, 0)
ours()
assert usable_threads() == torch.get_num_threads()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("given", [("work", "ours"), ("work", "one thread"), ()], ids=str)
def test_work_after_a_fork(given: tuple[str, ...]) -> None:
    """The child's results are the parent's, which goes on as before. Without work before, the child has all threads."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *given], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr or f"exit code {done.returncode}: -14 is a child that hung"
