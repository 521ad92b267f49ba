"""Which implementation computes an op, and how an op is registered with PyTorch.

One table says who can compute what, best first. Every op is registered with `torch.library` (`Op`), so
`torch.compile(fullgraph=True)` sees one opaque node; the choice happens inside that node, when it runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

# Who can compute each op, best first. impl=None takes the first that supports the inputs.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "attention": {
        "triton": "ldm_fast.kernels.attention",
        "cpu": "ldm_fast.ops.cpu",
        "reference": "ldm_fast.ops.reference",
    },
    "group_norm_silu": {
        "triton": "ldm_fast.kernels.group_norm_silu",
        "cpu": "ldm_fast.ops.cpu",
        "reference": "ldm_fast.ops.reference",
    },
    # group_norm_silu in two: of the parts of an image that is never in memory as a whole
    "group_norm_stats": {
        "triton": "ldm_fast.kernels.group_norm_silu",
        "cpu": "ldm_fast.ops.cpu",
        "reference": "ldm_fast.ops.reference",
    },
    "group_norm_apply": {
        "triton": "ldm_fast.kernels.group_norm_silu",
        "cpu": "ldm_fast.ops.cpu",
        "reference": "ldm_fast.ops.reference",
    },
    "nearest_codebook": {
        "cuda": "ldm_fast.ops.cuda",
        "cpu": "ldm_fast.ops.cpu",
        "reference": "ldm_fast.ops.reference",
    },
    "nearest_codebook_stats": {
        "cuda": "ldm_fast.ops.cuda",
        "cpu": "ldm_fast.ops.cpu",
        "reference": "ldm_fast.ops.reference",
    },
}

IMPLEMENTATION_NAMES = ("triton", "cuda", "cpu", "reference")

_forced: list[tuple[str | None, object]] = []  # by each `use_impl` that is open, the innermost last


@contextlib.contextmanager
def use_impl(name: str | None) -> Iterator[None]:
    """Inside the `with` block every op with `impl=None` runs `name`: "triton", "cuda", "cpu" or "reference".

    An op that has no implementation of that name (nearest_codebook has no "triton") chooses as usual; one that has it
    but cannot run it here raises, as an explicit `impl=` would. A backward pass obeys the setting of the moment it runs
    in. The setting is one per process, not one per thread; of several threads' the one entered last holds.
    """
    if name is not None and name not in IMPLEMENTATION_NAMES:
        raise ValueError(f"use_impl: name must be one of {', '.join(IMPLEMENTATION_NAMES)}, got {name!r}")
    entered = (name, object())
    _forced.append(entered)
    try:
        yield
    finally:
        _forced.remove(entered)


def forced() -> str | None:
    """What `use_impl` asks for at the moment."""
    return _forced[-1][0] if _forced else None


@functools.cache
def module_of(op: str, impl: str) -> ModuleType | str:
    """The module that implements `op`, or the reason why it can run nothing in this process.

    A package is asked before what is in it: the Triton kernels are not imported where none could run.
    """
    path = IMPLEMENTATIONS[op][impl]
    try:
        for name in (path.rpartition(".")[0], path):
            module = importlib.import_module(name)
            reason = module.unavailable() if hasattr(module, "unavailable") else None
            if reason is not None:
                return reason
    except ImportError as error:
        return f"cannot be imported: {error}"
    return module


def why_not(op: str, impl: str, args: tuple[Any, ...]) -> str | None:
    """Why `impl` cannot compute `op` of these arguments here; None if it can."""
    module = module_of(op, impl)
    if isinstance(module, str):
        return module
    if not hasattr(module, op):
        return f"{module.__name__} does not compute {op}"
    return getattr(module, f"{op}_unsupported")(*args)


def choose(op: str, impl: str, args: tuple[Any, ...]) -> str:
    """The name of the implementation to run: `impl` where it is given, else the best one for these arguments."""
    wanted = impl or forced()
    if wanted in IMPLEMENTATIONS[op]:
        reason = why_not(op, wanted, args)
        if reason is not None:
            raise ValueError(f"{op}: impl={wanted!r} cannot run here: {reason}")
        return wanted
    for name in IMPLEMENTATIONS[op]:  # the last of them, the reference, computes everything
        if why_not(op, name, args) is None:
            break
    return name


def run(op: str, impl: str, args: tuple[Any, ...]) -> Any:
    """The op by whoever is chosen. `impl` "": the best one."""
    return getattr(module_of(op, choose(op, impl, args)), op)(*args)


def run_backward(op: str, impl: str, forward_args: tuple[Any, ...], backward_args: tuple[Any, ...]) -> Any:
    """Its backward pass, by whoever is chosen for the forward pass."""
    return getattr(module_of(op, choose(op, impl, forward_args)), f"{op}_backward")(*backward_args)


def check_impl(op: str, impl: str | None) -> str:
    """`impl` as the registered op takes it, "" for None."""
    if impl is None:
        return ""
    if impl not in IMPLEMENTATIONS[op]:
        raise ValueError(f"{op}: impl must be None or one of {', '.join(IMPLEMENTATIONS[op])}, got {impl!r}")
    return impl
