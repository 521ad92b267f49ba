"""The package called kernels on PyPI, beside ours, which is imported as ldm_fast.kernels, changes nothing.

Tried with the real one (0.17.2) before ours on the path: the same `explain()`, the same picture, and the
tests of CLIP's encoders pass, whose package transformers looks for it. If it is installed, it is what is tested here.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAND_IN = """
__version__ = "0.17.2"
def __getattr__(name):
    raise RuntimeError(f"ldm_fast asked the other package for {name}")
"""
PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:]
import kernels
other = kernels.__file__
import torch
import ldm_fast
from ldm_fast import ops
from ldm_fast.ops.dispatch import IMPLEMENTATIONS, implementation
assert sys.modules["kernels"].__file__ == other and other.startswith(sys.argv[1]), other
print(ldm_fast.explain())
q = torch.arange(80.0).reshape(1, 1, 10, 8) / 80
print(ops.attention(q, q, q).sum().item(), ops.group_norm_silu(q, 1, None, None).sum().item())
modules = {module for row in IMPLEMENTATIONS.values() for module in row.values() if ".kernels." in module}
print(sorted(modules))
"""


def test_the_published_package_changes_nothing(tmp_path: Path) -> None:
    try:
        place = str(Path(str(importlib.metadata.distribution("kernels").locate_file(""))))
    except importlib.metadata.PackageNotFoundError:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text(STAND_IN)
        place = str(tmp_path)
    plain = PROGRAM.replace("import kernels\nother = kernels.__file__\n", "").replace("assert", "#")
    outputs = [
        subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True).stdout
        for program, paths in ((PROGRAM, (place, str(ROOT))), (plain, (str(ROOT),)))
    ]
    assert outputs[0] == outputs[1] and "attention on cpu" in outputs[0]
