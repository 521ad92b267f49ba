"""What the forward and backward kernels of group norm share: tiles, what differs per channel, how work is divided.

Layout   x is (B, C, S) seen with two strides: contiguous (S, 1) or channels_last (1, C). A tile is CHANNELS × PIXELS.
         Its longer side is what is read in a row, so one kernel serves both layouts. weight, bias and the modulation
         are one number per channel: nothing is divided per element.
On chip  A group that fits into the registers of one program has a program of its own: x is read once instead of twice.
Split    A larger group is divided into tiles of channels and chunks of pixels. Any tile may hold channels of several
         groups, so one wide group is split in the same way as many narrow ones. Small groups of a channels_last tensor
         are split, too, if on chip they would be read in crumbs: 10 channels of float16 are 20 bytes per pixel, and
         none of their 16 loads has 128 bits; split, all 4 do.

How work is divided depends on C, S and the layout alone, never on B: an image has the same bits in any batch.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_fast.ops.arguments import Norm

from . import Launch, cdiv, next_power_of_2

ON_CHIP = 16384  # padded elements of a group that one program keeps; its backward keeps two tensors
TILE = 4096  # elements of a tile of the split form
ROW_BYTES = 128  # the least that is read in a row of a channels_last tensor
CHUNKS = 256  # the most partial results per channel
# An image of more than SPREAD tiles is normalised by programs of several tiles each, at most STEPS: a fourth to a third
# of `_apply`'s instructions stand before its loop over tiles.
SPREAD, STEPS = 1024, 8
RESIDENT_WARPS = 16  # that a multiprocessor is meant to hold, each waiting for half a kilobyte of x or more
MOST_CHANNELS = 1 << 20  # for which the division in `known_groups` is exact
# Arguments that a kernel is not specialised for: UNIT says how rows are aligned. So one compiled kernel serves every
# size of image and number of channels that is divided in the same way.
GENERAL = ("B", "C", "S", "G", "width", "per_width", "chunks", "pixels", "steps")


@triton.jit
def load(ptr, offsets, inside):
    """A tile as float32, zero where it does not exist."""
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, offsets, value, inside):
    """Write a tile, rounded to the type of the tensor."""
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def affine(weight, bias, scale, shift, row, channel, inside):
    """Per channel: h = normalised · factor + offset, and 1 + scale.  # (CHANNELS,)

    row is the image's first element of the (B, C) modulation.
    """
    one = tl.where(inside, 1.0, 0.0)
    factor, offset, modulation = one, one - one, one
    if weight is not None:
        factor = load(weight, channel, inside)
    if bias is not None:
        offset = load(bias, channel, inside)
    if scale is not None:
        modulation = 1.0 + load(scale + row, channel, inside)
        factor *= modulation
        offset *= modulation
    if shift is not None:
        offset += load(shift + row, channel, inside)
    return factor, offset, modulation


@triton.jit
def aligned(C, S, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """C and S; the compiler learns that UNIT elements, at most 16 bytes, divide whichever of them is a row."""
    if CHANNELS_LAST:
        C = C // UNIT * UNIT
    else:
        S = S // UNIT * UNIT
    return C, S


@triton.jit
def tile_of(channel, pixel, end, C, S, CHANNELS_LAST: tl.constexpr):
    """Offsets of a tile in one image, and which of them exist (channels up to `end`).  # (CHANNELS, PIXELS)

    Offsets have the type of `channel`: 64 bits, or 32, which take fewer registers, if all offsets in an image fit.
    """
    if CHANNELS_LAST:
        offsets = channel[:, None] + pixel.to(channel.dtype)[None, :] * C
    else:
        offsets = channel[:, None] * S + pixel[None, :]
    return offsets, (channel < end)[:, None] & (pixel < S)[None, :]


@triton.jit
def whole_group(
    pid, C, S, G, width,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The tile of one group, the pid-th of B · G.

    The group's image: its first number in a (B, C) tensor, and its first element in x. The channels, and which of them
    exist. Offsets of the tile in the image, and which of them exist. The number of elements of the group.
    """
    C, S = aligned(C, S, UNIT, CHANNELS_LAST)
    width, _ = aligned(width, S, UNIT, CHANNELS_LAST)
    row = (pid // G).to(tl.int64) * C
    last = (pid % G + 1) * width
    channel = pid % G * width + tl.arange(0, CHANNELS)
    offsets, inside = tile_of(channel, tl.arange(0, PIXELS), last, C, S, CHANNELS_LAST)
    return row, row * S, channel, channel < last, offsets, inside, 1.0 * width * S


@triton.jit
def some_channels(pid, C, S, chunks, CHANNELS: tl.constexpr, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The work of one program of the split form, the pid-th of chunks · channel tiles · B.

    C and S as `aligned` gives them, the image, the channels, which of them exist, and the chunk of pixels.
    """
    C, S = aligned(C, S, UNIT, CHANNELS_LAST)
    tiles = tl.cdiv(C, CHANNELS)
    channel = pid // chunks % tiles * CHANNELS + tl.arange(0, CHANNELS)
    return C, S, (pid // chunks // tiles).to(tl.int64), channel, channel < C, pid % chunks


@triton.jit
def some_pixels(step, channel, C, S, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets of these channels' step-th tile in their image, and which of them exist.  # (CHANNELS, PIXELS)"""
    return tile_of(channel.to(tl.int64), step * PIXELS + tl.arange(0, PIXELS), C, C, S, CHANNELS_LAST)


@triton.jit
def known_groups(mean, rstd, weight, bias, scale, shift, b, channel, exists, C, G, per_width):
    """The index of each channel's group, and its mean, rstd, factor and offset.  # (CHANNELS,)

    channel // width is a product: per_width is 2⁴⁰ / width, rounded up.
    """
    group = b * G + ((channel.to(tl.int64) * per_width) >> 40)
    center, inverse = load(mean, group, exists), load(rstd, group, exists)
    factor, offset, _ = affine(weight, bias, scale, shift, b * C, channel, exists)
    return group, center, inverse, factor, offset


def sizes_of(norm: Norm) -> tuple[int, int, int]:
    """C, S and G, as kernels take them."""
    return norm.x.shape[1], layout_of(norm.x)[0], norm.num_groups


def per_width_of(norm: Norm) -> int:
    """What `known_groups` multiplies by, exact for MOST_CHANNELS."""
    return cdiv(1 << 40, norm.width)


def with_contiguous_vectors(norm: Norm) -> Norm:
    """The same with contiguous weight, bias, scale and shift."""
    weight, bias, scale, shift = (None if vector is None else vector.contiguous() for vector in norm.vectors)
    return norm._replace(weight=weight, bias=bias, scale=scale, shift=shift)


def layout_of(x: Tensor) -> tuple[int, bool]:
    """S, and whether the channels of a pixel, not the pixels of a channel, are a row."""
    pixels = math.prod(x.shape[2:])
    return pixels, pixels == 1 or not x.is_contiguous()


def on_chip(x: Tensor, width: int, limit: int) -> tuple[int, int] | None:
    """The tile that holds a group of `width` channels in `limit` elements; None if the group is split."""
    pixels, channels_last = layout_of(x)
    tile = next_power_of_2(width), next_power_of_2(pixels)
    crumbs = channels_last and pixels > 1 and width * x.element_size() < ROW_BYTES // 2
    far = x.shape[1] * pixels >= 1 << 31  # offsets on chip have 32 bits
    return None if tile[0] * tile[1] > limit or crumbs or far else tile


class Split(NamedTuple):
    """How groups too large for a program are divided; a chunk of pixels has `steps` tiles."""

    channels: int  # of a tile
    pixels: int
    steps: int  # that keep the partial results of a channel below CHUNKS
    steps_apply: int

    @property
    def chunk(self) -> int:
        """Pixels of one partial result."""
        return self.pixels * self.steps


def split_of(x: Tensor) -> Split:
    """How x is divided if its groups do not fit into a program."""
    pixels, channels_last = layout_of(x)
    if channels_last:
        channel_tile = min(next_power_of_2(x.shape[1]), ROW_BYTES // x.element_size())
        pixel_tile = min(next_power_of_2(pixels), TILE // channel_tile)
    else:
        pixel_tile = min(next_power_of_2(pixels), TILE // 4)
        channel_tile = min(next_power_of_2(x.shape[1]), TILE // pixel_tile)
    along = cdiv(pixels, pixel_tile)
    tiles = along * cdiv(x.shape[1], channel_tile)
    return Split(channel_tile, pixel_tile, cdiv(along, CHUNKS), max(1, min(STEPS, tiles // SPREAD)))


def partial_results(x: Tensor) -> Tensor:
    """Room for two float32 numbers per channel and chunk of pixels of the split form.  # (2, B, C, chunks)"""
    chunks = cdiv(layout_of(x)[0], split_of(x).chunk)
    return torch.empty((2, *x.shape[:2], chunks), dtype=torch.float32, device=x.device)


def tiled(
    kernel: Any, programs: int, args: tuple[Any, ...], x: Tensor, tile: tuple[int, int], width: int,
    elements: int, **constants: Any,
) -> Launch:  # fmt: skip
    """A launch of programs that have a tile of x each, and about `elements` elements of it for each thread.

    Tiles begin at multiples of `width` channels. Threads have half as many elements if each needs its own address.
    """
    pixels, channels_last = layout_of(x)
    unit = math.gcd(16 // x.element_size(), width if channels_last else pixels)
    if unit * x.element_size() < 16:
        elements //= 2
    warps = max(1, min(16, tile[0] * tile[1] // (32 * elements)))
    options = {"CHANNELS": tile[0], "PIXELS": tile[1], "UNIT": unit, "CHANNELS_LAST": channels_last, **constants}
    # as many registers as RESIDENT_WARPS leave: left alone, the compiler for sm_100 takes fewer, and spills
    options |= {"num_warps": warps, "maxnreg": 65536 // (32 * RESIDENT_WARPS)}
    return Launch(kernel, programs, args, options, max(1, RESIDENT_WARPS // warps))


def group_launch(kernel: Any, norm: Norm, tile: tuple[int, int], args: tuple[Any, ...], *rest: Any) -> Launch:
    """`kernel` for groups on chip, one to a program; the sizes stand between `args` and `rest`."""
    args = (*args, *sizes_of(norm), norm.width, *rest)
    programs, silu = norm.x.shape[0] * norm.num_groups, norm.activation == "silu"
    return tiled(kernel, programs, args, norm.x, tile, norm.width, 16, SILU=silu)


def split_launch(kernel: Any, x: Tensor, args: tuple[Any, ...], steps: int, elements: int, **constants: Any) -> Launch:
    """`kernel` for all tiles of the split form, `steps` to a program; chunks and steps follow `args`."""
    (b, c), split = x.shape[:2], split_of(x)
    chunks = cdiv(layout_of(x)[0], split.pixels * steps)
    programs = chunks * cdiv(c, split.channels) * b
    return tiled(kernel, programs, (*args, chunks, steps), x, split[:2], c, elements, **constants)
