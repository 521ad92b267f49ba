"""Who computes an op.

One table says who can compute what, best first. The choice falls when the registered op runs: `torch.compile` sees one
node with a fixed schema, and `use_impl` works on compiled code, too.

To add an op is to add one row in each of these places, and nothing else:

- `ops/<op>_op.py`: the public function with its checks, the registered `Op`, and what ordinary arguments are;
- `ops/__init__.py`: its name, and `IMPLEMENTATIONS` below: who can compute it;
- `reference.py`: what is correct, `<op>` and, if it has a gradient, `<op>_backward`;
- `kernels/<op>.py`, or `csrc/cpu/<op>.cpp` (with its struct in `kernels.h`, and a line in `from_python.h`,
  `dispatch.cpp` and `bindings.cpp`) and `cpu.py`, or `csrc/cuda/<op>.cu` and `cuda.py`: the same functions, and
  `<op>_unsupported`, which returns why these arguments cannot run, or None;
- `cases.py`: what it is tried on, and `benchmarks/<op>.py`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

_CPU, _CUDA, _TORCH = "ldm_fast.ops.cpu", "ldm_fast.ops.cuda", "ldm_fast.ops.pytorch"
_REFERENCE = "ldm_fast.ops.reference"
_TRITON_NORM = "ldm_fast.kernels.group_norm_silu"

# Who can compute each op, best first: a name and the module. impl=None takes the first that supports the inputs. One
# that was measured to be the fastest for inputs like these, on a machine like this, comes before all others.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "attention": {"triton": "ldm_fast.kernels.attention", "cpu": _CPU, "torch": _TORCH, "reference": _REFERENCE},
    "group_norm_silu": {"triton": _TRITON_NORM, "cpu": _CPU, "reference": _REFERENCE},
    # The two halves of group_norm_silu, for the parts of an image that is never in memory as a whole.
    "group_norm_stats": {"triton": _TRITON_NORM, "cpu": _CPU, "reference": _REFERENCE},
    "group_norm_apply": {"triton": _TRITON_NORM, "cpu": _CPU, "reference": _REFERENCE},
    "nearest_codebook": {"cuda": _CUDA, "cpu": _CPU, "reference": _REFERENCE},
    "nearest_codebook_stats": {"cuda": _CUDA, "cpu": _CPU, "reference": _REFERENCE},
}

IMPLEMENTATION_NAMES = tuple(dict.fromkeys(name for row in IMPLEMENTATIONS.values() for name in row))

_forced: list[tuple[str | None, object]] = []  # one entry for each open `use_impl`, the innermost last


@contextlib.contextmanager
def use_impl(name: str | None) -> Iterator[None]:
    """Make every op with `impl=None` run `name` inside the `with` block: "triton", "cuda", "cpu", "torch", "reference".

    An op that has no implementation of that name (nearest_codebook has no "triton") chooses as usual; one that has it
    but cannot run it here raises, as an explicit `impl=` would. A backward pass obeys the setting at the moment it
    runs. There is one setting per process, not one per thread: the block entered last holds.

    Raises:
        ValueError: there is no implementation of that name.
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
    """Return what `use_impl` asks for at the moment."""
    return _forced[-1][0] if _forced else None


class Implementation(NamedTuple):
    """The functions of one implementation of an op: `<op>`, `<op>_backward`, … of its module."""

    compute: Callable[..., Any]
    backward: Callable[..., Any]
    unsupported: Callable[..., str | None]  # why it cannot compute these arguments; None if it can
    preferred: Callable[..., bool] | None = None  # whether it was measured to be the fastest for these arguments


@functools.cache
def implementation(op: str, impl: str) -> Implementation:
    """Return what the table names. If it can run nothing in this process, `unsupported` always says why."""
    module = _load(IMPLEMENTATIONS[op][impl])
    if isinstance(module, str):
        return _missing(module)
    if not hasattr(module, op):
        return _missing(f"{module.__name__} does not compute {op}")
    backward = getattr(module, f"{op}_backward", None) or _missing(f"{op} has no gradient").compute
    unsupported = getattr(module, f"{op}_unsupported", lambda *_: None)
    return Implementation(getattr(module, op), backward, unsupported, getattr(module, f"{op}_preferred", None))


def _load(path: str) -> ModuleType | str:
    """Import a module, or return why it cannot run here.

    A package is asked before its modules are imported: the Triton kernels are not imported if none could run.
    """
    try:
        for name in (path.rpartition(".")[0], path):
            module = importlib.import_module(name)
            reason: str | None = module.unavailable() if hasattr(module, "unavailable") else None
            if reason is not None:
                return reason
    except ImportError as error:
        return f"cannot be imported: {error}"
    return module


def _missing(reason: str) -> Implementation:
    def compute(*_: object) -> None:
        raise ValueError(reason)

    return Implementation(compute, compute, lambda *_: reason)


@functools.cache
def _preferences(op: str) -> tuple[tuple[str, Callable[..., bool]], ...]:
    """Return the implementations that may be preferred, and who says whether they are."""
    found = ((name, implementation(op, name).preferred) for name in IMPLEMENTATIONS[op])
    return tuple((name, preferred) for name, preferred in found if preferred is not None)


def why_not(op: str, impl: str, args: tuple[Any, ...]) -> str | None:
    """Return why `impl` cannot compute `op` of these arguments here; None if it can."""
    return implementation(op, impl).unsupported(*args)


def consider(op: str, impl: str | None, args: tuple[Any, ...]) -> tuple[str | None, list[tuple[str, str]]]:
    """Return who runs `op` on these arguments, and who was considered before, each with the reason it cannot.

    That is `impl` if it is given, else what `use_impl` asks for, else one that is preferred for these arguments, else
    the first in the table that can. The name is None if nobody can.
    """
    wanted = impl or (_forced[-1][0] if _forced else None)
    passed_over: list[tuple[str, str]] = []
    if wanted not in IMPLEMENTATIONS[op]:
        for name, preferred in _preferences(op):
            if preferred(*args) and why_not(op, name, args) is None:
                return name, passed_over
    for name in (wanted,) if wanted in IMPLEMENTATIONS[op] else IMPLEMENTATIONS[op]:
        reason = why_not(op, name, args)
        if reason is None:
            return name, passed_over
        passed_over.append((name, reason))
    return None, passed_over


def choose(op: str, impl: str | None, args: tuple[Any, ...]) -> str:
    """Return the name of the implementation that runs `op` on these arguments. ValueError if none can."""
    name, passed_over = consider(op, impl, args)
    if name is None:
        reasons = (f"impl={name!r} cannot run here: {reason}" for name, reason in passed_over)
        raise ValueError(f"{op}: {'; '.join(reasons)}")
    return name


def run(op: str, impl: str | None, args: tuple[Any, ...]) -> Any:
    """Compute the op, by `impl` or, if it is None, by whoever `consider` finds."""
    return implementation(op, choose(op, impl, args)).compute(*args)


def run_backward(op: str, impl: str | None, forward_args: tuple[Any, ...], backward_args: tuple[Any, ...]) -> Any:
    """Compute the gradients of the op, by whoever is chosen for its forward pass."""
    return implementation(op, choose(op, impl, forward_args)).backward(*backward_args)


def check_impl(op: str, impl: str | None) -> None:
    """Raise ValueError if the op has no such implementation."""
    if impl is not None and impl not in IMPLEMENTATIONS[op]:
        raise ValueError(f"{op}: impl must be None or one of {', '.join(IMPLEMENTATIONS[op])}, got {impl!r}")
