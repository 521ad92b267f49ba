"""group_norm_silu, whole and in two halves: arguments, schema, fakes, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm_fast.ops.arguments import Norm, schema
from ldm_fast.ops.dispatch import check_impl, run, run_backward
from ldm_fast.ops.op import (
    NO_SECOND_DERIVATIVE,
    Op,
    check_floating,
    check_no_tangent,
    no_gradient,
    statistics_dtype,
)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    activation: str | None = "silu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """silu(group_norm(x) · (1 + scale) + shift), statistics and arithmetic in float32 (Wu & He, arXiv:1803.08494).

    Args:
        x: (B, C, *spatial) with 0 to 3 spatial dimensions, contiguous or channels_last (others are copied). float32,
            float16, bfloat16, or float64 (reference only).
        num_groups: divides C.
        weight, bias: (C,) or None; x's dtype or float32.
        eps: added to the variance; above 0.
        activation: "silu" or None.
        scale, shift: (B, C) or None, the scale-shift modulation by a time embedding (arXiv:2105.05233, "AdaGN").
        impl: None for the best implementation that supports the inputs, or "triton", "cpu", "reference".

    Returns:
        a tensor with x's shape, dtype and memory layout.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not fit, or the implementation named cannot run these inputs.
    """
    impl = check_impl("group_norm_silu", impl)
    _check_group_norm("group_norm_silu", x, num_groups)
    _check_affine("group_norm_silu", x, weight, bias, eps, activation, scale, shift)
    x = x if _is_dense(x) else x.contiguous()
    y, _ = _group_norm_silu_op(x, num_groups, weight, bias, float(eps), activation or "", scale, shift, impl)
    return y


def _check_group_norm(op: str, x: Tensor, num_groups: int) -> None:
    check_floating(op, "x", x)
    shape = x.shape
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"{op}: x must be (B, C, *spatial) with 0 to 3 spatial dims, got {tuple(shape)}")
    if not isinstance(num_groups, int):
        raise TypeError(f"{op}: num_groups must be an integer, got {num_groups!r}")
    if num_groups < 1 or shape[1] % num_groups != 0:
        raise ValueError(f"{op}: num_groups must divide the {shape[1]} channels of x, got {num_groups}")


def _check_affine(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    """What follows the normalisation of x (B, C, *spatial)."""
    if activation is not None and activation != "silu":
        raise ValueError(f'{op}: activation must be "silu" or None, got {activation!r}')
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    batch, channels, *_ = x.shape
    _check_vector(op, "weight", weight, (channels,), x)
    _check_vector(op, "bias", bias, (channels,), x)
    _check_vector(op, "scale", scale, (batch, channels), x)
    _check_vector(op, "shift", shift, (batch, channels), x)
    check_no_tangent(op, x=x, weight=weight, bias=bias, scale=scale, shift=shift)


def _check_vector(op: str, name: str, vector: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if vector is None:
        return
    check_floating(op, name, vector)
    if vector.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(vector.shape)}")
    if vector.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x ({x.device}), got {vector.device}")


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    if not args[0].numel():
        return _forward_fake(*args)
    return run("group_norm_silu", args[-1], (Norm._make(args[:-1]),))


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, num_groups = args[:2]
    return torch.empty_like(x), x.new_empty((2, x.shape[0], num_groups), dtype=statistics_dtype(x))


def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    norm, statistics, impl = Norm._make(args[:-2]), args[-2], args[-1]
    x = norm.x
    if x.numel() == 0:
        return tuple(tensor.zero_() for tensor in _backward_fake(grad, *args))
    if grad.stride() != x.stride():
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    gradients = run_backward("group_norm_silu", impl, (norm,), (grad, norm, statistics))
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    norm = Norm._make(args[:-2])
    x = norm.x
    return torch.empty_like(x), *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in norm.vectors)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, num_groups, weight, bias, eps, activation, scale, shift, impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, scale, shift, output[1])
    ctx.constants = num_groups, eps, activation, impl


def _autograd(ctx: Any, grad: Tensor, _grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, shift, statistics = ctx.saved_tensors
    num_groups, eps, activation, impl = ctx.constants
    norm = (x, num_groups, weight, bias, eps, activation, scale, shift)
    gradients = _group_norm_silu_backward_op(grad, *norm, statistics, impl)
    dx, dweight, dbias, dscale, dshift = (
        None if tensor is None else gradient
        for tensor, gradient in zip((x, weight, bias, scale, shift), gradients, strict=True)
    )
    return dx, None, dweight, dbias, None, None, dscale, dshift, None


_group_norm_silu_op = Op(
    f"group_norm_silu({schema(Norm)}, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_autograd,
    setup=_setup,
)
_group_norm_silu_backward_op = Op(
    f"group_norm_silu_backward(Tensor grad, {schema(Norm)}, Tensor statistics, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    backward=no_gradient(NO_SECOND_DERIVATIVE.format("group_norm_silu")),
)


# ---- group_norm_silu in two ------------------------------------------------------------------------------------------


def group_norm_stats(x: Tensor, num_groups: int, *, impl: str | None = None) -> Tensor:
    """What group_norm_silu measures of x: the first half of it, for x that is only a part of an image.

    Args:
        x: (B, C, *spatial) as for `group_norm_silu`.
        num_groups: divides C.
        impl: None for the best implementation that supports the inputs, or "triton", "cpu", "reference".

    Returns:
        (B, num_groups, 3) in float64: count, mean and sum of squared deviations of each group. Those of the parts of an
        image, brought together by `merge_group_norm_stats`, are those of the image. Not differentiable.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: shapes do not fit, or the implementation named cannot run these inputs.
    """
    impl = check_impl("group_norm_stats", impl)
    _check_group_norm("group_norm_stats", x, num_groups)
    check_no_tangent("group_norm_stats", x=x)
    return _group_norm_stats_op(x if _is_dense(x) else x.contiguous(), num_groups, impl)


def merge_group_norm_stats(parts: Sequence[Tensor]) -> Tensor:
    """`group_norm_stats` of all parts together, from those of each: pair by pair, in the order given.

    By Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".

    Args:
        parts: at least one, each (B, num_groups, 3).

    Returns:
        (B, num_groups, 3) in float64.

    Raises:
        ValueError: there is none.
    """
    if not parts:
        raise ValueError("merge_group_norm_stats: parts must be at least one tensor (B, num_groups, 3), got none")
    count, mean, squares = parts[0].unbind(-1)
    for part in parts[1:]:
        part_count, part_mean, part_squares = part.unbind(-1)
        total = count + part_count
        share, delta = part_count / total.clamp(min=1), part_mean - mean  # two empty parts are an empty one
        squares = squares + part_squares + delta.square() * count * share
        count, mean = total, mean + delta * share
    return torch.stack([count, mean, squares], dim=-1)


def group_norm_apply(
    x: Tensor,
    stats: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    activation: str | None = "silu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """The second half of `group_norm_silu`: normalises x, a part of an image, by the statistics of the whole image.

    Args:
        x: (B, C, *spatial) as for `group_norm_silu`.
        stats: (B, num_groups, 3) in float64, of `group_norm_stats` and `merge_group_norm_stats`.
        num_groups, weight, bias, eps, activation, scale, shift: as for `group_norm_silu`.
        impl: None for the best implementation that supports the inputs, or "triton", "cpu", "reference".

    Returns:
        a tensor with x's shape, dtype and memory layout. Not differentiable.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not fit, or the implementation named cannot run these inputs.
    """
    impl = check_impl("group_norm_apply", impl)
    _check_group_norm("group_norm_apply", x, num_groups)
    check_floating("group_norm_apply", "stats", stats)
    shape = (x.shape[0], num_groups, 3)
    if tuple(stats.shape) != shape or stats.dtype != torch.float64:
        raise ValueError(
            f"group_norm_apply: stats must be {shape} in float64, got {tuple(stats.shape)} in {stats.dtype}"
        )
    if stats.device != x.device:
        raise ValueError(f"group_norm_apply: stats must be on the device of x ({x.device}), got {stats.device}")
    _check_affine("group_norm_apply", x, weight, bias, eps, activation, scale, shift)
    x, stats = x if _is_dense(x) else x.contiguous(), stats.contiguous()
    return _group_norm_apply_op(x, num_groups, weight, bias, float(eps), activation or "", scale, shift, stats, impl)


def _stats(x: Tensor, num_groups: int, impl: str) -> Tensor:
    return run("group_norm_stats", impl, (x, num_groups)) if x.numel() else _stats_fake(x, num_groups, impl).zero_()


def _stats_fake(x: Tensor, num_groups: int, impl: str) -> Tensor:
    return x.new_empty((x.shape[0], num_groups, 3), dtype=torch.float64)


def _apply(*args: Any) -> Tensor:
    norm, stats, impl = Norm._make(args[:-2]), args[-2], args[-1]
    return run("group_norm_apply", impl, (norm, stats)) if norm.x.numel() else torch.empty_like(norm.x)


def _apply_fake(*args: Any) -> Tensor:
    return torch.empty_like(args[0])


_group_norm_stats_op = Op(
    "group_norm_stats(Tensor x, int num_groups, str impl) -> Tensor",
    _stats,
    _stats_fake,
    backward=no_gradient("group_norm_stats: has no gradient; group_norm_silu, of the whole image, has one"),
)
_group_norm_apply_op = Op(
    f"group_norm_apply({schema(Norm)}, Tensor stats, str impl) -> Tensor",
    _apply,
    _apply_fake,
    backward=no_gradient("group_norm_apply: has no gradient; group_norm_silu, of the whole image, has one"),
)
