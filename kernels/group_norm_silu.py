"""Fused group norm and SiLU in Triton, forward and backward, deterministic.

h = ((x - mean) · rstd · weight + bias) · (1 + scale) + shift;  y = silu(h) or h; mean and rstd of a group in float32

Layout   x is (B, C, S) seen with two strides: contiguous (S, 1) or channels_last (1, C). A tile is CHANNELS × PIXELS;
         which of the two is long decides what is read in a row, so one kernel serves both layouts. weight, bias and the
         modulation are one number per channel: nothing is divided per element.
On chip  A group that fits into a program's registers: one read and one write (backward: two reads and one write).
Split    A larger group: `_stats` reads x and leaves each channel's mean and squared deviation per chunk of pixels,
         `_merge` joins them in fixed order (Chan et al. 1979), `_apply` reads x again and writes y. Any tile may hold
         channels of several groups, so work is split alike for one wide group and for many narrow ones.
         Backward: `_grad_sums` reads x and grad, `_merge_grads` joins, `_grad_apply` reads both again and writes dx.

Deviations are taken from a mean already known, never E[x²] - E[x]²: mean 1000 and deviation 1 keep their digits. How
work is divided depends on C, S and the layout alone, never on B.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import Launch, refuse, unavailable

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

ON_CHIP = 16384  # padded elements of a group that one program keeps; its backward keeps two tensors
TILE = 4096  # elements of a tile of the split form
ROW_BYTES = 128  # least that is read in a row of a channels_last tensor
CHUNKS = 256  # most partial results per channel
SPREAD = 1024  # programs of an image from which on each of them applies several tiles, at most STEPS
STEPS = 8
RESIDENT_WARPS = 16  # that a multiprocessor is meant to hold, each with half a kilobyte or more of x on its way
MOST_CHANNELS = 1 << 20  # for which `_group_of` is exact
# Arguments of which a kernel needs to know nothing in advance: how rows are aligned is in UNIT. So one compiled kernel
# serves every size of image and number of channels that is divided alike.
GENERAL = ("B", "C", "S", "G", "width", "per_width", "chunks", "pixels", "steps")


@triton.jit
def _moments(x, inside, count):
    """Mean and sum of squared deviations of the elements inside a tile, corrected for the rounding of the mean."""
    mean = tl.sum(tl.where(inside, x, 0.0)) / count
    off = tl.where(inside, x - mean, 0.0)
    rest = tl.sum(off) / count
    return mean + rest, tl.sum(off * off) - count * rest * rest


@triton.jit
def _affine(weight, bias, scale, shift, row, channel, inside):
    """Per channel: h = normalised · factor + offset, and 1 + scale.  # (CHANNELS,)

    row is the image's first element of the (B, C) modulation.
    """
    one = tl.where(inside, 1.0, 0.0)
    factor, offset, modulation = one, one - one, one
    if weight is not None:
        factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        modulation = 1.0 + tl.load(scale + row + channel, mask=inside, other=0.0).to(tl.float32)
        factor *= modulation
        offset *= modulation
    if shift is not None:
        offset += tl.load(shift + row + channel, mask=inside, other=0.0).to(tl.float32)
    return factor, offset, modulation


@triton.jit
def _silu_gradient(grad, h):
    """grad · silu'(h) = grad · σ(h) (1 + h (1 - σ(h)))"""
    sigmoid = tl.sigmoid(h)
    return grad * sigmoid * (1.0 + h * (1.0 - sigmoid))


@triton.jit
def _aligned(C, S, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """C and S; the compiler learns that UNIT elements, at most 16 bytes, divide whichever lies in a row."""
    if CHANNELS_LAST:
        C = C // UNIT * UNIT
    else:
        S = S // UNIT * UNIT
    return C, S


@triton.jit
def _tile(channel, pixel, end, C, S, CHANNELS_LAST: tl.constexpr):
    """Offsets of a tile in one image, and which of them exist (channels up to `end`).  # (CHANNELS, PIXELS)

    Offsets have the type of `channel`: 64 bits, or 32, which take fewer registers, where all of an image's fit.
    """
    if CHANNELS_LAST:
        offsets = channel[:, None] + pixel.to(channel.dtype)[None, :] * C
    else:
        offsets = channel[:, None] * S + pixel[None, :]
    return offsets, (channel < end)[:, None] & (pixel < S)[None, :]


@triton.jit
def _group_of(channel, per_width):
    """channel // width as a product; per_width is 2⁴⁰ / width, rounded up."""
    return (channel.to(tl.int64) * per_width) >> 40


@triton.jit(do_not_specialize=GENERAL)
def _forward_group(
    x, weight, bias, scale, shift, y, mean, rstd, C, S, G, width, eps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One group of one image, kept on chip; grid (B · G). Moves x and y once."""
    C, S = _aligned(C, S, UNIT, CHANNELS_LAST)
    width, _ = _aligned(width, S, UNIT, CHANNELS_LAST)
    pid = tl.program_id(0)
    b = (pid // G).to(tl.int64)
    last = (pid % G + 1) * width
    channel = pid % G * width + tl.arange(0, CHANNELS)
    offsets, inside = _tile(channel, tl.arange(0, PIXELS), last, C, S, CHANNELS_LAST)
    value = tl.load(x + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32)  # (CHANNELS, PIXELS)

    count = 1.0 * width * S
    center, deviation = _moments(value, inside, count)
    inverse = tl.rsqrt(deviation / count + eps)
    tl.store(mean + pid, center)
    tl.store(rstd + pid, inverse)

    factor, offset, _ = _affine(weight, bias, scale, shift, b * C, channel, channel < last)
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
    C, S = _aligned(C, S, UNIT, CHANNELS_LAST)
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
        offsets, inside = _tile(channel.to(tl.int64), pixel, C, C, S, CHANNELS_LAST)
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
    C, S = _aligned(C, S, UNIT, CHANNELS_LAST)
    pid = tl.program_id(0)
    tiles = tl.cdiv(C, CHANNELS)
    chunk = pid % chunks
    channel = pid // chunks % tiles * CHANNELS + tl.arange(0, CHANNELS)
    b = (pid // chunks // tiles).to(tl.int64)
    group = b * G + _group_of(channel, per_width)
    center = tl.load(mean + group, mask=channel < C, other=0.0)[:, None]  # (CHANNELS, 1)
    inverse = tl.load(rstd + group, mask=channel < C, other=0.0)
    factor, offset, _ = _affine(weight, bias, scale, shift, b * C, channel, channel < C)
    factor, offset = (inverse * factor)[:, None], offset[:, None]
    for step in range(steps):
        pixel = (chunk * steps + step) * PIXELS + tl.arange(0, PIXELS)
        offsets, inside = _tile(channel.to(tl.int64), pixel, C, C, S, CHANNELS_LAST)
        value = tl.load(x + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32)  # (CHANNELS, PIXELS)
        h = (value - center) * factor + offset
        if SILU:
            h *= tl.sigmoid(h)
        tl.store(y + b * C * S + offsets, h.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=GENERAL)
def _backward_group(
    grad, x, weight, bias, scale, shift, mean, rstd, dx, sums, sums_hat, C, S, G, width,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx of one group of one image kept on chip, and its channels' Σ dh and Σ dh · x̂; grid (B · G)."""
    C, S = _aligned(C, S, UNIT, CHANNELS_LAST)
    width, _ = _aligned(width, S, UNIT, CHANNELS_LAST)
    pid = tl.program_id(0)
    b = (pid // G).to(tl.int64)
    last = (pid % G + 1) * width
    channel = pid % G * width + tl.arange(0, CHANNELS)
    offsets, inside = _tile(channel, tl.arange(0, PIXELS), last, C, S, CHANNELS_LAST)
    inverse = tl.load(rstd + pid)
    hat = (tl.load(x + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + pid)) * inverse
    dh = tl.load(grad + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32)  # (CHANNELS, PIXELS)
    factor, offset, _ = _affine(weight, bias, scale, shift, b * C, channel, channel < last)
    if SILU:
        dh = _silu_gradient(dh, hat * factor[:, None] + offset[:, None])

    total = tl.sum(dh, 1)  # (CHANNELS,)
    total_hat = tl.sum(dh * hat, 1)
    tl.store(sums + b * C + channel, total, mask=channel < last)
    tl.store(sums_hat + b * C + channel, total_hat, mask=channel < last)
    count = 1.0 * width * S
    level = tl.sum(factor * total, 0) / count
    slope = tl.sum(factor * total_hat, 0) / count
    result = inverse * (dh * factor[:, None] - level - hat * slope)
    tl.store(dx + b * C * S + offsets, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=GENERAL)
def _grad_sums(
    grad, x, weight, bias, scale, shift, mean, rstd, parts, parts_hat, C, S, G, per_width, chunks, steps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Σ dh and Σ dh · x̂ of CHANNELS channels over steps · PIXELS pixels; grid (chunks · channel tiles · B)."""
    C, S = _aligned(C, S, UNIT, CHANNELS_LAST)
    pid = tl.program_id(0)
    tiles = tl.cdiv(C, CHANNELS)
    chunk = pid % chunks
    channel = pid // chunks % tiles * CHANNELS + tl.arange(0, CHANNELS)
    b = (pid // chunks // tiles).to(tl.int64)
    group = b * G + _group_of(channel, per_width)
    center = tl.load(mean + group, mask=channel < C, other=0.0)[:, None]
    inverse = tl.load(rstd + group, mask=channel < C, other=0.0)[:, None]
    factor, offset, _ = _affine(weight, bias, scale, shift, b * C, channel, channel < C)
    total = tl.zeros((CHANNELS, PIXELS), tl.float32)
    total_hat = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for step in range(steps):
        pixel = (chunk * steps + step) * PIXELS + tl.arange(0, PIXELS)
        offsets, inside = _tile(channel.to(tl.int64), pixel, C, C, S, CHANNELS_LAST)
        hat = (tl.load(x + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32) - center) * inverse
        dh = tl.load(grad + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            dh = _silu_gradient(dh, hat * factor[:, None] + offset[:, None])
        total += dh
        total_hat += dh * hat
    place = (b * C + channel) * chunks + chunk
    tl.store(parts + place, tl.sum(total, 1), mask=channel < C)
    tl.store(parts_hat + place, tl.sum(total_hat, 1), mask=channel < C)


@triton.jit(do_not_specialize=GENERAL)
def _merge_grads(
    parts, parts_hat, weight, scale, sums, sums_hat, levels, slopes, C, S, G, width, chunks,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ dh and Σ dh · x̂ of one group's channels, and their weighted means over the group; grid (B · G)."""
    pid = tl.program_id(0)
    b = (pid // G).to(tl.int64)
    last = (pid % G + 1) * width
    level = tl.zeros((CHANNELS,), tl.float32)
    slope = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, width, CHANNELS):
        channel = pid % G * width + first + tl.arange(0, CHANNELS)
        total = tl.zeros((CHANNELS, BLOCK), tl.float32)
        total_hat = tl.zeros((CHANNELS, BLOCK), tl.float32)
        for start in range(0, chunks, BLOCK):
            place, inside = _tile(channel, start + tl.arange(0, BLOCK), last, C, chunks, False)
            total += tl.load(parts + b * C * chunks + place, mask=inside, other=0.0)
            total_hat += tl.load(parts_hat + b * C * chunks + place, mask=inside, other=0.0)
        sum_, sum_hat = tl.sum(total, 1), tl.sum(total_hat, 1)
        tl.store(sums + b * C + channel, sum_, mask=channel < last)
        tl.store(sums_hat + b * C + channel, sum_hat, mask=channel < last)
        factor, _, _ = _affine(weight, None, scale, None, b * C, channel, channel < last)
        level += factor * sum_
        slope += factor * sum_hat
    count = 1.0 * width * S
    tl.store(levels + pid, tl.sum(level, 0) / count)
    tl.store(slopes + pid, tl.sum(slope, 0) / count)


@triton.jit(do_not_specialize=GENERAL)
def _grad_apply(
    grad, x, weight, bias, scale, shift, mean, rstd, levels, slopes, dx, C, S, G, per_width, chunks, steps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx of CHANNELS channels and steps · PIXELS pixels from known sums; grid (chunks · channel tiles · B).

    Moves grad, x and dx once.
    """
    C, S = _aligned(C, S, UNIT, CHANNELS_LAST)
    pid = tl.program_id(0)
    tiles = tl.cdiv(C, CHANNELS)
    chunk = pid % chunks
    channel = pid // chunks % tiles * CHANNELS + tl.arange(0, CHANNELS)
    b = (pid // chunks // tiles).to(tl.int64)
    group = b * G + _group_of(channel, per_width)
    center = tl.load(mean + group, mask=channel < C, other=0.0)[:, None]  # (CHANNELS, 1)
    inverse = tl.load(rstd + group, mask=channel < C, other=0.0)[:, None]
    level = tl.load(levels + group, mask=channel < C, other=0.0)[:, None]
    slope = tl.load(slopes + group, mask=channel < C, other=0.0)[:, None]
    factor, offset, _ = _affine(weight, bias, scale, shift, b * C, channel, channel < C)
    factor, offset = factor[:, None], offset[:, None]
    for step in range(steps):
        pixel = (chunk * steps + step) * PIXELS + tl.arange(0, PIXELS)
        offsets, inside = _tile(channel.to(tl.int64), pixel, C, C, S, CHANNELS_LAST)
        value = tl.load(x + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32)  # (CHANNELS, PIXELS)
        dh = tl.load(grad + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32)
        hat = (value - center) * inverse
        if SILU:
            dh = _silu_gradient(dh, hat * factor + offset)
        result = inverse * (dh * factor - level - hat * slope)
        tl.store(dx + b * C * S + offsets, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=GENERAL)
def _grad_parameters(
    sums, sums_hat, weight, bias, scale, dweight, dbias, dscale, dshift, B, C, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients of BLOCK channels' weight, bias, scale and shift, images added in order; grid (channel blocks)."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    total = tl.zeros((BLOCK,), tl.float32)
    total_hat = tl.zeros((BLOCK,), tl.float32)
    gain, base, _ = _affine(weight, bias, None, None, 0, channel, inside)
    for b in range(B):
        sum_ = tl.load(sums + b * C + channel, mask=inside, other=0.0)
        sum_hat = tl.load(sums_hat + b * C + channel, mask=inside, other=0.0)
        _, _, modulation = _affine(None, None, scale, None, b * C, channel, inside)
        total += sum_ * modulation
        total_hat += sum_hat * modulation
        if dscale is not None:
            change = gain * sum_hat + base * sum_
            tl.store(dscale + b * C + channel, change.to(dscale.dtype.element_ty), mask=inside)
        if dshift is not None:
            tl.store(dshift + b * C + channel, sum_.to(dshift.dtype.element_ty), mask=inside)
    if dweight is not None:
        tl.store(dweight + channel, total_hat.to(dweight.dtype.element_ty), mask=inside)
    if dbias is not None:
        tl.store(dbias + channel, total.to(dbias.dtype.element_ty), mask=inside)


def _layout(x: torch.Tensor) -> tuple[int, bool]:
    """S, and whether channels are what lies in a row."""
    pixels = x[0, 0].numel()
    return pixels, pixels == 1 or not x.is_contiguous()


def _unit(x: torch.Tensor, width: int = 0) -> dict[str, Any]:
    """How many elements, at most 16 bytes, divide a row, and each group's part of it if groups have programs."""
    pixels, channels_last = _layout(x)
    row = math.gcd(x.shape[1], width) if channels_last else pixels
    return {"UNIT": math.gcd(16 // x.element_size(), row), "CHANNELS_LAST": channels_last}


def _on_chip(x: torch.Tensor, width: int, limit: int) -> tuple[int, int] | None:
    """The tile that holds a group, or None where the group is split."""
    pixels, channels_last = _layout(x)
    tile = triton.next_power_of_2(width), triton.next_power_of_2(pixels)
    # a narrow group of a channels_last tensor would be read in crumbs of a few bytes per pixel
    crumbs = channels_last and pixels > 1 and width * x.element_size() < ROW_BYTES // 2
    far = x[0].numel() >= 1 << 31  # offsets on chip have 32 bits
    return None if tile[0] * tile[1] > limit or crumbs or far else tile


class _Split(NamedTuple):
    """How a group too large for a program is divided; a chunk of pixels has `steps` tiles."""

    channels: int  # of a tile
    pixels: int
    steps: int  # that keep the partial results of a channel below CHUNKS
    steps_apply: int


def _split(x: torch.Tensor) -> _Split:
    pixels, channels_last = _layout(x)
    if channels_last:
        channel_tile = min(triton.next_power_of_2(x.shape[1]), ROW_BYTES // x.element_size())
        pixel_tile = min(triton.next_power_of_2(pixels), TILE // channel_tile)
    else:
        pixel_tile = min(triton.next_power_of_2(pixels), TILE // 4)
        channel_tile = min(triton.next_power_of_2(x.shape[1]), TILE // pixel_tile)
    along = triton.cdiv(pixels, pixel_tile)
    tiles = along * triton.cdiv(x.shape[1], channel_tile)
    return _Split(channel_tile, pixel_tile, triton.cdiv(along, CHUNKS), max(1, min(STEPS, tiles // SPREAD)))


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
    width, (s, _) = c // num_groups, _layout(x)
    if tile := _on_chip(x, width, ON_CHIP):
        args = (x, weight, bias, scale, shift, y, mean, rstd, c, s, num_groups, width, eps)
        options = {**_block(x, *tile, 16, width), "SILU": activation == "silu"}
        return [Launch(_forward_group, b * num_groups, args, options, _resident(options))]
    stats, means, deviations, pixels = stats_launch(x)
    merge = (means, deviations, mean, rstd, s, num_groups, width, means.shape[-1], pixels, eps)
    return [
        stats,
        Launch(_merge, b * num_groups, merge, {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}),
        apply_launch(x, num_groups, weight, bias, activation, scale, shift, mean, rstd, y),
    ]


def _block(x: torch.Tensor, channels: int, pixels: int, elements: int, width: int = 0) -> dict[str, Any]:
    """A tile, and warps that give a thread about `elements` elements of it, half as many where each has an address."""
    unit = _unit(x, width)
    if unit["UNIT"] * x.element_size() < 16:
        elements //= 2
    warps = max(1, min(16, channels * pixels // (32 * elements)))
    # as many registers as RESIDENT_WARPS leave: left alone, the compiler for sm_100 takes fewer, and spills
    options = {"num_warps": warps, "maxnreg": 65536 // (32 * RESIDENT_WARPS), "enable_fp_fusion": True}
    return {"CHANNELS": channels, "PIXELS": pixels, **unit, **options}


def _resident(options: dict[str, Any]) -> int:
    """Programs of these options that a multiprocessor is meant to hold."""
    return max(1, RESIDENT_WARPS // options["num_warps"])


def stats_launch(x: torch.Tensor) -> tuple[Launch, torch.Tensor, torch.Tensor, int]:
    """The first half of the split form, the (B, C, chunks) means and squared deviations it fills, pixels per chunk."""
    b, c = x.shape[:2]
    s, split = _layout(x)[0], _split(x)
    chunks = triton.cdiv(s, split.pixels * split.steps)
    means, deviations = torch.empty((2, b, c, chunks), dtype=torch.float32, device=x.device)
    options = _block(x, split.channels, split.pixels, 32)
    args = (x, means, deviations, c, s, chunks, split.steps)
    launch = Launch(_stats, chunks * triton.cdiv(c, split.channels) * b, args, options, _resident(options))
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
    s, split = _layout(x)[0], _split(x)
    chunks = triton.cdiv(s, split.pixels * split.steps_apply)
    args = (x, weight, bias, scale, shift, mean, rstd, y, c, s, num_groups, _per_width(c // num_groups), chunks)
    options = {**_block(x, split.channels, split.pixels, 32), "SILU": activation == "silu"}
    programs = chunks * triton.cdiv(c, split.channels) * b
    return Launch(_apply, programs, (*args, split.steps_apply), options, _resident(options))


def _per_width(width: int) -> int:
    """What `_group_of` multiplies by."""
    return triton.cdiv(1 << 40, width)


def backward_launches(
    grad: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    statistics: torch.Tensor,
    dx: torch.Tensor,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    dscale: torch.Tensor | None,
    dshift: torch.Tensor | None,
) -> list[Launch]:
    """What `group_norm_silu_backward` launches, in this order, to fill dx and the gradients that are not None."""
    b, c = x.shape[:2]
    width, (s, _) = c // num_groups, _layout(x)
    fusion, silu = {"enable_fp_fusion": True}, {"SILU": activation == "silu"}
    sums, sums_hat = torch.empty((2, b, c), dtype=torch.float32, device=x.device)
    inputs = (grad, x, weight, bias, scale, shift, *statistics)
    if tile := _on_chip(x, width, ON_CHIP // 2):
        options = {**_block(x, *tile, 16, width), **silu}
        args = (*inputs, dx, sums, sums_hat, c, s, num_groups, width)
        launches = [Launch(_backward_group, b * num_groups, args, options, _resident(options))]
    else:
        split, per_width = _split(x), _per_width(width)
        tiles = triton.cdiv(c, split.channels) * b
        chunks, chunks_apply = (triton.cdiv(s, split.pixels * n) for n in (split.steps, split.steps_apply))
        parts, parts_hat = torch.empty((2, b, c, chunks), dtype=torch.float32, device=x.device)
        levels, slopes = torch.empty((2, b, num_groups), dtype=torch.float32, device=x.device)
        add = (*inputs, parts, parts_hat, c, s, num_groups, per_width, chunks, split.steps)
        merge = (parts, parts_hat, weight, scale, sums, sums_hat, levels, slopes, c, s, num_groups, width, chunks)
        apply = (*inputs, levels, slopes, dx, c, s, num_groups, per_width, chunks_apply, split.steps_apply)
        options = {**_block(x, split.channels, split.pixels, 16), **silu}
        launches = [
            Launch(_grad_sums, chunks * tiles, add, options, _resident(options)),
            Launch(_merge_grads, b * num_groups, merge, {"CHANNELS": 32, "BLOCK": 32, "num_warps": 4, **fusion}),
            Launch(_grad_apply, chunks_apply * tiles, apply, options, _resident(options)),
        ]
    if any(gradient is not None for gradient in (dweight, dbias, dscale, dshift)):
        args = (sums, sums_hat, weight, bias, scale, dweight, dbias, dscale, dshift, b, c)
        launches.append(Launch(_grad_parameters, triton.cdiv(c, 64), args, {"BLOCK": 64, "num_warps": 1, **fusion}))
    return launches


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
    s = _layout(x)[0]
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


def group_norm_silu_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    statistics: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias, dscale, dshift), None for what was None, from what the forward returned."""
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    weight, bias, scale, shift = (None if t is None else t.contiguous() for t in (weight, bias, scale, shift))
    dx, *gradients = (None if t is None else torch.empty_like(t) for t in (x, weight, bias, scale, shift))
    for launch in backward_launches(
        grad, x, num_groups, weight, bias, activation, scale, shift, statistics, dx, *gradients
    ):
        launch.run()
    return dx, *gradients
