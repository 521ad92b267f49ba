"""The public ops: check the arguments, then leave the rest to whoever `ldm_fast.dispatch` chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ldm_fast.dispatch import (
    Op,
    autocast_dtype,
    check_floating,
    check_impl,
    check_no_tangent,
    no_gradient,
    run,
    run_backward,
)

NO_SECOND_DERIVATIVE = "{}: has no second derivative (for a gradient penalty, write it out in PyTorch's own ops)"

# ---- attention -------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale + mask) v with the softmax in float32 (Vaswani et al., arXiv:1706.03762, eq. 1).

    Args:
        q: (B, H, N, D), any strides as long as the last one is 1 (others are copied). float32, float16, bfloat16, or
            float64 (reference only).
        k, v: (B, H, M, D), dtype and device of q.
        mask: broadcastable to (B, H, N, M): boolean, True = may attend, or floating point, added to the scores. It gets
            no gradient. A row with every key masked gives zeros.
        scale: factor of the scores; default D ** -0.5.
        impl: None for the best implementation that supports the inputs, or "triton", "cpu", "reference".

    Returns:
        (B, H, N, D) in q's dtype; its memory is laid out (B, N, H, D), so merging the heads is free. Under autocast,
        which lowers q, k and v as for PyTorch's scaled_dot_product_attention, in its dtype.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, or the implementation named cannot run these inputs.
    """
    impl = check_impl("attention", impl)
    if not _plain(q, k, v):
        q, k, v = _check_kinds(q, k, v)
    shape, keys, values = q.shape, k.shape, v.shape
    if len(shape) != 4 or len(keys) != 4 or len(values) != 4:
        raise ValueError(f"attention: q, k, v must be (B, H, N, D); got {tuple(shape)}, {tuple(keys)}, {tuple(values)}")
    if keys != values or shape[0] != keys[0] or shape[1] != keys[1] or shape[3] != keys[3]:
        raise ValueError(
            "attention: k and v must be (B, H, M, D) with the B, H and D of q; "
            f"got q {tuple(shape)}, k {tuple(keys)}, v {tuple(values)}"
        )
    if shape[3] == 0:
        raise ValueError(f"attention: the head width D must be at least 1, got q {tuple(shape)}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"attention: scale must be a number, got {type(scale).__name__}")
    if mask is not None:
        mask = _check_mask(mask, q, k)
    if not (q.stride(3) == k.stride(3) == v.stride(3) == 1):
        q, k, v = (t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in (q, k, v))
    scale = shape[3] ** -0.5 if scale is None else float(scale)
    return _attention_op(q, k, v, mask, scale, impl)[0]


def _plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there is nothing for `_check_kinds` to do, whose many steps take as long as a small attention does."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and q.dtype is k.dtype is v.dtype
        and q.dtype.is_floating_point
        and (q.is_cpu and k.is_cpu and v.is_cpu)
        and not torch._C._is_any_autocast_enabled()
        and forward_ad._current_level < 0
    )


def _check_kinds(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, in the dtype of autocast where that is on, as floating-point tensors of one dtype on one device."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating("attention", name, tensor)
    lower = autocast_dtype(q)
    if lower is not None:
        q, k, v = (t if t.dtype == torch.float64 else t.to(lower) for t in (q, k, v))
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"attention: q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"attention: q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    check_no_tangent("attention", q=q, k=k, v=v)
    return q, k, v


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask expanded to (B, H, N, M), without a copy."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention: mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention: mask must be boolean or floating point, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError("attention: mask gets no gradient here; pass mask.detach()")
    if mask.device != q.device:
        raise ValueError(f"attention: mask must be on the device of q ({q.device}), got {mask.device}")
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = mask.ndim <= 4 and all(m in (1, s) for m, s in zip(mask.shape[::-1], shape[::-1], strict=False))
    if not fits:
        raise ValueError(f"attention: mask must broadcast to (B, H, N, M) = {shape}, got {tuple(mask.shape)}")
    return mask.expand(shape)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, impl: str):
    if 0 in q.shape or 0 in k.shape:
        out, lse = _attention_fake(q, k, v, mask, scale, impl)
        return out.zero_(), lse.fill_(float("-inf"))
    return run("attention", impl, (q, k, v, mask, scale))


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, impl: str):
    batch, heads, rows, width = q.shape
    out = q.new_empty((batch, rows, heads, width)).transpose(1, 2)
    return out, q.new_empty((batch, heads, rows), dtype=_statistics_dtype(q))


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    impl: str,
):
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    # torch.compile lays out what forward saved as it likes
    grad, q, k, v, out = (t if t.stride(-1) == 1 else t.contiguous() for t in (grad, q, k, v, out))
    gradients = run_backward("attention", impl, (q, k, v, mask, scale), (grad, q, k, v, mask, scale, out, lse))
    return tuple(gradient.contiguous() for gradient in gradients)


def _attention_backward_fake(grad, q, k, v, mask, scale, out, lse, impl):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.scale, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, mask, *output)


def _attention_autograd(ctx: Any, grad: Tensor, _grad_lse: Tensor):
    q, k, v, mask, out, lse = ctx.saved_tensors
    gradients = _attention_backward_op(grad, q, k, v, mask, ctx.scale, out, lse, ctx.impl)
    return (*gradients, None, None, None)


_attention_op = Op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, str impl) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
    backward=_attention_autograd,
    setup=_attention_setup,
)
_attention_backward_op = Op(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, Tensor out, Tensor lse, "
    "str impl) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    _attention_backward_fake,
    backward=no_gradient(NO_SECOND_DERIVATIVE.format("attention")),
)


# ---- group_norm_silu -------------------------------------------------------------------------------------------------


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
    return _group_norm_silu_op(x, num_groups, weight, bias, float(eps), activation or "", scale, shift, impl)[0]


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


def _group_norm_silu(x, num_groups, weight, bias, eps, activation, scale, shift, impl):
    if x.numel() == 0:
        return _group_norm_silu_fake(x, num_groups, weight, bias, eps, activation, scale, shift, impl)
    return run("group_norm_silu", impl, (x, num_groups, weight, bias, eps, activation or None, scale, shift))


def _group_norm_silu_fake(x, num_groups, weight, bias, eps, activation, scale, shift, impl):
    return torch.empty_like(x), x.new_empty((2, x.shape[0], num_groups), dtype=_statistics_dtype(x))


def _group_norm_silu_backward(
    grad, x, num_groups, weight, bias, eps, activation, scale, shift, statistics, impl
) -> tuple[Tensor, ...]:
    if x.numel() == 0:
        fakes = _group_norm_silu_backward_fake(
            grad, x, num_groups, weight, bias, eps, activation, scale, shift, statistics, impl
        )
        return tuple(t.zero_() for t in fakes)
    if grad.stride() != x.stride():
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    activation = activation or None
    gradients = run_backward(
        "group_norm_silu",
        impl,
        (x, num_groups, weight, bias, eps, activation, scale, shift),
        (grad, x, num_groups, weight, bias, activation, scale, shift, statistics),
    )
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _group_norm_silu_backward_fake(
    grad, x, num_groups, weight, bias, eps, activation, scale, shift, statistics, impl
) -> tuple[Tensor, ...]:
    optional = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias, scale, shift))
    return (torch.empty_like(x), *optional)


def _group_norm_silu_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps, ctx.activation, scale, shift, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, scale, shift, output[1])


def _group_norm_silu_autograd(ctx: Any, grad: Tensor, _grad_statistics: Tensor):
    x, weight, bias, scale, shift, statistics = ctx.saved_tensors
    dx, dweight, dbias, dscale, dshift = _group_norm_silu_backward_op(
        grad, x, ctx.num_groups, weight, bias, ctx.eps, ctx.activation, scale, shift, statistics, ctx.impl
    )
    present = (
        None if tensor is None else gradient
        for tensor, gradient in ((weight, dweight), (bias, dbias), (scale, dscale), (shift, dshift))
    )
    dweight, dbias, dscale, dshift = present
    return dx, None, dweight, dbias, None, None, dscale, dshift, None


_group_norm_silu_op = Op(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, str activation, Tensor? scale, "
    "Tensor? shift, str impl) -> (Tensor, Tensor)",
    _group_norm_silu,
    _group_norm_silu_fake,
    backward=_group_norm_silu_autograd,
    setup=_group_norm_silu_setup,
)
_group_norm_silu_backward_op = Op(
    "group_norm_silu_backward(Tensor grad, Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "str activation, Tensor? scale, Tensor? shift, Tensor statistics, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _group_norm_silu_backward,
    _group_norm_silu_backward_fake,
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
    return _group_norm_apply_op(x, stats, num_groups, weight, bias, float(eps), activation or "", scale, shift, impl)


def _group_norm_stats(x: Tensor, num_groups: int, impl: str) -> Tensor:
    if x.numel() == 0:
        return _group_norm_stats_fake(x, num_groups, impl).zero_()
    return run("group_norm_stats", impl, (x, num_groups))


def _group_norm_stats_fake(x: Tensor, num_groups: int, impl: str) -> Tensor:
    return x.new_empty((x.shape[0], num_groups, 3), dtype=torch.float64)


def _group_norm_apply(x, stats, num_groups, weight, bias, eps, activation, scale, shift, impl) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    return run("group_norm_apply", impl, (x, stats, num_groups, weight, bias, eps, activation or None, scale, shift))


def _group_norm_apply_fake(x, stats, num_groups, weight, bias, eps, activation, scale, shift, impl) -> Tensor:
    return torch.empty_like(x)


_group_norm_stats_op = Op(
    "group_norm_stats(Tensor x, int num_groups, str impl) -> Tensor",
    _group_norm_stats,
    _group_norm_stats_fake,
    backward=no_gradient("group_norm_stats: has no gradient; group_norm_silu, of the whole image, has one"),
)
_group_norm_apply_op = Op(
    "group_norm_apply(Tensor x, Tensor stats, int num_groups, Tensor? weight, Tensor? bias, float eps, str activation, "
    "Tensor? scale, Tensor? shift, str impl) -> Tensor",
    _group_norm_apply,
    _group_norm_apply_fake,
    backward=no_gradient("group_norm_apply: has no gradient; group_norm_silu, of the whole image, has one"),
)


# ---- nearest_codebook ------------------------------------------------------------------------------------------------
#
# Implementations get z as (B, S, d) with three strides of any kind and codebook (K, d) with two; they return indices
# (B, S). The vectors (N, d) of a caller are (1, N, d), and a map (B, d, H, W) is (B, H W, d) in the memory it came in.
# Neither B, S, K nor d is 0.


def nearest_codebook(z: Tensor, codebook: Tensor, *, impl: str | None = None) -> Tensor:
    """The index of the nearest code to each vector, argmin_k ‖z_n - e_k‖² (van den Oord et al., arXiv:1711.00937).

    The index returned minimises the distance s(n, k) = ½‖e_k‖² - ⟨z_n, e_k⟩ as float32 evaluates it with fused
    multiply-adds in index order: first ‖e_k‖² from 0, halved, then s = fma(-z_i, e_i, s). (The reference evaluates s in
    float64: it may choose another code where rounding makes the difference.) Equal distances give the lowest index; a
    NaN distance never wins; a row of nothing but NaN gives 0. The index does not depend on how the work is split:
    blocks, threads, instruction set, batch.

    Args:
        z: (N, d), or a channel-first map (B, d, H, W), which is not copied (unless its rows lie apart, as in a crop).
            Any strides. float32, float16 or bfloat16 (float64: reference only).
        codebook: (K, d) with 1 ≤ K < 2³¹ and d ≥ 1; any strides; dtype and device of z.
        impl: None for the best implementation that supports the inputs, or "cuda", "cpu", "reference".

    Returns:
        int64 indices, (N,) or (B, H, W). Not differentiable: the straight-through estimator is the caller's.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, or the implementation named cannot run these inputs.
    """
    impl = _check_codebook_search("nearest_codebook", z, codebook, impl)
    index = _nearest_codebook_op(_vectors(z), codebook.detach(), impl)
    return index.view(_index_shape(z))


def nearest_codebook_stats(z: Tensor, codebook: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`nearest_codebook` with how often each code was chosen and the sum of the vectors that chose it.

    What codebooks learned by moving averages (arXiv:1711.00937, appendix A), k-means and usage are made of, from the
    pass that finds the indices. The sums do not depend on the number of threads: each is accumulated in float64 in a
    fixed order and rounded once. A vector with NaN counts for the code its index names.

    Args:
        z, codebook, impl: as for `nearest_codebook`.

    Returns:
        indices: as of `nearest_codebook`.
        counts: (K,) int64.
        sums: (K, d) float32 (float64 for float64 input). Nothing here is differentiable.

    Raises:
        TypeError, ValueError: as `nearest_codebook`.
    """
    impl = _check_codebook_search("nearest_codebook_stats", z, codebook, impl)
    index, counts, sums = _nearest_codebook_stats_op(_vectors(z), codebook.detach(), impl)
    return index.view(_index_shape(z)), counts, sums


def _check_codebook_search(op: str, z: Tensor, codebook: Tensor, impl: str | None) -> str:
    impl = check_impl(op, impl)
    check_floating(op, "z", z)
    check_floating(op, "codebook", codebook)
    if z.ndim not in (2, 4):
        raise ValueError(f"{op}: z must be (N, d) or (B, d, H, W), got {tuple(z.shape)}")
    if codebook.ndim != 2 or codebook.shape[0] < 1 or codebook.shape[1] < 1:
        raise ValueError(f"{op}: codebook must be (K, d), both at least 1, got {tuple(codebook.shape)}")
    if codebook.shape[0] >= 2**31:
        raise ValueError(f"{op}: codebook must have fewer than 2^31 codes, got {tuple(codebook.shape)}")
    if z.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"{op}: z must hold vectors of the codebook's {codebook.shape[1]} numbers, got {tuple(z.shape)}"
        )
    if z.dtype != codebook.dtype:
        raise TypeError(f"{op}: z and codebook must have one dtype, got {z.dtype} and {codebook.dtype}")
    if z.device != codebook.device:
        raise ValueError(f"{op}: z and codebook must be on one device: {z.device}, {codebook.device}")
    return impl


def _vectors(z: Tensor) -> Tensor:
    """(N, d) as (1, N, d) and (B, d, H, W) as (B, H W, d): a view wherever one stride can step through H W."""
    z = z.detach()
    return z[None] if z.ndim == 2 else z.permute(0, 2, 3, 1).flatten(1, 2)


def _index_shape(z: Tensor) -> tuple[int, ...]:
    return (z.shape[0], *z.shape[2:])


def _nearest_codebook(z: Tensor, codebook: Tensor, impl: str) -> Tensor:
    if z.numel() == 0:
        return _nearest_codebook_fake(z, codebook, impl)
    return run("nearest_codebook", impl, (z, codebook))


def _nearest_codebook_fake(z: Tensor, codebook: Tensor, impl: str) -> Tensor:
    return z.new_empty(z.shape[:2], dtype=torch.int64)


def _nearest_codebook_stats(z: Tensor, codebook: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    if z.numel() == 0:
        index, counts, sums = _nearest_codebook_stats_fake(z, codebook, impl)
        return index, counts.zero_(), sums.zero_()
    return run("nearest_codebook_stats", impl, (z, codebook))


def _nearest_codebook_stats_fake(z: Tensor, codebook: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    counts = z.new_empty(codebook.shape[:1], dtype=torch.int64)
    sums = z.new_empty(codebook.shape, dtype=_statistics_dtype(z))
    return _nearest_codebook_fake(z, codebook, impl), counts, sums


_nearest_codebook_op = Op(
    "nearest_codebook(Tensor z, Tensor codebook, str impl) -> Tensor", _nearest_codebook, _nearest_codebook_fake
)
_nearest_codebook_stats_op = Op(
    "nearest_codebook_stats(Tensor z, Tensor codebook, str impl) -> (Tensor, Tensor, Tensor)",
    _nearest_codebook_stats,
    _nearest_codebook_stats_fake,
)
