"""attention: what it takes, how it is registered, its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_fast.ops.dispatch import check_impl, run, run_backward
from ldm_fast.ops.op import (
    NO_SECOND_DERIVATIVE,
    Op,
    autocast_dtype,
    check_floating,
    check_no_tangent,
    statistics_dtype,
)
from ldm_fast.ops.torch_private import autocast_may_be_on, tangents_may_exist


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute softmax(q kᵀ · scale + mask) v, the softmax in float32 (Vaswani et al., arXiv:1706.03762, eq. 1).

    Args:
        q: (B, H, N, D) with any strides if the last one is 1 (others are copied). float32, float16, bfloat16, or
            float64 (reference only).
        k, v: (B, H, M, D), dtype and device of q.
        mask: broadcastable to (B, H, N, M). Boolean: True means may attend. Floating point: added to the scores. It
            gets no gradient. A row whose keys are all masked gives zeros.
        scale: factor of the scores, D ** -0.5 by default.
        impl: None for the best implementation that supports the inputs, or "triton", "cpu", "torch", "reference".

    Returns:
        (B, H, N, D) in q's dtype. The memory is laid out (B, N, H, D), so merging the heads is free. Autocast lowers q,
        k and v, and so the result, as for PyTorch's scaled_dot_product_attention.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, or the implementation named cannot run these inputs.
    """
    check_impl("attention", impl)
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
    """Whether `_check_kinds` has nothing to do: its many steps take as long as a small attention."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and q.dtype is k.dtype is v.dtype
        and q.dtype.is_floating_point
        and (q.is_cpu and k.is_cpu and v.is_cpu)
        and not (autocast_may_be_on() or tangents_may_exist())
    )


def _check_kinds(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, lowered by autocast if it is on. Raise if they are not of one kind and on one device."""
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
    """Return the mask expanded to (B, H, N, M), without a copy."""
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


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, impl: str | None
) -> tuple[Tensor, Tensor]:
    if 0 in q.shape or 0 in k.shape:
        out, lse = _forward_fake(q, k, v, mask, scale, impl)
        return out.zero_(), lse.fill_(float("-inf"))
    out, lse = run("attention", impl, (q, k, v, mask, scale))
    return out, lse


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, impl: str | None
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, width = q.shape
    out = q.new_empty((batch, rows, heads, width)).transpose(1, 2)
    return out, q.new_empty((batch, heads, rows), dtype=statistics_dtype(q))


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    # torch.compile chooses its own layout for what forward saved
    grad, q, k, v, out = (t if t.stride(-1) == 1 else t.contiguous() for t in (grad, q, k, v, out))
    dq, dk, dv = run_backward("attention", impl, (q, k, v, mask, scale), (grad, q, k, v, mask, scale, out, lse))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_backward_op = Op("attention_backward", _backward, _backward_fake, backward=NO_SECOND_DERIVATIVE.format("attention"))
_attention_op = Op(
    "attention",
    _forward,
    _forward_fake,
    backward=_backward_op,
    keep=(0, 1),
    ordinary=lambda zeros: (zeros(1, 2, 16, 40), zeros(1, 2, 77, 40), zeros(1, 2, 77, 40), None, 40**-0.5),
)
