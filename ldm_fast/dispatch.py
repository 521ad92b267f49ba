"""Which implementation computes an op, and how an op is registered with PyTorch.

One table says who can compute what, best first. Every op is registered with `torch.library` (define, impl, fake,
autograd), so `torch.compile(fullgraph=True)` sees one opaque node; the choice happens inside that node, when it runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Who can compute each op, best first. impl=None takes the first that supports the inputs.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "attention": {
        "triton": "ldm_fast.kernels.attention",
        "cpu": "ldm_fast.cpu",
        "reference": "ldm_fast.reference",
    },
    "group_norm_silu": {
        "triton": "ldm_fast.kernels.group_norm_silu",
        "cpu": "ldm_fast.cpu",
        "reference": "ldm_fast.reference",
    },
    # group_norm_silu in two: of the parts of an image that is never in memory as a whole
    "group_norm_stats": {
        "triton": "ldm_fast.kernels.group_norm_silu",
        "cpu": "ldm_fast.cpu",
        "reference": "ldm_fast.reference",
    },
    "group_norm_apply": {
        "triton": "ldm_fast.kernels.group_norm_silu",
        "cpu": "ldm_fast.cpu",
        "reference": "ldm_fast.reference",
    },
    "nearest_codebook": {
        "cuda": "ldm_fast.cuda",
        "cpu": "ldm_fast.cpu",
        "reference": "ldm_fast.reference",
    },
    "nearest_codebook_stats": {
        "cuda": "ldm_fast.cuda",
        "cpu": "ldm_fast.cpu",
        "reference": "ldm_fast.reference",
    },
}

IMPLEMENTATION_NAMES = ("triton", "cuda", "cpu", "reference")

_forced: str | None = None


@contextlib.contextmanager
def use_impl(name: str | None) -> Iterator[None]:
    """Inside the `with` block every op with `impl=None` runs `name`: "triton", "cuda", "cpu" or "reference".

    An op that has no implementation of that name (nearest_codebook has no "triton") chooses as usual; one that has it
    but cannot run it here raises, as an explicit `impl=` would. A backward pass obeys the setting of the moment it runs
    in. The setting is one per process, not one per thread.
    """
    global _forced
    if name is not None and name not in IMPLEMENTATION_NAMES:
        raise ValueError(f"use_impl: name must be one of {', '.join(IMPLEMENTATION_NAMES)}, got {name!r}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


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
    wanted = impl or (_forced if _forced in IMPLEMENTATIONS[op] else None)
    if wanted is None:
        return next(name for name in IMPLEMENTATIONS[op] if why_not(op, name, args) is None)
    reason = why_not(op, wanted, args)
    if reason is not None:
        raise ValueError(f"{op}: impl={wanted!r} cannot run here: {reason}")
    return wanted


def run(op: str, impl: str, args: tuple[Any, ...]) -> Any:
    """The op by whoever is chosen. `impl` "": the best one."""
    return getattr(module_of(op, choose(op, impl, args)), op)(*args)


def run_backward(op: str, impl: str, forward_args: tuple[Any, ...], backward_args: tuple[Any, ...]) -> Any:
    """Its backward pass, by whoever is chosen for the forward pass."""
    return getattr(module_of(op, choose(op, impl, forward_args)), f"{op}_backward")(*backward_args)


def nothing_to_dispatch(*tensors: Tensor | None) -> bool:
    """Whether all that PyTorch's dispatcher would do with these is to call the kernel: CPU tensors, no gradient to be
    recorded, nobody watching. It may then be left out, which saves several times what a small op takes.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd._profiler_enabled():
        return False
    recorded = torch.is_grad_enabled()
    for tensor in tensors:  # a loop: several times as fast as all() over a generator
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.is_cpu or tensor.is_neg():
            return False
        if recorded and tensor.requires_grad:
            return False
    return True


def check_impl(op: str, impl: str | None) -> str:
    """`impl` as the registered op takes it, "" for None."""
    if impl is not None and impl not in IMPLEMENTATIONS[op]:
        raise ValueError(f"{op}: impl must be None or one of {', '.join(IMPLEMENTATIONS[op])}, got {impl!r}")
    return impl or ""


def check_floating(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must have a floating-point dtype, got {tensor.dtype}")


def check_no_tangent(op: str, **tensors: Tensor | None) -> None:
    """There are no forward-mode derivatives, and PyTorch would take the result's tangent for zero."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{op}: has no forward-mode derivative, but {name} has a tangent")


_library = torch.library.Library("ldm_fast", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op: `run` computes it, `fake` says what comes out."""
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)
    torch.library.register_fake(f"ldm_fast::{name}", fake, lib=_library)


def register_autograd(op: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Registers the gradient of an op, which has none of its own."""
    torch.library.register_autograd(f"ldm_fast::{op}", backward, setup_context=setup, lib=_library)

    def second(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{op}: has no second derivative (for a gradient penalty, write it out in PyTorch's own ops)"
        )

    # without this, PyTorch would take the backward pass for a constant: a warning and zeros
    torch.library.register_autograd(f"ldm_fast::{op}_backward", second, lib=_library)


def refuse_gradient(op: str, instead: str) -> None:
    """Registers a backward pass that says so: without one, PyTorch would take the result for a constant."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{op}: has no gradient; {instead}")

    torch.library.register_autograd(f"ldm_fast::{op}", backward, lib=_library)
