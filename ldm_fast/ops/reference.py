"""The ops in plain PyTorch. This file defines what "correct" means; nothing here is fast.

Every function has the name, the arguments and the results of its fast twins (`cpu.py`, `cuda.py`, `ldm_fast/kernels/`).
float64 in means float64 throughout, which is what the tests compare against. Every other dtype computes in float32 and
rounds once, on the way out. Nothing is unsupported here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_fast.ops.arguments import Norm


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the scaled and masked scores (B, H, N, M) in the accumulation dtype."""
    dtype = _accumulation_dtype(q)
    scores = (q.to(dtype) * scale) @ k.to(dtype).transpose(-1, -2)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(q kᵀ · scale + mask) v, and the log-sum-exp of each row's scores.

    q (B, H, N, D), k and v (B, H, M, D), mask broadcastable to (B, H, N, M). Returns out (B, H, N, D), whose memory is
    laid out (B, N, H, D) so that merging the heads costs nothing, and lse (B, H, N). A fully masked row gives zeros
    and lse = -inf.
    """
    probabilities, lse = _softmax(_scores(q, k, mask, scale))  # (B, H, N, M), (B, H, N)
    out = probabilities @ v.to(probabilities.dtype)  # (B, H, N, D)
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `attention` for q, k and v. The probabilities are recomputed: lse would lose digits.

    With P the probabilities: dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP - rowsum(dO ∘ O)), dQ = dS K · scale,
    dK = dSᵀ Q · scale (FlashAttention, arXiv:2205.14135, appendix B).
    """
    dtype = _accumulation_dtype(q)
    probabilities, _ = _softmax(_scores(q, k, mask, scale))  # (B, H, N, M)
    grad, out = grad.to(dtype), out.to(dtype)
    dv = probabilities.transpose(-1, -2) @ grad  # (B, H, M, D)
    dp = grad @ v.to(dtype).transpose(-1, -2)  # (B, H, N, M)
    ds = probabilities * (dp - (grad * out).sum(-1, keepdim=True))
    dq = ds @ k.to(dtype) * scale  # (B, H, N, D)
    dk = ds.transpose(-1, -2) @ q.to(dtype) * scale  # (B, H, M, D)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax over the last dimension and its log-sum-exp; zeros and -inf for a row of nothing but -inf."""
    largest = scores.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)  # exp(-inf - largest) must be 0, not NaN
    exponentials = torch.exp(scores - largest)
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / total.masked_fill(total == 0, 1.0), (largest + total.log())[..., 0]


def group_norm_silu(norm: Norm) -> tuple[Tensor, Tensor]:
    """Return silu(group_norm(x) · (1 + scale) + shift), and the mean and 1/std of each group.

    y is like x; mean and rstd are (2, B, num_groups).
    """
    x = norm.x
    dtype = _accumulation_dtype(x)
    groups = x.to(dtype).reshape(x.shape[0], norm.num_groups, -1)  # (B, G, C/G · spatial)
    mean = groups.mean(-1)  # (B, G)
    mean = mean + (groups - mean[..., None]).mean(-1)  # the rounding of a mean far above the deviation would show in x̂
    rstd = ((groups - mean[..., None]).square().mean(-1) + norm.eps).rsqrt()  # (B, G)
    h = _modulated(_normalised(x, norm.num_groups, mean, rstd), norm)
    y = h * torch.sigmoid(h) if norm.activation == "silu" else h
    return _like(y, x), torch.stack([mean, rstd])


def group_norm_stats(x: Tensor, num_groups: int) -> Tensor:
    """Return count, mean and sum of squared deviations of each group of x: (B, num_groups, 3) in float64."""
    groups = x.double().reshape(x.shape[0], num_groups, -1)  # (B, G, C/G · spatial)
    mean = groups.mean(-1)
    squares = (groups - mean[..., None]).square().sum(-1)
    return torch.stack([torch.full_like(mean, groups.shape[-1]), mean, squares], dim=-1)


def group_norm_apply(norm: Norm, stats: Tensor) -> Tensor:
    """Return `group_norm_silu` of x, a part of the image that `stats` (B, num_groups, 3) were measured on."""
    x = norm.x
    dtype = _accumulation_dtype(x)
    count, mean, squares = stats.double().unbind(-1)  # (B, G) each
    rstd = (squares / count + norm.eps).rsqrt()
    rest = (mean - mean.to(dtype)) * rstd  # what rounding the mean loses shows in x̂ if it is far above the deviation
    x_hat = _normalised(x, norm.num_groups, mean.to(dtype), rstd.to(dtype))
    h = _modulated(x_hat - _per_group(rest.to(dtype), x, norm.num_groups), norm)
    return _like(h * torch.sigmoid(h) if norm.activation == "silu" else h, x)


def group_norm_silu_backward(
    grad: Tensor, norm: Norm, statistics: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `group_norm_silu` for x, weight, bias, scale and shift. y is recomputed from x.

    With x̂ the normalised x and g = dL/dx̂: dx = rstd · (g - mean(g) - x̂ · mean(g ∘ x̂)), means over a group.
    """
    x, num_groups = norm.x, norm.num_groups
    weight, bias, scale, shift = norm.vectors
    dtype = _accumulation_dtype(x)
    mean, rstd = statistics.to(dtype)
    x_hat = _normalised(x, num_groups, mean, rstd)  # (B, C, *spatial)
    h = _modulated(x_hat, norm)
    grad = grad.to(dtype)
    if norm.activation == "silu":
        s = torch.sigmoid(h)
        grad = grad * s * (1 + h * (1 - s))  # dL/dh
    spatial = tuple(range(2, x.ndim))
    dh = _sum(grad, spatial)  # (B, C): Σ dL/dh over the pixels
    dh_x_hat = _sum(grad * x_hat, spatial)  # (B, C)
    gamma = weight.to(dtype) if weight is not None else x_hat.new_ones(x.shape[1])
    beta = bias.to(dtype) if bias is not None else x_hat.new_zeros(x.shape[1])
    gain = 1 + scale.to(dtype) if scale is not None else x_hat.new_ones(x.shape[:2])  # (B, C)

    g = grad * _per_channel(gain * gamma, x)  # dL/dx̂
    grouped = (x.shape[0], num_groups, -1)
    mean_g = g.reshape(grouped).mean(-1)
    mean_g_x_hat = (g * x_hat).reshape(grouped).mean(-1)
    dx = (g - _per_group(mean_g, x, num_groups) - x_hat * _per_group(mean_g_x_hat, x, num_groups)) * _per_group(
        rstd, x, num_groups
    )
    return (
        _like(dx, x),
        (gain * dh_x_hat).sum(0).to(weight.dtype) if weight is not None else None,
        (gain * dh).sum(0).to(bias.dtype) if bias is not None else None,
        (gamma * dh_x_hat + beta * dh).to(scale.dtype) if scale is not None else None,
        dh.to(shift.dtype) if shift is not None else None,
    )


def _normalised(x: Tensor, num_groups: int, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x.to(mean.dtype) - _per_group(mean, x, num_groups)) * _per_group(rstd, x, num_groups)


def _modulated(x_hat: Tensor, norm: Norm) -> Tensor:
    weight, bias, scale, shift = norm.vectors
    h = x_hat
    if weight is not None:
        h = h * _per_channel(weight.to(h.dtype)[None], h)
    if bias is not None:
        h = h + _per_channel(bias.to(h.dtype)[None], h)
    if scale is not None:
        h = h * _per_channel(1 + scale.to(h.dtype), h)
    if shift is not None:
        h = h + _per_channel(shift.to(h.dtype), h)
    return h


def _per_channel(a: Tensor, x: Tensor) -> Tensor:
    """Return a (B or 1, C) as (B or 1, C, 1, …), to broadcast over the pixels of x."""
    return a.reshape(*a.shape, *(1,) * (x.ndim - 2))


def _per_group(a: Tensor, x: Tensor, num_groups: int) -> Tensor:
    """Return a (B, G) as (B, C, 1, …): each group's value for its channels."""
    return _per_channel(a.repeat_interleave(x.shape[1] // num_groups, dim=1), x)


def _sum(a: Tensor, dims: tuple[int, ...]) -> Tensor:
    return a.sum(dims) if dims else a


def _like(y: Tensor, x: Tensor) -> Tensor:
    """Return y in the dtype and memory layout of x."""
    return torch.empty_like(x).copy_(y)


def nearest_codebook(z: Tensor, codebook: Tensor) -> Tensor:
    """Return argmin over k of ½‖e_k‖² - ⟨z_n, e_k⟩, which orders the codes as ‖z_n - e_k‖² does.

    z (..., d), codebook (K, d) → int64 (...). Evaluated in float64, a slab of rows at a time, so that memory stays O(K)
    per row. Equal distances give the lowest index. A NaN distance never wins; a row of nothing but NaN gives 0.
    """
    vectors, codes = z.reshape(-1, z.shape[-1]), codebook.double()
    half_norms = codes.square().sum(-1) / 2  # (K,)
    indices = torch.empty(vectors.shape[0], dtype=torch.int64, device=z.device)
    rows = max(1, (1 << 22) // max(1, codes.shape[0]))
    numbers = torch.arange(codes.shape[0], device=z.device)
    for start in range(0, vectors.shape[0], rows):
        distances = half_norms - vectors[start : start + rows].double() @ codes.T  # (rows, K)
        smallest = distances.masked_fill(distances.isnan(), float("inf")).amin(-1, keepdim=True)
        first = torch.where(distances == smallest, numbers, codes.shape[0]).amin(-1)  # NaN equals nothing
        indices[start : start + rows] = first.where(first < codes.shape[0], 0)
    return indices.view(z.shape[:-1])


def nearest_codebook_stats(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `nearest_codebook`, how many vectors chose each code, (K,) int64, and their sums, (K, d).

    Sums are taken in float64 in the order of the vectors, then rounded to float32 (float64 for float64 input).
    """
    indices = nearest_codebook(z, codebook)
    chosen, vectors = indices.flatten(), z.reshape(-1, z.shape[-1]).double()
    counts = torch.bincount(chosen, minlength=codebook.shape[0])
    sums = torch.zeros(codebook.shape, dtype=torch.float64, device=z.device).index_add_(0, chosen, vectors)
    return indices, counts, sums.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
