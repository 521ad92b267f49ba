"""nearest_codebook and nearest_codebook_stats: what they take, how they are registered."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_fast.ops.dispatch import check_impl, run
from ldm_fast.ops.op import Op, check_floating, statistics_dtype

# Implementations get z as (B, S, d) with three strides of any kind and codebook (K, d) with two; they return indices
# (B, S). The vectors (N, d) of a caller are (1, N, d), and a map (B, d, H, W) is (B, H W, d) in the memory it came in.
# Neither B, S, K nor d is 0.


def nearest_codebook(z: Tensor, codebook: Tensor, *, impl: str | None = None) -> Tensor:
    """Find the nearest code to each vector, argmin_k ‖z_n - e_k‖² (van den Oord et al., arXiv:1711.00937).

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
    _check("nearest_codebook", z, codebook, impl)
    index = _nearest_codebook_op(_vectors(z), codebook.detach(), impl)
    return index.view(_index_shape(z))


def nearest_codebook_stats(z: Tensor, codebook: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Find the nearest codes, count how often each was chosen, and sum the vectors that chose it.

    Codebooks learned by moving averages (arXiv:1711.00937, appendix A), k-means and the usage of codes need these
    counts and sums; they come from the pass that finds the indices. The sums do not depend on the number of threads:
    each is accumulated in float64 in a fixed order and rounded once. A vector with NaN counts for the code that its
    index names.

    Args:
        z, codebook, impl: as for `nearest_codebook`.

    Returns:
        indices: those of `nearest_codebook`.
        counts: (K,) int64.
        sums: (K, d) float32 (float64 for float64 input). Nothing here is differentiable.

    Raises:
        TypeError, ValueError: as `nearest_codebook`.
    """
    _check("nearest_codebook_stats", z, codebook, impl)
    index, counts, sums = _nearest_codebook_stats_op(_vectors(z), codebook.detach(), impl)
    return index.view(_index_shape(z)), counts, sums


def _check(op: str, z: Tensor, codebook: Tensor, impl: str | None) -> None:
    check_impl(op, impl)
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


def _vectors(z: Tensor) -> Tensor:
    """(N, d) as (1, N, d) and (B, d, H, W) as (B, H W, d): a view wherever one stride can step through H W."""
    z = z.detach()
    return z[None] if z.ndim == 2 else z.permute(0, 2, 3, 1).flatten(1, 2)


def _index_shape(z: Tensor) -> tuple[int, ...]:
    return (z.shape[0], *z.shape[2:])


def _search(z: Tensor, codebook: Tensor, impl: str | None) -> Tensor:
    if z.numel() == 0:
        return _search_fake(z, codebook, impl)
    index: Tensor = run("nearest_codebook", impl, (z, codebook))
    return index


def _search_fake(z: Tensor, codebook: Tensor, impl: str | None) -> Tensor:
    return z.new_empty(z.shape[:2], dtype=torch.int64)


def _stats(z: Tensor, codebook: Tensor, impl: str | None) -> tuple[Tensor, Tensor, Tensor]:
    if z.numel() == 0:
        index, counts, sums = _stats_fake(z, codebook, impl)
        return index, counts.zero_(), sums.zero_()
    index, counts, sums = run("nearest_codebook_stats", impl, (z, codebook))
    return index, counts, sums


def _stats_fake(z: Tensor, codebook: Tensor, impl: str | None) -> tuple[Tensor, Tensor, Tensor]:
    counts = z.new_empty(codebook.shape[:1], dtype=torch.int64)
    sums = z.new_empty(codebook.shape, dtype=statistics_dtype(z))
    return _search_fake(z, codebook, impl), counts, sums


def _ordinary(zeros: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    return zeros(1, 16, 4), zeros(32, 4)


_nearest_codebook_op = Op("nearest_codebook", _search, _search_fake, ordinary=_ordinary)
_nearest_codebook_stats_op = Op("nearest_codebook_stats", _stats, _stats_fake, ordinary=_ordinary)
