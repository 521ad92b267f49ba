"""What the group norm kernels share: tiles, what is affine per channel, how work is divided.

Layout   x is (B, C, S) seen with two strides: contiguous (S, 1) or channels_last (1, C). A tile is CHANNELS × PIXELS;
         which of the two is long decides what is read in a row, so one kernel serves both layouts. weight, bias and the
         modulation are one number per channel: nothing is divided per element.
On chip  A group that fits into a program's registers has a program of its own.
Split    A larger group is divided into tiles of channels and chunks of pixels. Any tile may hold channels of several
         groups, so work is split alike for one wide group and for many narrow ones.

How work is divided depends on C, S and the layout alone, never on B.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

ON_CHIP = 16384  # padded elements of a group that one program keeps; its backward keeps two tensors
TILE = 4096  # elements of a tile of the split form
ROW_BYTES = 128  # least that is read in a row of a channels_last tensor
CHUNKS = 256  # most partial results per channel
SPREAD = 1024  # programs of an image from which on each of them applies several tiles, at most STEPS
STEPS = 8
RESIDENT_WARPS = 16  # that a multiprocessor is meant to hold, each with half a kilobyte or more of x on its way
MOST_CHANNELS = 1 << 20  # for which `group_of` is exact
# Arguments of which a kernel needs to know nothing in advance: how rows are aligned is in UNIT. So one compiled kernel
# serves every size of image and number of channels that is divided alike.
GENERAL = ("B", "C", "S", "G", "width", "per_width", "chunks", "pixels", "steps")


@triton.jit
def affine(weight, bias, scale, shift, row, channel, inside):
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
def aligned(C, S, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """C and S; the compiler learns that UNIT elements, at most 16 bytes, divide whichever lies in a row."""
    if CHANNELS_LAST:
        C = C // UNIT * UNIT
    else:
        S = S // UNIT * UNIT
    return C, S


@triton.jit
def tile_of(channel, pixel, end, C, S, CHANNELS_LAST: tl.constexpr):
    """Offsets of a tile in one image, and which of them exist (channels up to `end`).  # (CHANNELS, PIXELS)

    Offsets have the type of `channel`: 64 bits, or 32, which take fewer registers, where all of an image's fit.
    """
    if CHANNELS_LAST:
        offsets = channel[:, None] + pixel.to(channel.dtype)[None, :] * C
    else:
        offsets = channel[:, None] * S + pixel[None, :]
    return offsets, (channel < end)[:, None] & (pixel < S)[None, :]


@triton.jit
def group_of(channel, per_width):
    """channel // width as a product; per_width is 2⁴⁰ / width, rounded up."""
    return (channel.to(tl.int64) * per_width) >> 40


def layout_of(x: torch.Tensor) -> tuple[int, bool]:
    """S, and whether channels are what lies in a row."""
    pixels = x[0, 0].numel()
    return pixels, pixels == 1 or not x.is_contiguous()


def unit_of(x: torch.Tensor, width: int = 0) -> dict[str, Any]:
    """How many elements, at most 16 bytes, divide a row, and each group's part of it if groups have programs."""
    pixels, channels_last = layout_of(x)
    row = math.gcd(x.shape[1], width) if channels_last else pixels
    return {"UNIT": math.gcd(16 // x.element_size(), row), "CHANNELS_LAST": channels_last}


def on_chip(x: torch.Tensor, width: int, limit: int) -> tuple[int, int] | None:
    """The tile that holds a group, or None where the group is split."""
    pixels, channels_last = layout_of(x)
    tile = triton.next_power_of_2(width), triton.next_power_of_2(pixels)
    # a narrow group of a channels_last tensor would be read in crumbs of a few bytes per pixel
    crumbs = channels_last and pixels > 1 and width * x.element_size() < ROW_BYTES // 2
    far = x[0].numel() >= 1 << 31  # offsets on chip have 32 bits
    return None if tile[0] * tile[1] > limit or crumbs or far else tile


class Split(NamedTuple):
    """How a group too large for a program is divided; a chunk of pixels has `steps` tiles."""

    channels: int  # of a tile
    pixels: int
    steps: int  # that keep the partial results of a channel below CHUNKS
    steps_apply: int


def split_of(x: torch.Tensor) -> Split:
    pixels, channels_last = layout_of(x)
    if channels_last:
        channel_tile = min(triton.next_power_of_2(x.shape[1]), ROW_BYTES // x.element_size())
        pixel_tile = min(triton.next_power_of_2(pixels), TILE // channel_tile)
    else:
        pixel_tile = min(triton.next_power_of_2(pixels), TILE // 4)
        channel_tile = min(triton.next_power_of_2(x.shape[1]), TILE // pixel_tile)
    along = triton.cdiv(pixels, pixel_tile)
    tiles = along * triton.cdiv(x.shape[1], channel_tile)
    return Split(channel_tile, pixel_tile, triton.cdiv(along, CHUNKS), max(1, min(STEPS, tiles // SPREAD)))


def block_of(x: torch.Tensor, channels: int, pixels: int, elements: int, width: int = 0) -> dict[str, Any]:
    """A tile, and warps that give a thread about `elements` elements of it, half as many where each has an address."""
    unit = unit_of(x, width)
    if unit["UNIT"] * x.element_size() < 16:
        elements //= 2
    warps = max(1, min(16, channels * pixels // (32 * elements)))
    # as many registers as RESIDENT_WARPS leave: left alone, the compiler for sm_100 takes fewer, and spills
    options = {"num_warps": warps, "maxnreg": 65536 // (32 * RESIDENT_WARPS), "enable_fp_fusion": True}
    return {"CHANNELS": channels, "PIXELS": pixels, **unit, **options}


def resident_of(options: dict[str, Any]) -> int:
    """Programs of these options that a multiprocessor is meant to hold."""
    return max(1, RESIDENT_WARPS // options["num_warps"])


def per_width_of(width: int) -> int:
    """What `group_of` multiplies by."""
    return triton.cdiv(1 << 40, width)
