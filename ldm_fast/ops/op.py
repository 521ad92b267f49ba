"""How an op is registered with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ldm_fast.ops.torch_private import someone_may_watch, tangents_may_exist, transform_may_differentiate

P = ParamSpec("P")
R = TypeVar("R")

NO_SECOND_DERIVATIVE = "{}: has no second derivative (for a gradient penalty, write it out in PyTorch's own ops)"
NO_FORWARD_MODE = "{}: has no forward-mode derivative{}; use reverse mode (torch.func.vjp, grad, jacrev)"
OPS: dict[str, Op[..., Any]] = {}

_library = torch.library.Library("ldm_fast", "DEF")
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", str | None: "str?"}


class Op(Generic[P, R]):
    """An op registered with PyTorch as `torch.ops.ldm_fast.<name>`, to be called by position.

    Its arguments and results are those of `compute`, by their annotations; the last argument is `impl`. One argument
    may be a record (a NamedTuple), which stands for its fields: a new field is a new argument of the registered op.

    Args:
        name: of the op.
        compute: computes it.
        fake: takes the same arguments and returns tensors like the results, without computing them.
        backward: the op of the gradients, or the reason why there are none; None if the results are integers. It gets
            the gradient of the first result, the arguments but `impl`, the results that `keep` names, and `impl`. It
            returns a gradient for each tensor among the arguments, in their order; the last ones may be left out, and
            that of an argument that is None may be anything.
        keep: which results backward needs.
        ordinary: given a function that makes a tensor of a shape, returns the arguments but `impl` of an ordinary call.
            `explain()` asks who would run it.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[P, R],
        fake: Callable[P, R],
        *,
        backward: Op[..., Any] | str | None = None,
        keep: tuple[int, ...] = (),
        ordinary: Callable[[Callable[..., Tensor]], tuple[Any, ...]] | None = None,
    ) -> None:
        self._name = name
        self._compute: Callable[..., R] = compute
        self._gradients, self._keep, self.ordinary = backward, keep, ordinary
        kinds = get_type_hints(compute)
        results = kinds.pop("return")
        self._record: tuple[int, int, type] | None = None  # its first field's position, the end, its class
        flat: dict[str, Any] = {}
        for argument, kind in kinds.items():
            if hasattr(kind, "_fields"):
                self._record = len(flat), len(flat) + len(kind._fields), kind
                flat |= get_type_hints(kind)
            else:
                flat[argument] = kind
        self._tensors = [i for i, kind in enumerate(flat.values()) if kind in (Tensor, Tensor | None)]

        schema = ", ".join(f"{_TYPES[kind]} {argument}" for argument, kind in flat.items())
        returns = ", ".join(_TYPES[kind] for kind in get_args(results) or (results,))
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        _library.define(f"{name}({schema}) -> ({returns})", tags=tags)
        for device in ("CPU", "CUDA"):
            _library.impl(name, self._taking_fields(compute), device)
        torch.library.register_fake(f"ldm_fast::{name}", self._taking_fields(fake), lib=_library)
        self._dispatched: Callable[..., R] = getattr(torch.ops.ldm_fast, name)
        self._recorded = self._transformed = self._dispatched
        if backward is not None:
            torch.library.register_autograd(
                f"ldm_fast::{name}", self._backward, setup_context=self._set_up, lib=_library
            )
            self._recorded, self._transformed = self._autograd_function(), self._function_for_transforms()
        OPS[name] = self

    def __call__(self, *args: P.args, **_: P.kwargs) -> R:
        """Call PyTorch's dispatcher or, if nobody watches it, what the dispatcher would call.

        The dispatcher takes several times as long as a small op.
        """
        flat: tuple[Any, ...] = args
        if self._record is not None:  # put its fields in its place
            first = self._record[0]
            flat = (*flat[:first], *flat[first], *flat[first + 1 :])
        if someone_may_watch():
            transformed = not torch.compiler.is_compiling() and transform_may_differentiate()
            return (self._transformed if transformed else self._dispatched)(*flat)
        recording, recorded = torch.is_grad_enabled(), False
        for position in self._tensors:
            tensor = flat[position]
            if tensor is None:
                continue
            kind = type(tensor)  # one of another class may want to see the op
            plain = (kind is Tensor or kind is Parameter) and (tensor.is_cpu or tensor.is_cuda)
            if not plain or tensor.is_neg():
                return self._dispatched(*flat)
            recorded = recorded or (recording and tensor.requires_grad)
        return self._recorded(*flat) if recorded else self._compute(*args)

    def _packed(self, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        """Make the record of its fields again."""
        if self._record is None:
            return flat
        first, end, record = self._record
        return (*flat[:first], record(*flat[first:end]), *flat[end:])

    def _taking_fields(self, function: Callable[..., R]) -> Callable[..., R]:
        return lambda *flat: function(*self._packed(flat))

    def _set_up(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what backward needs."""
        if isinstance(self._gradients, str):
            return
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*(inputs[i] for i in self._tensors), *(outputs[i] for i in self._keep))
        ctx.others = tuple(None if i in self._tensors else value for i, value in enumerate(inputs))

    def _backward(self, ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if not isinstance(self._gradients, Op):
            raise RuntimeError(self._gradients)
        inputs, saved = list(ctx.others), ctx.saved_tensors
        for position, tensor in zip(self._tensors, saved, strict=False):
            inputs[position] = tensor
        *args, impl = self._packed(tuple(inputs))
        gradients = self._gradients(grad, *args, *saved[len(self._tensors) :], impl)
        returned: list[Tensor | None] = [None] * len(inputs)
        for position, gradient in zip(self._tensors, gradients, strict=False):
            returned[position] = None if inputs[position] is None else gradient
        return tuple(returned)

    def _autograd_function(self) -> Callable[..., R]:
        op = self

        class Recorded(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *flat: Any) -> Any:
                output = op._compute(*op._packed(flat))
                op._set_up(ctx, flat, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return op._backward(ctx, *grads)

        return Recorded.apply

    def _function_for_transforms(self) -> Callable[..., R]:
        """Return the op for the transforms of `torch.func`: what the dispatcher has does not work under them.

        They need `forward` and `setup_context` apart, and that takes longer for a small op than `Recorded` does.
        """
        op = self

        class Transformed(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(*flat: Any) -> Any:
                return op._dispatched(*flat)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                op._set_up(ctx, inputs, output)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return op._backward(ctx, *grads)

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                raise NotImplementedError(NO_FORWARD_MODE.format(op._name, ""))

        apply: Callable[..., R] = Transformed.apply
        return apply


# ---- what the ops check ----

# Asked once: PyTorch 2.6 cannot compile the question.
_AUTOCAST_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype autocast has x's device compute in; None if it is off."""
    kind = x.device.type
    if kind in _AUTOCAST_DEVICES and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the statistics that an op returns beside its result."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError if an argument is not a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating-point dtype, got {tensor.dtype}")


def check_no_tangent(op: str, **tensors: Tensor | None) -> None:
    """Raise NotImplementedError for forward-mode differentiation: PyTorch would take the result's tangent for zero."""
    if torch.compiler.is_compiling() or not tangents_may_exist():
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(NO_FORWARD_MODE.format(op, f", but {name} has a tangent"))
