"""Fused group norm and SiLU in Triton, deterministic. The backward pass has its own file.

h = ((x - mean) · rstd · weight + bias) · (1 + scale) + shift;  y = silu(h) or h;  mean and rstd of a group in float32

On chip  A group that fits into a program's registers: x is read once and y written once.
Split    A larger group: `_stats` reads x and leaves each channel's mean and squared deviation per chunk of pixels,
         `_merge` joins them in fixed order (Chan et al. 1979), `_apply` reads x again and writes y.

Deviations are taken from a mean that is already known, never as E[x²] - E[x]²: mean 1000 and deviation 1 keep their
digits. Layouts and tiles: `group_norm_silu_common`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_fast.ops.arguments import Norm

from . import Launch, refuse, unavailable
from .group_norm_silu_backward import group_norm_silu_backward
from .group_norm_silu_common import (
    GENERAL,
    MOST_CHANNELS,
    ON_CHIP,
    affine,
    group_launch,
    known_groups,
    layout_of,
    load,
    on_chip,
    partial_results,
    per_width_of,
    sizes_of,
    some_channels,
    some_pixels,
    split_launch,
    split_of,
    store,
    whole_group,
    with_contiguous_vectors,
)

__all__ = [
    "group_norm_apply",
    "group_norm_apply_unsupported",
    "group_norm_silu",
    "group_norm_silu_backward",
    "group_norm_silu_unsupported",
    "group_norm_stats",
    "group_norm_stats_unsupported",
    "unavailable",
]


@triton.jit
def _moments(x, inside, count):
    """Mean and sum of squared deviations of the elements inside a tile, corrected for the rounding of the mean."""
    mean = tl.sum(tl.where(inside, x, 0.0)) / count
    off = tl.where(inside, x - mean, 0.0)
    rest = tl.sum(off) / count
    return mean + rest, tl.sum(off * off) - count * rest * rest


@triton.jit(do_not_specialize=GENERAL)
def _forward_group(
    x, weight, bias, scale, shift, y, mean, rstd, C, S, G, width, eps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One group of one image, kept on chip; grid (B · G). Moves x and y once."""
    pid = tl.program_id(0)
    row, image, channel, exists, offsets, inside, count = whole_group(
        pid, C, S, G, width, CHANNELS, PIXELS, UNIT, CHANNELS_LAST
    )
    value = load(x + image, offsets, inside)  # (CHANNELS, PIXELS)

    center, deviation = _moments(value, inside, count)
    inverse = tl.rsqrt(deviation / count + eps)
    tl.store(mean + pid, center)
    tl.store(rstd + pid, inverse)

    factor, offset, _ = affine(weight, bias, scale, shift, row, channel, exists)
    h = (value - center) * inverse * factor[:, None] + offset[:, None]
    if SILU:
        h *= tl.sigmoid(h)
    store(y + image, offsets, h, inside)


@triton.jit(do_not_specialize=GENERAL)
def _stats(
    x, means, deviations, C, S, chunks, steps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviation of CHANNELS channels over steps · PIXELS pixels; grid (chunks · channel tiles · B).

    Every element of the tile follows a mean of its own (Welford 1962); the means are joined once, at the end.
    """
    C, S, b, channel, exists, chunk = some_channels(tl.program_id(0), C, S, chunks, CHANNELS, UNIT, CHANNELS_LAST)
    center = tl.zeros((CHANNELS, PIXELS), tl.float32)
    deviation = tl.zeros((CHANNELS, PIXELS), tl.float32)
    count = tl.zeros((PIXELS,), tl.float32)
    for step in range(steps):
        pixel = (chunk * steps + step) * PIXELS + tl.arange(0, PIXELS)
        offsets, inside = some_pixels(chunk * steps + step, channel, C, S, PIXELS, CHANNELS_LAST)
        value = load(x + b * C * S, offsets, inside)
        off = tl.where(inside, value - center, 0.0)
        center += off * (1.0 / (step + 1))
        deviation += off * tl.where(inside, value - center, 0.0)
        count += tl.where(pixel < S, 1.0, 0.0)

    total = tl.sum(count, 0)
    joined = tl.sum(center * count[None, :], 1) / total  # (CHANNELS,)
    off = center - joined[:, None]
    rest = tl.sum(off * count[None, :], 1) / total
    squares = tl.sum(deviation + off * off * count[None, :], 1) - total * rest * rest
    place = (b * C + channel) * chunks + chunk
    tl.store(means + place, joined + rest, mask=exists)
    tl.store(deviations + place, squares, mask=exists)


@triton.jit(do_not_specialize=GENERAL)
def _merge(means, deviations, mean, rstd, S, G, width, chunks, pixels, eps, BLOCK: tl.constexpr):
    """mean and rstd of one group from its channels' partial results of `pixels` pixels each; grid (B · G)."""
    pid = tl.program_id(0)
    parts = width * chunks
    means += pid.to(tl.int64) * parts
    deviations += pid.to(tl.int64) * parts
    total = 1.0 * width * S
    first = tl.load(means)  # sums of differences from it keep digits that sums of the means would lose
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        count = tl.minimum(pixels, S - part % chunks * pixels).to(tl.float32)
        acc += tl.where(part < parts, (load(means, part, part < parts) - first) * count, 0.0)
    center = first + tl.sum(acc, 0) / total
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        count = tl.minimum(pixels, S - part % chunks * pixels).to(tl.float32)
        off = load(means, part, part < parts) - center
        acc += tl.where(part < parts, load(deviations, part, part < parts) + off * off * count, 0.0)
    tl.store(mean + pid, center)
    tl.store(rstd + pid, tl.rsqrt(tl.sum(acc, 0) / total + eps))


@triton.jit(do_not_specialize=GENERAL)
def _apply(
    x, weight, bias, scale, shift, mean, rstd, y, C, S, G, per_width, chunks, steps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of CHANNELS channels and steps · PIXELS pixels from known statistics; grid (chunks · channel tiles · B).

    Moves x and y once. What belongs to a channel is read and worked out once, before the loop.
    """
    C, S, b, channel, exists, chunk = some_channels(tl.program_id(0), C, S, chunks, CHANNELS, UNIT, CHANNELS_LAST)
    _, center, inverse, factor, offset = known_groups(
        mean, rstd, weight, bias, scale, shift, b, channel, exists, C, G, per_width
    )
    center, factor, offset = center[:, None], (inverse * factor)[:, None], offset[:, None]  # (CHANNELS, 1)
    for step in range(steps):
        offsets, inside = some_pixels(chunk * steps + step, channel, C, S, PIXELS, CHANNELS_LAST)
        h = (load(x + b * C * S, offsets, inside) - center) * factor + offset  # (CHANNELS, PIXELS)
        if SILU:
            h *= tl.sigmoid(h)
        store(y + b * C * S, offsets, h, inside)


def forward_launches(norm: Norm, y: Tensor, statistics: Tensor) -> list[Launch]:
    """What `group_norm_silu` launches, in this order, to fill y and statistics."""
    x, (mean, rstd) = norm.x, statistics
    if tile := on_chip(x, norm.width, ON_CHIP):
        return [group_launch(_forward_group, norm, tile, (x, *norm.vectors, y, mean, rstd), norm.eps)]
    parts = partial_results(x)
    _, s, groups = sizes_of(norm)
    args = (*parts, mean, rstd, s, groups, norm.width, parts.shape[-1], split_of(x).chunk, norm.eps)
    merge = Launch(_merge, x.shape[0] * groups, args, {"BLOCK": 1024, "num_warps": 4})
    return [stats_launch(x, parts), merge, apply_launch(norm, mean, rstd, y)]


def stats_launch(x: Tensor, parts: Tensor) -> Launch:
    """The first half of the split form: fills the means and squared deviations, parts (2, B, C, chunks)."""
    return split_launch(_stats, x, (x, *parts, x.shape[1], layout_of(x)[0]), split_of(x).steps, 32)


def apply_launch(norm: Norm, mean: Tensor, rstd: Tensor, y: Tensor) -> Launch:
    """The second half of the split form: fills y from mean and rstd (B, num_groups)."""
    x, silu = norm.x, norm.activation == "silu"
    args = (x, *norm.vectors, mean, rstd, y, *sizes_of(norm), per_width_of(norm))
    return split_launch(_apply, x, args, split_of(x).steps_apply, 32, SILU=silu)


def group_norm_silu_unsupported(norm: Norm) -> str | None:
    """Why these (checked) inputs cannot run, None if they can."""
    for name, vector in zip(("weight", "bias", "scale", "shift"), norm.vectors, strict=True):
        if vector is not None and vector.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"the Triton kernel takes a float16, bfloat16 or float32 {name}, not {vector.dtype}"
    if not norm.x.is_contiguous() and not norm.x.movedim(1, -1).is_contiguous():
        return "the Triton kernel needs x contiguous or channels_last: call .contiguous() first"
    if norm.x.shape[1] > MOST_CHANNELS:
        return f"the Triton kernel takes at most {MOST_CHANNELS} channels, not {norm.x.shape[1]}"
    return refuse(norm.x)


def group_norm_silu(norm: Norm) -> tuple[Tensor, Tensor]:
    """y and its statistics, mean and rstd, (2, B, G) in float32."""
    x, norm = norm.x, with_contiguous_vectors(norm)
    y = torch.empty_like(x)
    statistics = torch.empty((2, x.shape[0], norm.num_groups), dtype=torch.float32, device=x.device)
    for launch in forward_launches(norm, y, statistics):
        launch.run()
    return y, statistics


def group_norm_stats_unsupported(x: Tensor, num_groups: int) -> str | None:
    """Why this (checked) input cannot run, None if it can."""
    return group_norm_silu_unsupported(Norm(x, num_groups))


def group_norm_stats(x: Tensor, num_groups: int) -> Tensor:
    """Count, mean and sum of squared deviations, (B, num_groups, 3) in float64; see `ldm_fast.ops.reference`."""
    parts, (pixels, _), chunk = partial_results(x), layout_of(x), split_of(x).chunk
    stats_launch(x, parts).run()
    chunks = parts.shape[-1]
    # all chunks of a group's channels, joined in float64: a few thousand numbers
    counts = torch.full((chunks,), float(chunk), dtype=torch.float64, device=x.device)
    counts[-1] = pixels - (chunks - 1) * chunk
    means, deviations = parts.double().reshape(2, x.shape[0], num_groups, -1, chunks)
    total = float(x.shape[1] // num_groups * pixels)
    mean = (means * counts).sum((2, 3)) / total  # (B, G)
    squares = (deviations + (means - mean[..., None, None]).square() * counts).sum((2, 3))
    return torch.stack([torch.full_like(mean, total), mean, squares], dim=-1)


def group_norm_apply_unsupported(norm: Norm, stats: Tensor) -> str | None:
    """Why these (checked) inputs cannot run, None if they can."""
    return group_norm_silu_unsupported(norm)


def group_norm_apply(norm: Norm, stats: Tensor) -> Tensor:
    """`group_norm_silu` of x by the statistics of what x is a part of; see `ldm_fast.ops.reference`."""
    x = norm.x
    weight, _, scale, shift = norm.vectors
    y = torch.empty_like(x)
    count, mean, squares = stats.unbind(-1)
    rstd = (squares / count + norm.eps).rsqrt()
    rounded = mean.float().contiguous()
    # Rounding the mean to float32 loses digits that show if it is far above the deviation: they go into the shift.
    rest = ((rounded.double() - mean) * rstd).float().repeat_interleave(norm.width, dim=1)  # (B, C)
    rest = rest if weight is None else rest * weight.float()
    rest = rest if scale is None else rest * (1.0 + scale.float())
    shift = rest if shift is None else rest + shift.float()
    norm = with_contiguous_vectors(norm._replace(shift=shift))
    apply_launch(norm, rounded, rstd.float(), y).run()
    return y
