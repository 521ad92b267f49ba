"""The backward pass of `group_norm_silu` in Triton, deterministic.

On chip  A group that fits into a program's registers beside its gradient: two reads and one write.
Split    A larger group: `_grad_sums` reads x and grad, `_merge_grads` joins, `_grad_apply` reads both again and writes
         dx.

Layouts and tiles: `group_norm_silu_common`.
"""

import torch
import triton
import triton.language as tl

from . import Launch
from .group_norm_silu_common import (
    GENERAL,
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


@triton.jit
def _silu_gradient(grad, h):
    """grad · silu'(h) = grad · σ(h) (1 + h (1 - σ(h)))"""
    sigmoid = tl.sigmoid(h)
    return grad * sigmoid * (1.0 + h * (1.0 - sigmoid))


@triton.jit(do_not_specialize=GENERAL)
def _backward_group(
    grad, x, weight, bias, scale, shift, mean, rstd, dx, sums, sums_hat, C, S, G, width,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx of one group of one image kept on chip, and its channels' Σ dh and Σ dh · x̂; grid (B · G)."""
    C, S = aligned(C, S, UNIT, CHANNELS_LAST)
    width, _ = aligned(width, S, UNIT, CHANNELS_LAST)
    pid = tl.program_id(0)
    b = (pid // G).to(tl.int64)
    last = (pid % G + 1) * width
    channel = pid % G * width + tl.arange(0, CHANNELS)
    offsets, inside = tile_of(channel, tl.arange(0, PIXELS), last, C, S, CHANNELS_LAST)
    inverse = tl.load(rstd + pid)
    hat = (tl.load(x + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + pid)) * inverse
    dh = tl.load(grad + b * C * S + offsets, mask=inside, other=0.0).to(tl.float32)  # (CHANNELS, PIXELS)
    factor, offset, _ = affine(weight, bias, scale, shift, b * C, channel, channel < last)
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
    C, S = aligned(C, S, UNIT, CHANNELS_LAST)
    pid = tl.program_id(0)
    tiles = tl.cdiv(C, CHANNELS)
    chunk = pid % chunks
    channel = pid // chunks % tiles * CHANNELS + tl.arange(0, CHANNELS)
    b = (pid // chunks // tiles).to(tl.int64)
    group = b * G + group_of(channel, per_width)
    center = tl.load(mean + group, mask=channel < C, other=0.0)[:, None]
    inverse = tl.load(rstd + group, mask=channel < C, other=0.0)[:, None]
    factor, offset, _ = affine(weight, bias, scale, shift, b * C, channel, channel < C)
    total = tl.zeros((CHANNELS, PIXELS), tl.float32)
    total_hat = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for step in range(steps):
        pixel = (chunk * steps + step) * PIXELS + tl.arange(0, PIXELS)
        offsets, inside = tile_of(channel.to(tl.int64), pixel, C, C, S, CHANNELS_LAST)
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
            place, inside = tile_of(channel, start + tl.arange(0, BLOCK), last, C, chunks, False)
            total += tl.load(parts + b * C * chunks + place, mask=inside, other=0.0)
            total_hat += tl.load(parts_hat + b * C * chunks + place, mask=inside, other=0.0)
        sum_, sum_hat = tl.sum(total, 1), tl.sum(total_hat, 1)
        tl.store(sums + b * C + channel, sum_, mask=channel < last)
        tl.store(sums_hat + b * C + channel, sum_hat, mask=channel < last)
        factor, _, _ = affine(weight, None, scale, None, b * C, channel, channel < last)
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
    C, S = aligned(C, S, UNIT, CHANNELS_LAST)
    pid = tl.program_id(0)
    tiles = tl.cdiv(C, CHANNELS)
    chunk = pid % chunks
    channel = pid // chunks % tiles * CHANNELS + tl.arange(0, CHANNELS)
    b = (pid // chunks // tiles).to(tl.int64)
    group = b * G + group_of(channel, per_width)
    center = tl.load(mean + group, mask=channel < C, other=0.0)[:, None]  # (CHANNELS, 1)
    inverse = tl.load(rstd + group, mask=channel < C, other=0.0)[:, None]
    level = tl.load(levels + group, mask=channel < C, other=0.0)[:, None]
    slope = tl.load(slopes + group, mask=channel < C, other=0.0)[:, None]
    factor, offset, _ = affine(weight, bias, scale, shift, b * C, channel, channel < C)
    factor, offset = factor[:, None], offset[:, None]
    for step in range(steps):
        pixel = (chunk * steps + step) * PIXELS + tl.arange(0, PIXELS)
        offsets, inside = tile_of(channel.to(tl.int64), pixel, C, C, S, CHANNELS_LAST)
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
    gain, base, _ = affine(weight, bias, None, None, 0, channel, inside)
    for b in range(B):
        sum_ = tl.load(sums + b * C + channel, mask=inside, other=0.0)
        sum_hat = tl.load(sums_hat + b * C + channel, mask=inside, other=0.0)
        _, _, modulation = affine(None, None, scale, None, b * C, channel, inside)
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
    width, (s, _) = c // num_groups, layout_of(x)
    fusion, silu = {"enable_fp_fusion": True}, {"SILU": activation == "silu"}
    sums, sums_hat = torch.empty((2, b, c), dtype=torch.float32, device=x.device)
    inputs = (grad, x, weight, bias, scale, shift, *statistics)
    if tile := on_chip(x, width, ON_CHIP // 2):
        options = {**block_of(x, *tile, 16, width), **silu}
        args = (*inputs, dx, sums, sums_hat, c, s, num_groups, width)
        launches = [Launch(_backward_group, b * num_groups, args, options, resident_of(options))]
    else:
        split, per_width = split_of(x), per_width_of(width)
        tiles = triton.cdiv(c, split.channels) * b
        chunks, chunks_apply = (triton.cdiv(s, split.pixels * n) for n in (split.steps, split.steps_apply))
        parts, parts_hat = torch.empty((2, b, c, chunks), dtype=torch.float32, device=x.device)
        levels, slopes = torch.empty((2, b, num_groups), dtype=torch.float32, device=x.device)
        add = (*inputs, parts, parts_hat, c, s, num_groups, per_width, chunks, split.steps)
        merge = (parts, parts_hat, weight, scale, sums, sums_hat, levels, slopes, c, s, num_groups, width, chunks)
        apply = (*inputs, levels, slopes, dx, c, s, num_groups, per_width, chunks_apply, split.steps_apply)
        options = {**block_of(x, split.channels, split.pixels, 16), **silu}
        launches = [
            Launch(_grad_sums, chunks * tiles, add, options, resident_of(options)),
            Launch(_merge_grads, b * num_groups, merge, {"CHANNELS": 32, "BLOCK": 32, "num_warps": 4, **fusion}),
            Launch(_grad_apply, chunks_apply * tiles, apply, options, resident_of(options)),
        ]
    if any(gradient is not None for gradient in (dweight, dbias, dscale, dshift)):
        args = (sums, sums_hat, weight, bias, scale, dweight, dbias, dscale, dshift, b, c)
        launches.append(Launch(_grad_parameters, triton.cdiv(c, 64), args, {"BLOCK": 64, "num_warps": 1, **fusion}))
    return launches


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
