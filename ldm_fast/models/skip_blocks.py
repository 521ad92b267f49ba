"""The blocks of NCSN++ (Song et al., arXiv:2011.13456), in plain PyTorch.

Beside the map h a picture of three channels goes through the network, `skip_sample`: on the way down it is reduced and
added to h, on the way up each level adds its part of the result. Sizes change by a fixed filter, and residual branches
are divided by √2. Sub-modules have diffusers' names and stand in its order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast.configs.unet import UNetConfig
from ldm_fast.models.attention import Attention
from ldm_fast.models.embeddings import activation
from ldm_fast.models.layers import GroupNorm, ResnetBlock2D

FILTER = (1 / 8, 3 / 8, 3 / 8, 1 / 8)
SCALE = math.sqrt(2.0)
PICTURE_CHANNELS = 3


def _filter(x: Tensor, gain: float) -> Tensor:
    row = torch.tensor(FILTER, dtype=torch.float32, device=x.device)
    kernel = (gain * torch.outer(row, row)).to(x.dtype)
    return kernel.expand(x.shape[1], 1, *kernel.shape)


class FirDownsample2D(nn.Module):
    """A reduction by 2 with a fixed filter."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.conv2d(hidden_states, _filter(hidden_states, 1), stride=2, padding=1, groups=hidden_states.shape[1])


class FirUpsample2D(nn.Module):
    """A doubling with a fixed filter."""

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        weight, channels = _filter(hidden_states, 4), hidden_states.shape[1]
        return F.conv_transpose2d(hidden_states, weight, stride=2, padding=1, groups=channels)


class FirResnet(ResnetBlock2D):
    """A residual block whose branches change their size by the filter; the shortcut is always a convolution."""

    def __init__(self, config: UNetConfig, channels: int, time_channels: int, direction: str):
        super().__init__(channels, channels, resample=direction, **_common(config, channels, time_channels))
        self.conv_shortcut = nn.Conv2d(channels, channels, 1)
        if direction == "up":
            self.upsample = FirUpsample2D()  # type: ignore[assignment]
        else:
            self.downsample = FirDownsample2D()  # type: ignore[assignment]


def _groups(channels: int) -> int:
    return min(channels // 4, 32)


def _common(config: UNetConfig, inputs: int, time_channels: int) -> dict[str, Any]:
    return dict(
        time_channels=time_channels,
        groups=_groups(inputs),
        eps=config.norm_eps,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        dropout=config.dropout,
        nonlinearity=activation(config.act_fn),
        out_scale=SCALE,
    )


def _resnet(
    config: UNetConfig, inputs: int, outputs: int, time_channels: int, groups: int | None = None
) -> ResnetBlock2D:
    block = ResnetBlock2D(inputs, outputs, **{**_common(config, inputs, time_channels), "groups": 1})
    block.norm1 = GroupNorm(groups or _groups(inputs), inputs, config.norm_eps)
    block.norm2 = GroupNorm(_groups(outputs), outputs, config.norm_eps)
    return block


def _attention(config: UNetConfig, level: int, kind: str) -> Attention:
    channels = config.block_out_channels[level]
    heads, head_dim = config.heads(level, kind)
    norm = GroupNorm(32, channels, config.norm_eps)
    return Attention(
        channels,
        heads=heads,
        head_dim=head_dim,
        qkv_bias=True,
        group_norm=norm,
        residual=True,
        rescale_output_factor=SCALE,
    )


class SkipDownBlock2D(nn.Module):
    """A level on the way down: residual blocks, perhaps with attention, then a reduction, and the picture added."""

    has_attention = False

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels, kind = config.block_out_channels, type(self).__name__
        inputs, outputs, count = channels[max(level - 1, 0)], channels[level], config.layers(level)
        if self.has_attention:
            self.attentions = nn.ModuleList(_attention(config, level, kind) for _ in range(count))
        self.resnets = nn.ModuleList(
            _resnet(config, inputs if i == 0 else outputs, outputs, time_channels) for i in range(count)
        )
        last = level == len(channels) - 1
        self.resnet_down = None if last else FirResnet(config, outputs, time_channels, "down")
        self.downsamplers = None if last else nn.ModuleList([FirDownsample2D()])
        self.skip_conv = None if last else nn.Conv2d(PICTURE_CHANNELS, outputs, 1)

    def forward(
        self, hidden_states: Tensor, temb: Tensor, skip_sample: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Return (h, the skips, the picture)."""
        h, skips = hidden_states, []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, temb)
            if self.has_attention:
                h = self.attentions[i](h)
            skips.append(h)
        if self.resnet_down is not None and self.downsamplers is not None and self.skip_conv is not None:
            skip_sample = self.downsamplers[0](skip_sample)
            h = self.skip_conv(skip_sample) + self.resnet_down(h, temb)
            skips.append(h)
        return h, tuple(skips), skip_sample


class AttnSkipDownBlock2D(SkipDownBlock2D):
    """Such a level with attention over pixels after each residual block."""

    has_attention = True


class SkipUpBlock2D(nn.Module):
    """A level on the way up: residual blocks over h and skips, perhaps attention, a part of the picture, a doubling."""

    has_attention = False

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels, kind, count = config.block_out_channels, type(self).__name__, config.layers(level) + 1
        below, outputs = channels[min(level + 1, len(channels) - 1)], channels[level]
        inputs, skips = [below, *[outputs] * (count - 1)], [*[outputs] * (count - 1), channels[max(level - 1, 0)]]
        if self.has_attention:
            self.attentions = nn.ModuleList([_attention(config, level, kind)])
        self.resnets = nn.ModuleList(
            _resnet(config, i + s, outputs, time_channels, min(self._channels_for_groups(i, s), 32))
            for i, s in zip(inputs, skips, strict=True)
        )
        self.upsampler = FirUpsample2D()
        self.resnet_up = self.skip_conv = self.skip_norm = self.act = None
        if level > 0:
            self.resnet_up = FirResnet(config, outputs, time_channels, "up")
            self.skip_conv = nn.Conv2d(outputs, PICTURE_CHANNELS, 3, padding=1)
            self.skip_norm = GroupNorm(_groups(outputs), outputs, config.norm_eps)
            self.act = nn.SiLU()

    def _channels_for_groups(self, inputs: int, skips: int) -> int:
        # Where there is attention diffusers divides only the second of the two by 4, and weights are trained like that.
        return inputs + skips // 4 if self.has_attention else (inputs + skips) // 4

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Sequence[Tensor],
        temb: Tensor,
        skip_sample: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (h, the picture as far as it is made)."""
        h = hidden_states
        for resnet, skip in zip(self.resnets, reversed(res_hidden_states_tuple), strict=True):
            h = resnet(torch.cat([h, skip], dim=1), temb)
        if self.has_attention:
            h = self.attentions[0](h)
        if skip_sample is not None:
            skip_sample = self.upsampler(skip_sample)
        if self.resnet_up is not None and self.skip_norm is not None and self.skip_conv is not None:
            part = self.skip_conv(self.skip_norm(h, "silu"))
            skip_sample = part if skip_sample is None else skip_sample + part
            h = self.resnet_up(h, temb)
        return h, skip_sample


class AttnSkipUpBlock2D(SkipUpBlock2D):
    """Such a level with attention over pixels after the last residual block."""

    has_attention = True
