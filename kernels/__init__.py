"""Triton kernels, imported as `ldm_fast.kernels`: a file for each op and direction.

Importing this package costs nothing and needs no Triton, so that `unavailable()` can explain a missing one. The files
of the ops do need it: ask `unavailable()` first, then import `ldm_fast.kernels.<op>`.
"""

import contextlib
import functools
import os
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

_OLDEST = (8, 0)  # compute capability: Triton supports it, and a program's shared memory is planned for it


class Launch(NamedTuple):
    """One kernel launch as data: an op runs its launches, the static checks compile the same ones without a GPU."""

    kernel: Any  # a function under `triton.jit`, which is untyped
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]
    resident: int = 1  # programs that one multiprocessor is meant to hold at a time, as registers and memory allow

    @property
    def keywords(self) -> dict[str, Any]:
        """The options, and fused multiply-adds: from Triton 3.10 on, the compiler makes them only if it is told to."""
        return {"enable_fp_fusion": True, **self.options}

    def run(self) -> None:
        """Launch on the device of the tensors."""
        device = next(arg.device for arg in self.args if isinstance(arg, torch.Tensor))
        # Triton launches on the current device, which need not be that of the tensors
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.programs,)](*self.args, **self.keywords)


def cdiv(n: int, step: int) -> int:
    """n / step, rounded up. Triton's own takes 5 µs on the host, and a launch asks for several."""
    return -(-n // step)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n above 0."""
    return 1 << (n - 1).bit_length()


def interpreting() -> bool:
    """Whether Triton decorates kernels for its CPU interpreter; it reads the same variable when it decorates them."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable() -> str | None:
    """Why no Triton kernel can run here, in one line that says what would change it; None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed: `pip install triton` (on Linux) brings it"
    if not interpreting() and not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU (TRITON_INTERPRET=1, set before the start, runs the kernels slowly on a CPU)"
    if not interpreting() and torch.version.cuda is None:
        return "the Triton kernels are planned for NVIDIA GPUs, and this PyTorch is built for others"
    return None


def refuse(x: torch.Tensor) -> str | None:
    """Why no Triton kernel takes a tensor of this dtype on this device; None if they do."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the Triton kernels take float16, bfloat16 and float32, not {x.dtype}"
    if interpreting():
        # its tl.dot multiplies the bits of bfloat16 numbers as integers
        return "Triton's interpreter computes bfloat16 wrongly" if x.dtype == torch.bfloat16 else None
    if not x.is_cuda:
        return f"the Triton kernels need tensors on a CUDA GPU, not on {x.device}"
    major, minor = capability(x.device)
    if (major, minor) < _OLDEST:
        return f"the Triton kernels need a GPU of compute capability 8.0 or newer, {x.device} has {major}.{minor}"
    return None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)
