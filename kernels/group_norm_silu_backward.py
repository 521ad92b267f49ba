"""The backward pass of `group_norm_silu` in Triton, deterministic.

dh = grad · silu'(h) or grad;  dx = rstd · (dh · factor - mean(dh · factor) - x̂ · mean(dh · factor · x̂)), means over a
group; a channel's Σ dh and Σ dh · x̂ give the gradients of its weight, bias, scale and shift

On chip  A group that fits into a program's registers beside its gradient: two reads and one write.
Split    A larger group: `_grad_sums` reads x and grad, `_merge_grads` joins, `_grad_apply` reads both again and writes
         dx.

Layouts and tiles: `group_norm_silu_common`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_fast.ops.arguments import Norm

from . import Launch, cdiv
from .group_norm_silu_common import (
    GENERAL,
    ON_CHIP,
    affine,
    group_launch,
    known_groups,
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
    tile_of,
    whole_group,
    with_contiguous_vectors,
)


@triton.jit
def _hat_and_gradient(x, grad, offsets, inside, center, inverse, factor, offset, SILU: tl.constexpr):
    """x̂ and dh = grad · silu'(h) = grad · σ(h) (1 + h (1 - σ(h))) of a tile.  # (CHANNELS, PIXELS)"""
    hat = (load(x, offsets, inside) - center) * inverse
    dh = load(grad, offsets, inside)
    if SILU:
        h = hat * factor + offset
        sigmoid = tl.sigmoid(h)
        dh = dh * sigmoid * (1.0 + h * (1.0 - sigmoid))
    return hat, dh


@triton.jit(do_not_specialize=GENERAL)
def _backward_group(
    grad, x, weight, bias, scale, shift, mean, rstd, dx, sums, sums_hat, C, S, G, width,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx of one group of one image kept on chip, and its channels' Σ dh and Σ dh · x̂; grid (B · G)."""
    pid = tl.program_id(0)
    row, image, channel, exists, offsets, inside, count = whole_group(
        pid, C, S, G, width, CHANNELS, PIXELS, UNIT, CHANNELS_LAST
    )
    center, inverse = tl.load(mean + pid), tl.load(rstd + pid)
    factor, offset, _ = affine(weight, bias, scale, shift, row, channel, exists)
    hat, dh = _hat_and_gradient(
        x + image, grad + image, offsets, inside, center, inverse, factor[:, None], offset[:, None], SILU
    )

    total = tl.sum(dh, 1)  # (CHANNELS,)
    total_hat = tl.sum(dh * hat, 1)
    tl.store(sums + row + channel, total, mask=exists)
    tl.store(sums_hat + row + channel, total_hat, mask=exists)
    level = tl.sum(factor * total, 0) / count
    slope = tl.sum(factor * total_hat, 0) / count
    store(dx + image, offsets, inverse * (dh * factor[:, None] - level - hat * slope), inside)


@triton.jit(do_not_specialize=GENERAL)
def _grad_sums(
    grad, x, weight, bias, scale, shift, mean, rstd, parts, parts_hat, C, S, G, per_width, chunks, steps,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Σ dh and Σ dh · x̂ of CHANNELS channels over steps · PIXELS pixels; grid (chunks · channel tiles · B)."""
    C, S, b, channel, exists, chunk = some_channels(tl.program_id(0), C, S, chunks, CHANNELS, UNIT, CHANNELS_LAST)
    _, center, inverse, factor, offset = known_groups(
        mean, rstd, weight, bias, scale, shift, b, channel, exists, C, G, per_width
    )
    center, inverse, factor, offset = center[:, None], inverse[:, None], factor[:, None], offset[:, None]
    image = b * C * S
    total = tl.zeros((CHANNELS, PIXELS), tl.float32)
    total_hat = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for step in range(steps):
        offsets, inside = some_pixels(chunk * steps + step, channel, C, S, PIXELS, CHANNELS_LAST)
        hat, dh = _hat_and_gradient(x + image, grad + image, offsets, inside, center, inverse, factor, offset, SILU)
        total += dh
        total_hat += dh * hat
    place = (b * C + channel) * chunks + chunk
    tl.store(parts + place, tl.sum(total, 1), mask=exists)
    tl.store(parts_hat + place, tl.sum(total_hat, 1), mask=exists)


@triton.jit(do_not_specialize=GENERAL)
def _merge_grads(
    parts, parts_hat, weight, scale, sums, sums_hat, levels, slopes, C, S, G, width, chunks,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ dh and Σ dh · x̂ of one group's channels, and their weighted means over the group; grid (B · G)."""
    pid = tl.program_id(0)
    row = (pid // G).to(tl.int64) * C
    last = (pid % G + 1) * width
    level = tl.zeros((CHANNELS,), tl.float32)
    slope = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, width, CHANNELS):
        channel = pid % G * width + first + tl.arange(0, CHANNELS)
        total = tl.zeros((CHANNELS, BLOCK), tl.float32)
        total_hat = tl.zeros((CHANNELS, BLOCK), tl.float32)
        for start in range(0, chunks, BLOCK):
            place, inside = tile_of(channel, start + tl.arange(0, BLOCK), last, C, chunks, False)
            total += load(parts + row * chunks, place, inside)
            total_hat += load(parts_hat + row * chunks, place, inside)
        sum_, sum_hat = tl.sum(total, 1), tl.sum(total_hat, 1)
        tl.store(sums + row + channel, sum_, mask=channel < last)
        tl.store(sums_hat + row + channel, sum_hat, mask=channel < last)
        factor, _, _ = affine(weight, None, scale, None, row, channel, channel < last)
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
    C, S, b, channel, exists, chunk = some_channels(tl.program_id(0), C, S, chunks, CHANNELS, UNIT, CHANNELS_LAST)
    group, center, inverse, factor, offset = known_groups(
        mean, rstd, weight, bias, scale, shift, b, channel, exists, C, G, per_width
    )
    center, inverse, factor, offset = center[:, None], inverse[:, None], factor[:, None], offset[:, None]
    level, slope = load(levels, group, exists)[:, None], load(slopes, group, exists)[:, None]
    image = b * C * S
    for step in range(steps):
        offsets, inside = some_pixels(chunk * steps + step, channel, C, S, PIXELS, CHANNELS_LAST)
        hat, dh = _hat_and_gradient(x + image, grad + image, offsets, inside, center, inverse, factor, offset, SILU)
        store(dx + image, offsets, inverse * (dh * factor - level - hat * slope), inside)


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
        sum_, sum_hat = load(sums + b * C, channel, inside), load(sums_hat + b * C, channel, inside)
        _, _, modulation = affine(None, None, scale, None, b * C, channel, inside)
        total += sum_ * modulation
        total_hat += sum_hat * modulation
        if dscale is not None:
            store(dscale + b * C, channel, gain * sum_hat + base * sum_, inside)
        if dshift is not None:
            store(dshift + b * C, channel, sum_, inside)
    if dweight is not None:
        store(dweight, channel, total_hat, inside)
    if dbias is not None:
        store(dbias, channel, total, inside)


# of x, weight, bias, scale and shift; None if there is no such tensor
Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def backward_launches(grad: Tensor, norm: Norm, statistics: Tensor, gradients: Gradients) -> list[Launch]:
    """What `group_norm_silu_backward` launches, in this order, to fill the gradients that are not None."""
    x, (b, c), groups = norm.x, norm.x.shape[:2], norm.num_groups
    dx, *of_vectors = gradients
    inputs = (grad, x, *norm.vectors, *statistics)
    sums = torch.empty((2, b, c), dtype=torch.float32, device=x.device)
    if tile := on_chip(x, norm.width, ON_CHIP // 2):
        launches = [group_launch(_backward_group, norm, tile, (*inputs, dx, *sums))]
    else:
        split, parts, silu = split_of(x), partial_results(x), norm.activation == "silu"
        means = torch.empty((2, b, groups), dtype=torch.float32, device=x.device)
        add = (*inputs, *parts, *sizes_of(norm), per_width_of(norm))
        merge = (*parts, norm.weight, norm.scale, *sums, *means, *sizes_of(norm), norm.width, parts.shape[-1])
        apply = (*inputs, *means, dx, *sizes_of(norm), per_width_of(norm))
        launches = [
            split_launch(_grad_sums, x, add, split.steps, 16, SILU=silu),
            Launch(_merge_grads, b * groups, merge, {"CHANNELS": 32, "BLOCK": 32, "num_warps": 4}),
            split_launch(_grad_apply, x, apply, split.steps_apply, 16, SILU=silu),
        ]
    if any(gradient is not None for gradient in of_vectors):
        args = (*sums, norm.weight, norm.bias, norm.scale, *of_vectors, b, c)
        launches.append(Launch(_grad_parameters, cdiv(c, 64), args, {"BLOCK": 64, "num_warps": 1}))
    return launches


def group_norm_silu_backward(grad: Tensor, norm: Norm, statistics: Tensor) -> Gradients:
    """(dx, dweight, dbias, dscale, dshift), None for what was None, from what the forward returned."""
    x, norm = norm.x, with_contiguous_vectors(norm)
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    weight, bias, scale, shift = (None if t is None else torch.empty_like(t) for t in norm.vectors)
    gradients = torch.empty_like(x), weight, bias, scale, shift
    for launch in backward_launches(grad, norm, statistics, gradients):
        launch.run()
    return gradients
