"""E and D over a large image in bands of rows, with the result of the whole image: `decode(z, tile=…)`.

Each layer gets what it needs of the rest of the image. A 3×3 convolution needs one row of either neighbour: every band
has them beside its own rows, as its rims. A group norm needs the statistics of all bands, merged
(`ops.merge_group_norm_stats`), before it is applied to the first one. Attention, which stands where maps are small,
gets the map put together.

At most two maps are kept: the input of a group norm until its second pass, and the sum that a residual block adds to.
Bands are given up one by one as the next map grows out of them; only the rims are computed twice. Whatever else a layer
needs (the normalised band, what a convolution reorders) is as large as a band. Bands are channels_last: their rows lie
one behind the other, and convolutions take and give them without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.models.coders import Decoder, DownEncoderBlock2D, Encoder, UpDecoderBlock2D
from ldm_fast.models.layers import Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, upsample_nearest

BANDS_PER_TILE = 8  # besides the maps that are kept, a layer needs a few bands: together less than a tile


def decode_in_bands(decoder: Decoder, z: Tensor, pixels: int) -> Tensor:
    """Return decoder(z) for z (B, z_channels, h, w), in the memory of two maps and few bands of `pixels` pixels."""
    return torch.cat([_decode_one(decoder, latent, pixels) for latent in z.split(1)])


def encode_in_bands(encoder: Encoder, x: Tensor, pixels: int) -> Tensor:
    """Return encoder(x) for x (B, in_channels, H, W), in the memory of two maps and few bands of `pixels` pixels."""
    return torch.cat([_encode_one(encoder, image, pixels) for image in x.split(1)])


def _decode_one(decoder: Decoder, z: Tensor, pixels: int) -> Tensor:
    h = Bands.cut(decoder.mid_block(decoder.conv_in(z)), pixels)  # (1, C, H/f, W/f)
    for block in cast("list[UpDecoderBlock2D]", decoder.up_blocks):
        _res_blocks(block, h)
        if block.upsamplers is not None:
            _upsample(cast("Upsample2D", block.upsamplers[0]), h, pixels)  # (1, C', 2H, 2W)
    _after_norm(decoder.conv_norm_out, h, decoder.conv_out)
    return h.joined()  # (1, out, H, W)


def _encode_one(encoder: Encoder, x: Tensor, pixels: int) -> Tensor:
    h = Bands.cut(x, pixels, multiple=2 ** (len(encoder.down_blocks) - 1))  # (1, in, H, W)
    h.replace(encoder.conv_in)
    for block in cast("list[DownEncoderBlock2D]", encoder.down_blocks):
        _res_blocks(block, h)
        if block.downsamplers is not None:
            _downsample(cast("Downsample2D", block.downsamplers[0]), h)  # (1, C', H/2, W/2)
    out: Tensor = encoder.conv_out(encoder.conv_norm_out(encoder.mid_block(h.joined()), "silu"))
    return out  # (1, outputs, H/f, W/f)


class Bands:
    """A map (1, C, H, W) as bands of rows, channels_last, each between its rims: one row of either neighbour."""

    def __init__(self, parts: list[Tensor]):
        self.parts = parts

    @classmethod
    def cut(cls, x: Tensor, pixels: int, multiple: int = 1) -> Bands:
        """Cut x into bands of `pixels` pixels at most, or one row; all but the last `multiple` times some rows high."""
        height, width = x.shape[2:]
        rows = max(multiple, pixels // width // multiple * multiple)
        starts = range(0, max(1, height - height % multiple), rows)  # a rest below `multiple` goes to the last band
        ends = [*starts[1:], height]
        return cls([_copy(x[:, :, max(0, a - 1) : b + 1]) for a, b in zip(starts, ends, strict=True)])

    def own(self, i: int) -> Tensor:
        """Return band i without its rims, as a view."""
        top, bottom = self.rims(i)
        return self.parts[i][:, :, top : self.parts[i].shape[2] - bottom]

    def rims(self, i: int) -> tuple[int, int]:
        """Return how many rims band i has above and below: none at the border of the image."""
        return int(i > 0), int(i < len(self.parts) - 1)

    def take(self, i: int) -> Tensor:
        """Return band i and give it up."""
        part = self.parts[i]
        self.parts[i] = part.new_empty(0)
        return part

    def joined(self) -> Tensor:
        """Return the map (1, C, H, W), contiguous."""
        return torch.cat([self.own(i) for i in range(len(self.parts))], dim=2).contiguous()

    def replace(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace each band by function(band with its rims), which must keep the number of rows."""
        for i in range(len(self.parts)):
            self.parts[i] = function(self.take(i))
        self.update_rims()

    def update_rims(self) -> None:
        """Copy every rim from the band it belongs to: at the rim, a convolution has seen zeros instead of the image."""
        for i in range(1, len(self.parts)):
            self.parts[i][:, :, 0] = self.own(i - 1)[:, :, -1]
            self.parts[i - 1][:, :, -1] = self.own(i)[:, :, 0]


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.channels_last)


def _statistics(norm: GroupNorm, x: Bands) -> Tensor:
    bands = (x.own(i) for i in range(len(x.parts)))
    return ops.merge_group_norm_stats([ops.group_norm_stats(band, norm.num_groups) for band in bands])


def _norm_silu(norm: GroupNorm, band: Tensor, stats: Tensor) -> Tensor:
    return ops.group_norm_apply(band, stats, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _after_norm(norm: GroupNorm, x: Bands, conv: nn.Module) -> None:
    """Replace x by conv(silu(norm(x)))."""
    stats = _statistics(norm, x)
    x.replace(lambda band: conv(_norm_silu(norm, band, stats)))


def _res_blocks(block: DownEncoderBlock2D | UpDecoderBlock2D, x: Bands) -> None:
    for i, resnet in enumerate(cast("list[ResnetBlock2D]", block.resnets)):
        _res_block(resnet, x)
        if block.attentions is not None:
            _whole(block.attentions[i], x)


def _res_block(block: ResnetBlock2D, x: Bands) -> None:
    """Replace x by block(x). The shortcut's result takes the place of its band, so that no third map is kept."""
    stats = _statistics(block.norm1, x)
    h = Bands([])
    for i, band in enumerate(x.parts):
        h.parts.append(block.conv1(_norm_silu(block.norm1, band, stats)))
        if block.conv_shortcut is not None:
            x.parts[i] = block.conv_shortcut(band)
        del band
    h.update_rims()
    stats = _statistics(block.norm2, h)
    for i, band in enumerate(x.parts):
        band += block.conv2(_norm_silu(block.norm2, h.take(i), stats))
    x.update_rims()


def _whole(layer: nn.Module, x: Bands) -> None:
    """Replace x by layer(x), for a layer that looks at all of it."""
    parts, bottom = [], 0
    result = layer(x.joined())
    for i in range(len(x.parts)):
        top, bottom = bottom, bottom + x.own(i).shape[2]
        parts.append(_copy(result[:, :, max(0, top - 1) : bottom + 1]))
    x.parts = parts


def _upsample(layer: Upsample2D, x: Bands, pixels: int) -> None:
    """Replace x by layer(x), each band cut into as many as are needed."""
    parts: list[Tensor] = []
    conv = cast("nn.Conv2d", layer.conv)
    for i in range(len(x.parts)):
        top, bottom = x.rims(i)
        large = upsample_nearest(x.take(i))
        large = large[:, :, top : large.shape[2] - bottom]  # a rim has become two rows
        rows = large.shape[2] - top - bottom
        step = max(1, pixels // large.shape[3])
        for start in range(0, rows, step):
            # From the row before (a rim, or the band's own) to the row after.
            first, last = max(0, start + top - 1), start + top + min(step, rows - start) + 1
            parts.append(conv(large[:, :, first:last]))
    x.parts = parts
    x.update_rims()


def _downsample(layer: Downsample2D, x: Bands) -> None:
    """Replace x by layer(x). Row r sees rows 2r to 2r + 2, so a band needs the rim below; below the last are zeros."""
    for i, band in enumerate(x.parts):
        top, bottom = x.rims(i)
        band = F.pad(band[:, :, top:], (0, 1, 0, 1 - bottom))
        x.parts[i] = F.pad(layer.conv(band), (0, 0, top, bottom))  # with room for its rims
    x.update_rims()
