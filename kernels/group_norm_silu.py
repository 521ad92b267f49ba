"""Fused group norm and SiLU in Triton, deterministic; the backward pass is beside it.

h = ((x - mean) · rstd · weight + bias) · (1 + scale) + shift;  y = silu(h) or h; mean and rstd of a group in float32

On chip  A group that fits into a program's registers: one read and one write.
Split    A larger group: `_stats` reads x and leaves each channel's mean and squared deviation per chunk of pixels,
         `_merge` joins them in fixed order (Chan et al. 1979), `_apply` reads x again and writes y.

Deviations are taken from a mean already known, never E[x²] - E[x]²: mean 1000 and deviation 1 keep their digits.
Layouts and tiles: `group_norm_silu_common`.
"""

import torch
import triton
import triton.language as tl

from . import Launch, refuse, unavailable
from .group_norm_silu_backward import group_norm_silu_backward
from .group_norm_silu_common import (
    GENERAL,
    MOST_CHANNELS,
    ON_CHIP,
    affine,
    aligned,
    block_of,
    group_of,
    layout_of,
    on_chip,
    per_width_of,
    resident_of,
    split_of,
    tile_of,
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
    C, S = aligned(C, S, UNIT, CHANNELS_LAST)
    width, _ = aligned(width, S, UNIT, CHANNELS_LAST)
    pid = tl.program_id(0)
    b = (pid // G).to(tl.int64)
    last = (pid % G + 1) * width
    channel = pid % G * width + tl.arange(0, CHANNELS)
    offsets, inside = tile_of(channel, tl.arange(0, PIXELS), last, C, S, CHANNELS_LAST)
    value = tl.load(x + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32)  # (CHANNELS, PIXELS)

    count = 1.0 * width * S
    center, deviation = _moments(value, inside, count)
    inverse = tl.rsqrt(deviation / count + eps)
    tl.store(mean + pid, center)
    tl.store(rstd + pid, inverse)

    factor, offset, _ = affine(weight, bias, scale, shift, b * C, channel, channel < last)
    h = (value - center) * inverse * factor[:, None] + offset[:, None]
    if SILU:
        h *= tl.sigmoid(h)
    tl.store(y + b * C * S + offsets, h.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=GENERAL)
def _stats(
    x, means, deviations, C, S, chunks, steps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviation of CHANNELS channels over steps · PIXELS pixels; grid (chunks · channel tiles · B).

    Every element of the tile follows its own mean (Welford 1962); they are joined once, at the end.
    """
    C, S = aligned(C, S, UNIT, CHANNELS_LAST)
    pid = tl.program_id(0)
    tiles = tl.cdiv(C, CHANNELS)
    chunk = pid % chunks
    channel = pid // chunks % tiles * CHANNELS + tl.arange(0, CHANNELS)
    b = (pid // chunks // tiles).to(tl.int64)
    x += b * C * S
    center = tl.zeros((CHANNELS, PIXELS), tl.float32)
    deviation = tl.zeros((CHANNELS, PIXELS), tl.float32)
    count = tl.zeros((PIXELS,), tl.float32)
    for step in range(steps):
        pixel = (chunk * steps + step) * PIXELS + tl.arange(0, PIXELS)
        offsets, inside = tile_of(channel.to(tl.int64), pixel, C, C, S, CHANNELS_LAST)
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
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
    tl.store(means + place, joined + rest, mask=channel < C)
    tl.store(deviations + place, squares, mask=channel < C)


@triton.jit(do_not_specialize=GENERAL)
def _merge(means, deviations, mean, rstd, S, G, width, chunks, pixels, eps, BLOCK: tl.constexpr):
    """mean and rstd of one group from its channels' partial results of `pixels` pixels each; grid (B · G)."""
    pid = tl.program_id(0)
    parts = width * chunks
    means += pid.to(tl.int64) * parts
    deviations += pid.to(tl.int64) * parts
    total = 1.0 * width * S
    first = tl.load(means)  # sums of differences from it keep the digits that sums of the means would lose
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        count = tl.minimum(pixels, S - part % chunks * pixels).to(tl.float32)
        acc += tl.where(part < parts, (tl.load(means + part, mask=part < parts, other=0.0) - first) * count, 0.0)
    center = first + tl.sum(acc, 0) / total
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        count = tl.minimum(pixels, S - part % chunks * pixels).to(tl.float32)
        off = tl.load(means + part, mask=part < parts, other=0.0) - center
        within = tl.load(deviations + part, mask=part < parts, other=0.0)
        acc += tl.where(part < parts, within + off * off * count, 0.0)
    tl.store(mean + pid, center)
    tl.store(rstd + pid, tl.rsqrt(tl.sum(acc, 0) / total + eps))


@triton.jit(do_not_specialize=GENERAL)
def _apply(
    x, weight, bias, scale, shift, mean, rstd, y, C, S, G, per_width, chunks, steps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of CHANNELS channels and steps · PIXELS pixels from known statistics; grid (chunks · channel tiles · B).

    Moves x and y once; what belongs to a channel is read and worked out once, before the loop.
    """
    C, S = aligned(C, S, UNIT, CHANNELS_LAST)
    pid = tl.program_id(0)
    tiles = tl.cdiv(C, CHANNELS)
    chunk = pid % chunks
    channel = pid // chunks % tiles * CHANNELS + tl.arange(0, CHANNELS)
    b = (pid // chunks // tiles).to(tl.int64)
    group = b * G + group_of(channel, per_width)
    center = tl.load(mean + group, mask=channel < C, other=0.0)[:, None]  # (CHANNELS, 1)
    inverse = tl.load(rstd + group, mask=channel < C, other=0.0)
    factor, offset, _ = affine(weight, bias, scale, shift, b * C, channel, channel < C)
    factor, offset = (inverse * factor)[:, None], offset[:, None]
    for step in range(steps):
        pixel = (chunk * steps + step) * PIXELS + tl.arange(0, PIXELS)
        offsets, inside = tile_of(channel.to(tl.int64), pixel, C, C, S, CHANNELS_LAST)
        value = tl.load(x + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32)  # (CHANNELS, PIXELS)
        h = (value - center) * factor + offset
        if SILU:
            h *= tl.sigmoid(h)
        tl.store(y + b * C * S + offsets, h.to(y.dtype.element_ty), mask=inside)


def group_norm_silu_unsupported(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> str | None:
    """Why these (validated) inputs cannot run, None if they can."""
    for name, tensor in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        if tensor is not None and tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"the Triton kernel takes a float16, bfloat16 or float32 {name}, not {tensor.dtype}"
    if not x.is_contiguous() and not x.movedim(1, -1).is_contiguous():
        return "the Triton kernel needs x contiguous or channels_last: call .contiguous() first"
    if x.shape[1] > MOST_CHANNELS:
        return f"the Triton kernel takes at most {MOST_CHANNELS} channels, not {x.shape[1]}"
    return refuse(x)


def forward_launches(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    y: torch.Tensor,
    statistics: torch.Tensor,
) -> list[Launch]:
    """What `group_norm_silu` launches, in this order, to fill y and statistics."""
    (b, c), (mean, rstd) = x.shape[:2], statistics
    width, (s, _) = c // num_groups, layout_of(x)
    if tile := on_chip(x, width, ON_CHIP):
        args = (x, weight, bias, scale, shift, y, mean, rstd, c, s, num_groups, width, eps)
        options = {**block_of(x, *tile, 16, width), "SILU": activation == "silu"}
        return [Launch(_forward_group, b * num_groups, args, options, resident_of(options))]
    stats, means, deviations, pixels = stats_launch(x)
    merge = (means, deviations, mean, rstd, s, num_groups, width, means.shape[-1], pixels, eps)
    return [
        stats,
        Launch(_merge, b * num_groups, merge, {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}),
        apply_launch(x, num_groups, weight, bias, activation, scale, shift, mean, rstd, y),
    ]


def stats_launch(x: torch.Tensor) -> tuple[Launch, torch.Tensor, torch.Tensor, int]:
    """The first half of the split form, the (B, C, chunks) means and squared deviations it fills, pixels per chunk."""
    b, c = x.shape[:2]
    s, split = layout_of(x)[0], split_of(x)
    chunks = triton.cdiv(s, split.pixels * split.steps)
    means, deviations = torch.empty((2, b, c, chunks), dtype=torch.float32, device=x.device)
    options = block_of(x, split.channels, split.pixels, 32)
    args = (x, means, deviations, c, s, chunks, split.steps)
    launch = Launch(_stats, chunks * triton.cdiv(c, split.channels) * b, args, options, resident_of(options))
    return launch, means, deviations, split.pixels * split.steps


def apply_launch(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    y: torch.Tensor,
) -> Launch:
    """The second half of the split form: fills y from mean and rstd (B, num_groups)."""
    b, c = x.shape[:2]
    s, split = layout_of(x)[0], split_of(x)
    chunks = triton.cdiv(s, split.pixels * split.steps_apply)
    args = (x, weight, bias, scale, shift, mean, rstd, y, c, s, num_groups, per_width_of(c // num_groups), chunks)
    options = {**block_of(x, split.channels, split.pixels, 32), "SILU": activation == "silu"}
    programs = chunks * triton.cdiv(c, split.channels) * b
    return Launch(_apply, programs, (*args, split.steps_apply), options, resident_of(options))


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and its statistics, mean and rstd, (2, B, G) in float32, of validated inputs."""
    weight, bias, scale, shift = (None if t is None else t.contiguous() for t in (weight, bias, scale, shift))
    y = torch.empty_like(x)
    statistics = torch.empty((2, x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    for launch in forward_launches(x, num_groups, weight, bias, eps, activation, scale, shift, y, statistics):
        launch.run()
    return y, statistics


def group_norm_stats_unsupported(x: torch.Tensor, num_groups: int) -> str | None:
    """Why this (validated) input cannot run, None if it can."""
    return group_norm_silu_unsupported(x, num_groups, None, None, 1.0, None, None, None)


def group_norm_stats(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Count, mean and sum of squared deviations, (B, num_groups, 3) in float64; see `ldm_fast.reference`."""
    launch, means, deviations, pixels = stats_launch(x)
    launch.run()
    b, _, chunks = means.shape
    s = layout_of(x)[0]
    # all chunks of a group's channels, joined in float64: a few thousand numbers
    counts = torch.full((chunks,), float(pixels), dtype=torch.float64, device=x.device)
    counts[-1] = s - (chunks - 1) * pixels
    means, deviations = (t.double().reshape(b, num_groups, -1, chunks) for t in (means, deviations))
    total = float(x.shape[1] // num_groups * s)
    mean = (means * counts).sum((2, 3)) / total  # (B, G)
    squares = (deviations + (means - mean[..., None, None]).square() * counts).sum((2, 3))
    return torch.stack([torch.full_like(mean, total), mean, squares], dim=-1)


def group_norm_apply_unsupported(
    x: torch.Tensor,
    stats: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> str | None:
    """Why these (validated) inputs cannot run, None if they can."""
    return group_norm_silu_unsupported(x, num_groups, weight, bias, eps, activation, scale, shift)


def group_norm_apply(
    x: torch.Tensor,
    stats: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> torch.Tensor:
    """`group_norm_silu` of x by the statistics of what x is a part of; see `ldm_fast.reference`."""
    weight, bias, scale = (None if t is None else t.contiguous() for t in (weight, bias, scale))
    y = torch.empty_like(x)
    count, mean, squares = stats.unbind(-1)
    rstd = (squares / count + eps).rsqrt()
    rounded = mean.float().contiguous()
    # What rounding the mean to float32 loses shows where it is far above the deviation: it goes into the shift.
    rest = ((rounded.double() - mean) * rstd).float().repeat_interleave(x.shape[1] // num_groups, dim=1)  # (B, C)
    rest = rest if weight is None else rest * weight.float()
    rest = rest if scale is None else rest * (1.0 + scale.float())
    shift = rest if shift is None else rest + shift.float()
    mean, rstd = rounded, rstd.float()
    apply_launch(x, num_groups, weight, bias, activation, scale, shift, mean, rstd, y).run()
    return y
