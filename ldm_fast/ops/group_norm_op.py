"""group_norm_silu, whole and in two halves: what it takes, how it is registered, its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_fast.ops.arguments import Norm
from ldm_fast.ops.dispatch import check_impl, run, run_backward
from ldm_fast.ops.op import NO_SECOND_DERIVATIVE, Op, check_floating, check_no_tangent, statistics_dtype
from ldm_fast.ops.torch_private import tangents_may_exist


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
    """Compute silu(group_norm(x) · (1 + scale) + shift) in float32 (Wu & He, arXiv:1803.08494).

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
    check_impl("group_norm_silu", impl)
    norm = Norm(x, num_groups, weight, bias, float(eps), activation, scale, shift)
    return _group_norm_silu_op(_checked("group_norm_silu", norm), impl)[0]


def _checked(op: str, norm: Norm) -> Norm:
    """Return the arguments with x in a layout that kernels take. TypeError or ValueError if they do not fit."""
    x, num_groups, weight, bias, eps, activation, scale, shift = norm
    shape = _check_x(op, x, num_groups)
    if activation is not None and activation != "silu":
        raise ValueError(f'{op}: activation must be "silu" or None, got {activation!r}')
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    channels, modulation, device = (shape[1],), (shape[0], shape[1]), x.device
    _check_vector(op, "weight", weight, channels, device)
    _check_vector(op, "bias", bias, channels, device)
    _check_vector(op, "scale", scale, modulation, device)
    _check_vector(op, "shift", shift, modulation, device)
    if tangents_may_exist():
        check_no_tangent(op, x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    return norm if _is_dense(x) else Norm(x.contiguous(), *norm[1:])


def _check_x(op: str, x: Tensor, num_groups: int) -> torch.Size:
    """Return the shape of x."""
    check_floating(op, "x", x)
    shape = x.shape
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"{op}: x must be (B, C, *spatial) with 0 to 3 spatial dims, got {tuple(shape)}")
    if not isinstance(num_groups, int):
        raise TypeError(f"{op}: num_groups must be an integer, got {num_groups!r}")
    if num_groups < 1 or shape[1] % num_groups != 0:
        raise ValueError(f"{op}: num_groups must divide the {shape[1]} channels of x, got {num_groups}")
    return shape


def _check_vector(op: str, name: str, vector: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if vector is None:
        return
    check_floating(op, name, vector)
    if vector.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(vector.shape)}")
    if vector.device != device:
        raise ValueError(f"{op}: {name} must be on the device of x ({device}), got {vector.device}")


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    try:
        if x.ndim == 4:
            return x.is_contiguous(memory_format=torch.channels_last)
        return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    except RuntimeError:  # vmap cannot tell
        return False


def _forward(norm: Norm, impl: str | None) -> tuple[Tensor, Tensor]:
    if norm.x.numel() == 0:
        return _forward_fake(norm, impl)
    y, statistics = run("group_norm_silu", impl, (norm,))
    return y, statistics


def _forward_fake(norm: Norm, impl: str | None) -> tuple[Tensor, Tensor]:
    x, batch = norm.x, norm.x.shape[0]
    return torch.empty_like(x), x.new_empty((2, batch, norm.num_groups), dtype=statistics_dtype(x))


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of x, weight, bias, scale and shift


def _backward(grad: Tensor, norm: Norm, statistics: Tensor, impl: str | None) -> _Gradients:
    x = norm.x
    if x.numel() == 0:
        dx, dweight, dbias, dscale, dshift = _backward_fake(grad, norm, statistics, impl)
        return dx, dweight.zero_(), dbias.zero_(), dscale.zero_(), dshift.zero_()
    if grad.stride() != x.stride():
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    gradients = run_backward("group_norm_silu", impl, (norm,), (grad, norm, statistics))
    dx, dweight, dbias, dscale, dshift = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dx, dweight, dbias, dscale, dshift


def _backward_fake(grad: Tensor, norm: Norm, statistics: Tensor, impl: str | None) -> _Gradients:
    x = norm.x
    weight, bias, scale, shift = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in norm.vectors)
    return torch.empty_like(x), weight, bias, scale, shift


_backward_op = Op(
    "group_norm_silu_backward", _backward, _backward_fake, backward=NO_SECOND_DERIVATIVE.format("group_norm_silu")
)
_group_norm_silu_op = Op(
    "group_norm_silu",
    _forward,
    _forward_fake,
    backward=_backward_op,
    keep=(1,),
    ordinary=lambda zeros: (Norm(zeros(1, 64, 8, 8), 32, zeros(64), zeros(64)),),
)


def group_norm_stats(x: Tensor, num_groups: int, *, impl: str | None = None) -> Tensor:
    """Measure x as group_norm_silu does: the first half of it, for an x that is only a part of an image.

    Args:
        x: (B, C, *spatial) as for `group_norm_silu`.
        num_groups: divides C.
        impl: None for the best implementation that supports the inputs, or "triton", "cpu", "reference".

    Returns:
        (B, num_groups, 3) in float64: count, mean and sum of squared deviations of each group.
        `merge_group_norm_stats` makes those of an image from those of its parts. Not differentiable.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: shapes do not fit, or the implementation named cannot run these inputs.
    """
    check_impl("group_norm_stats", impl)
    _check_x("group_norm_stats", x, num_groups)
    check_no_tangent("group_norm_stats", x=x)
    return _group_norm_stats_op(x if _is_dense(x) else x.contiguous(), num_groups, impl)


def merge_group_norm_stats(parts: Sequence[Tensor]) -> Tensor:
    """Merge the `group_norm_stats` of the parts of an image into those of the image, in the order given.

    Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".

    Args:
        parts: at least one, each (B, num_groups, 3).

    Returns:
        (B, num_groups, 3) in float64.

    Raises:
        ValueError: there are no parts.
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
    """Normalise x, a part of an image, by the statistics of the whole image: the second half of `group_norm_silu`.

    Args:
        x: (B, C, *spatial) as for `group_norm_silu`.
        stats: (B, num_groups, 3) in float64, from `group_norm_stats` and `merge_group_norm_stats`.
        num_groups, weight, bias, eps, activation, scale, shift: as for `group_norm_silu`.
        impl: None for the best implementation that supports the inputs, or "triton", "cpu", "reference".

    Returns:
        a tensor with x's shape, dtype and memory layout. Not differentiable.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not fit, or the implementation named cannot run these inputs.
    """
    check_impl("group_norm_apply", impl)
    norm = _checked("group_norm_apply", Norm(x, num_groups, weight, bias, float(eps), activation, scale, shift))
    check_floating("group_norm_apply", "stats", stats)
    shape = (x.shape[0], num_groups, 3)
    if stats.shape != shape or stats.dtype != torch.float64:
        raise ValueError(
            f"group_norm_apply: stats must be {shape} in float64, got {tuple(stats.shape)} in {stats.dtype}"
        )
    if stats.device != x.device:
        raise ValueError(f"group_norm_apply: stats must be on the device of x ({x.device}), got {stats.device}")
    return _group_norm_apply_op(norm, stats.contiguous(), impl)


def _stats(x: Tensor, num_groups: int, impl: str | None) -> Tensor:
    if x.numel() == 0:
        return _stats_fake(x, num_groups, impl).zero_()
    stats: Tensor = run("group_norm_stats", impl, (x, num_groups))
    return stats


def _stats_fake(x: Tensor, num_groups: int, impl: str | None) -> Tensor:
    return x.new_empty((x.shape[0], num_groups, 3), dtype=torch.float64)


def _apply(norm: Norm, stats: Tensor, impl: str | None) -> Tensor:
    if norm.x.numel() == 0:
        return _apply_fake(norm, stats, impl)
    y: Tensor = run("group_norm_apply", impl, (norm, stats))
    return y


def _apply_fake(norm: Norm, stats: Tensor, impl: str | None) -> Tensor:
    return torch.empty_like(norm.x)


_group_norm_stats_op = Op(
    "group_norm_stats",
    _stats,
    _stats_fake,
    backward="group_norm_stats: has no gradient; group_norm_silu, of the whole image, has one",
    ordinary=lambda zeros: (zeros(1, 64, 8, 8), 32),
)
_group_norm_apply_op = Op(
    "group_norm_apply",
    _apply,
    _apply_fake,
    backward="group_norm_apply: has no gradient; group_norm_silu, of the whole image, has one",
    ordinary=lambda zeros: (Norm(zeros(1, 64, 8, 8), 32, zeros(64), zeros(64)), zeros(1, 32, 3).double()),
)
