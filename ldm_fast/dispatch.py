"""Which implementation computes an op, and how an op is registered with PyTorch.

One table says who can compute what, best first. Every op is registered with `torch.library` (`Op`), so
`torch.compile(fullgraph=True)` sees one opaque node; the choice happens inside that node, when it runs.
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
from torch.nn import Parameter

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


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating-point dtype, got {tensor.dtype}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast has x's device compute in; None where it is off."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def check_no_tangent(op: str, **tensors: Tensor | None) -> None:
    """There are no forward-mode derivatives, and PyTorch would take the result's tangent for zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{op}: has no forward-mode derivative, but {name} has a tangent")


_library = torch.library.Library("ldm_fast", "DEF")


class Op:
    """An op registered with PyTorch as `torch.ops.ldm_fast.<name>`, to be called by position.

    Args:
        schema: name, arguments and results, as `torch.library` writes them.
        compute: what computes it.
        fake: what says which tensors come out, without computing them.
        backward, setup: its gradient and what keeps for it, as of `torch.library.register_autograd`.
    """

    def __init__(
        self,
        schema: str,
        compute: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        backward: Callable[..., Any] | None = None,
        setup: Callable[..., None] | None = None,
    ) -> None:
        name = schema.split("(", 1)[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        for device in ("CPU", "CUDA"):
            _library.impl(name, compute, device)
        torch.library.register_fake(f"ldm_fast::{name}", fake, lib=_library)
        self._dispatched = getattr(torch.ops.ldm_fast, name)
        arguments = self._dispatched.default._schema.arguments
        self._tensors = [i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type)]
        self._recorded = self._dispatched
        if backward is not None:
            torch.library.register_autograd(f"ldm_fast::{name}", backward, setup_context=setup, lib=_library)
            self._recorded = _autograd_function(compute, backward, setup)
        self._compute = compute

    def __call__(self, *args: Any) -> Any:
        return self._shortest_way(args)(*args)

    def _shortest_way(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """PyTorch's dispatcher, or, where nobody watches it, what it would call in the end: the dispatcher takes
        several times what a small op does."""
        if _someone_watches():
            return self._dispatched
        recording, recorded = torch.is_grad_enabled(), False
        for position in self._tensors:
            arg = args[position]
            if arg is None:
                continue
            kind = type(arg)  # one of another class may want to see the op
            if (kind is not Tensor and kind is not Parameter) or not (arg.is_cpu or arg.is_cuda) or arg.is_neg():
                return self._dispatched
            recorded = recorded or (recording and arg.requires_grad)
        return self._recorded if recorded else self._compute


def _someone_watches() -> bool:
    """Whether a compiler, tracer, mode, transform or profiler is to see every op."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    )


def _autograd_function(
    compute: Callable[..., Any], backward: Callable[..., Any], setup: Callable[..., None] | None
) -> Callable[..., Any]:
    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = compute(*args)
            if setup is not None:
                setup(ctx, args, output)
            return output

    Recorded.backward = staticmethod(backward)
    return Recorded.apply


def no_gradient(message: str) -> Callable[..., None]:
    """A backward pass that says so: without one, PyTorch would take the result for a constant."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(message)

    return backward
