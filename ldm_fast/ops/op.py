"""How an op is registered with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ldm_fast.ops.torch_private import someone_may_watch, tangents_may_exist

NO_SECOND_DERIVATIVE = "{}: has no second derivative (for a gradient penalty, write it out in PyTorch's own ops)"


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating-point dtype, got {tensor.dtype}")


# Asked once: PyTorch 2.6 cannot compile the question.
_AUTOCAST_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast has x's device compute in; None where it is off."""
    kind = x.device.type
    if kind in _AUTOCAST_DEVICES and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def check_no_tangent(op: str, **tensors: Tensor | None) -> None:
    """There are no forward-mode derivatives, and PyTorch would take the result's tangent for zero."""
    if torch.compiler.is_compiling() or not tangents_may_exist():
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
        if someone_may_watch():
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
