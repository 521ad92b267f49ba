"""The ops by the native CPU kernels: tensors become addresses, shapes and strides for `ldm_fast._native` (csrc/cpu).

The kernels compute in float32 for float32, bfloat16 and float16 storage, with AVX-512, AVX2 or portable code,
whichever is the widest this CPU has, on the threads of the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm_fast.ops.arguments import Norm
from ldm_fast.ops.native import extension, load_module
from ldm_fast.ops.threads import usable_threads

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}


def unavailable() -> str | None:
    """Return why no op can run here, in one line; None if they can."""
    return load_module("_native")[1]


def _unsupported(**tensors: Tensor | None) -> str | None:
    for name, tensor in tensors.items():
        if tensor is not None and not _can_take(tensor):
            if not tensor.is_cpu:
                return f"runs on CPU tensors, {name} is on {tensor.device}"
            return f"computes float32, bfloat16 and float16, {name} is {tensor.dtype}"
    return None


def _can_take(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype in _DTYPES


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---- attention ----


def attention_unsupported(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> str | None:
    """See `dispatch.Implementation`."""
    if mask is not None and mask.dtype not in _MASK_KINDS:
        return f"takes boolean, float32, bfloat16 and float16 masks, mask is {mask.dtype}"
    return None if _can_take(q) else _unsupported(q=q)  # k and v are like q


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.attention`; the last stride of q, k and v is 1."""
    batch, heads, rows, width = q.shape
    out = q.new_empty_strided(q.shape, (rows * heads * width, width, heads * width, 1))
    lse = q.new_empty_strided((batch, heads, rows), (heads * rows, rows, 1), dtype=torch.float32)
    extension().attention(_attention(q, k, v, mask, scale, out, lse))
    return out, lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.attention_backward`; the last strides are 1, the gradients contiguous."""
    grad, lse = grad.to(q.dtype), lse.contiguous()
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    forward = _attention(q, k, v, mask, scale, out, lse)
    extension().attention_backward(
        (forward, grad.data_ptr(), grad.stride(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
    )
    return dq, dk, dv


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> tuple[Any, ...]:
    """Return Attention of csrc/cpu/kernels.h."""
    return (
        _DTYPES[q.dtype],
        0 if mask is None else _MASK_KINDS[mask.dtype],
        *q.shape[:3],
        *k.shape[2:],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        (0, 0, 0, 0) if mask is None else mask.stride(),
        scale,
        usable_threads(),
    )


# ---- group_norm_silu ----


def group_norm_silu_unsupported(norm: Norm) -> str | None:
    """See `dispatch.Implementation`."""
    x, _, weight, bias, _, _, scale, shift = norm
    for tensor in (x, weight, bias, scale, shift):
        if tensor is not None and not _can_take(tensor):
            return _unsupported(x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    return None


def _norm(norm: Norm) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """Return Norm of csrc/cpu/kernels.h, and the vectors that it holds addresses of."""
    x, groups, weight, bias, eps, activation, scale, shift = norm
    shape = x.shape
    batch, channels = shape[0], shape[1]
    weight, bias, scale, shift = vectors = _vector(weight), _vector(bias), _vector(scale), _vector(shift)
    record = (
        _DTYPES[x.dtype],
        not x.is_contiguous(),
        activation == "silu",
        batch,
        channels,
        x.numel() // (batch * channels),
        groups,
        x.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        eps,
        usable_threads(),
    )
    return record, vectors


def _vector(tensor: Tensor | None) -> Tensor | None:
    """Return weight, bias, scale or shift as the kernels take it: contiguous and in float32."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()


def _like(gradient: Tensor | None, vector: Tensor | None) -> Tensor | None:
    """Return a gradient in the dtype of its vector."""
    if gradient is None or vector is None or gradient.dtype is vector.dtype:
        return gradient
    return gradient.to(vector.dtype)


def group_norm_silu(norm: Norm) -> tuple[Tensor, Tensor]:
    """See `reference.group_norm_silu`."""
    record, _vectors = _norm(norm)
    x, groups = norm.x, norm.num_groups
    y, batch = torch.empty_like(x), x.shape[0]
    # Given, the strides make it cheaper than new_empty.
    statistics = x.new_empty_strided((2, batch, groups), (batch * groups, groups, 1), dtype=torch.float32)
    extension().group_norm_silu(record, y.data_ptr(), statistics.data_ptr())
    return y, statistics


def group_norm_stats_unsupported(x: Tensor, num_groups: int) -> str | None:
    """See `dispatch.Implementation`."""
    return None if _can_take(x) else _unsupported(x=x)


def group_norm_stats(x: Tensor, num_groups: int) -> Tensor:
    """See `reference.group_norm_stats`; x contiguous or channels_last."""
    stats = x.new_empty((x.shape[0], num_groups, 3), dtype=torch.float64)
    record, _ = _norm(Norm(x, num_groups))
    extension().group_norm_stats(record, stats.data_ptr())
    return stats


def group_norm_apply_unsupported(norm: Norm, stats: Tensor) -> str | None:
    """See `dispatch.Implementation`."""
    return group_norm_silu_unsupported(norm)


def group_norm_apply(norm: Norm, stats: Tensor) -> Tensor:
    """See `reference.group_norm_apply`; stats contiguous."""
    record, _vectors = _norm(norm)
    y = torch.empty_like(norm.x)
    extension().group_norm_apply(record, stats.data_ptr(), y.data_ptr())
    return y


def group_norm_silu_backward(
    grad: Tensor, norm: Norm, statistics: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See `reference.group_norm_silu_backward`; grad in the layout of x."""
    record, vectors = _norm(norm)
    x, grad = norm.x, grad.to(norm.x.dtype)
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    dx = torch.empty_like(x)
    gradients = [None if t is None else torch.empty_like(t) for t in vectors]
    extension().group_norm_silu_backward(
        record,
        grad.data_ptr(),
        statistics.data_ptr(),
        dx.data_ptr(),
        *map(_address, gradients),
    )
    pairs = zip(gradients, norm.vectors, strict=True)
    dweight, dbias, dscale, dshift = (
        g if t is None or g is None or g.dtype is t.dtype else g.to(t.dtype) for g, t in pairs
    )
    return dx, dweight, dbias, dscale, dshift


# ---- nearest_codebook ----

# How to search; every way finds the same indices. "auto" chooses by the sizes and by what the first rows show.
SEARCHES = {"auto": 0, "brute force": 1, "pruned": 2, "bf16 candidates": 3}


def nearest_codebook_unsupported(z: Tensor, codebook: Tensor) -> str | None:
    """See `dispatch.Implementation`."""
    return _unsupported(z=z, codebook=codebook)


def nearest_codebook(z: Tensor, codebook: Tensor, search: str = "auto") -> Tensor:
    """See `ops.nearest_codebook`: z (B, S, d) → (B, S); distances in float32 with fused multiply-adds in index order.

    `search` is for tests and benchmarks: one of SEARCHES. A way that cannot take these inputs leaves the rows to brute
    force.
    """
    index = torch.empty(z.shape[:2], dtype=torch.int64)
    _search_codebook(z, codebook, search, index, None, None)
    return index


def nearest_codebook_stats_unsupported(z: Tensor, codebook: Tensor) -> str | None:
    """See `dispatch.Implementation`."""
    return _unsupported(z=z, codebook=codebook)


def nearest_codebook_stats(z: Tensor, codebook: Tensor, search: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.nearest_codebook_stats`; `search` as above."""
    index = torch.empty(z.shape[:2], dtype=torch.int64)
    counts = torch.empty(codebook.shape[0], dtype=torch.int64)
    sums = torch.empty(codebook.shape, dtype=torch.float32)
    _search_codebook(z, codebook, search, index, counts, sums)
    return index, counts, sums


def _search_codebook(
    z: Tensor, codebook: Tensor, search: str, index: Tensor, counts: Tensor | None, sums: Tensor | None
) -> None:
    extension().nearest_codebook(
        (
            _DTYPES[z.dtype],
            SEARCHES[search],
            *z.shape[:2],
            *codebook.shape,
            z.data_ptr(),
            codebook.data_ptr(),
            z.stride(),
            codebook.stride(),
            index.data_ptr(),
            _address(counts),
            _address(sums),
            usable_threads(),
        )
    )
