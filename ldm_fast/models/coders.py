"""Encoder E and decoder D of the first stage (arXiv:2112.10752, section 3.1 and appendix G).

Both are convolutional, and there are no skip connections between them. Classes, sub-modules and arguments have
diffusers' names.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.models.attention import Attention
from ldm_fast.models.layers import Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, norm_and_activation
from ldm_fast.models.recompute import Recomputed

EPS = 1e-6  # of every group norm in the first stage


class _Coder(Recomputed):
    conv_norm_out: GroupNorm
    conv_act: nn.Module
    conv_out: nn.Conv2d

    def _end(self, h: Tensor) -> Tensor:
        out: Tensor = self.conv_out(norm_and_activation(self.conv_norm_out, self.conv_act, h))
        return out


class Encoder(_Coder):
    """Image (B, in, H, W) → features (B, outputs, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig, outputs: int):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(encoder_block(config, level) for level in range(len(channels)))
        self.mid_block = UNetMidBlock2D(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], outputs, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        h = self.conv_in(sample)  # (B, C, H, W)
        for block in self.down_blocks:
            h = self._run(block, h)  # (B, C', H/2, W/2)
        return self._end(self.mid_block(h))  # (B, outputs, H/f, W/f)


class Decoder(_Coder):
    """Latent (B, z, H/f, W/f) → image (B, out, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.encoder_channels, channels[-1], 3, padding=1)
        middle = UNetMidBlock2D(config)
        self.up_blocks = nn.ModuleList(decoder_block(config, level) for level in reversed(range(len(channels))))
        self.mid_block = middle  # the order of parameters is that of diffusers
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, latent_embeds: None = None) -> Tensor:
        if latent_embeds is not None:
            raise ValueError("Decoder: latent_embeds must be None, since no norm of this decoder looks at them")
        h = self.mid_block(self.conv_in(sample))  # (B, C, H/f, W/f)
        for block in self.up_blocks:
            h = self._run(block, h)  # (B, C', 2H, 2W)
        return self._end(h)  # (B, out, H, W)


def _res_blocks(config: AutoencoderConfig, inputs: int, outputs: int, count: int) -> nn.ModuleList:
    groups = config.norm_num_groups
    return nn.ModuleList(
        ResnetBlock2D(inputs if i == 0 else outputs, outputs, groups=groups, eps=EPS) for i in range(count)
    )


def _attentions(config: AutoencoderConfig, channels: int, count: int) -> nn.ModuleList:
    norms = (GroupNorm(config.norm_num_groups, channels, EPS) for _ in range(count))
    return nn.ModuleList(
        Attention(channels, heads=1, head_dim=channels, qkv_bias=True, group_norm=norm, residual=True) for norm in norms
    )


class _Level(nn.Module):
    """Residual blocks, each perhaps with attention. In the order of parameters, attentions come first."""

    has_attention: ClassVar[bool] = False
    attentions: nn.ModuleList | None
    resnets: nn.ModuleList

    def _set(self, config: AutoencoderConfig, inputs: int, outputs: int, count: int) -> None:
        resnets = _res_blocks(config, inputs, outputs, count)
        self.attentions = _attentions(config, outputs, count) if self.has_attention else None
        self.resnets = resnets

    def _inside(self, h: Tensor, temb: Tensor | None) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, temb)
            if self.attentions is not None:
                h = self.attentions[i](h)
        return h


class DownEncoderBlock2D(_Level):
    """One level of the encoder: residual blocks, then a reduction by 2 (not at the last)."""

    def __init__(self, config: AutoencoderConfig, level: int):
        super().__init__()
        channels = config.block_out_channels
        self._set(config, channels[max(level - 1, 0)], channels[level], config.layers_per_block)
        last = level == len(channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample2D(channels[level], asymmetric=True)])

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self._inside(hidden_states, temb)
        return h if self.downsamplers is None else self.downsamplers[0](h)


class AttnDownEncoderBlock2D(DownEncoderBlock2D):
    """A level of the encoder with attention after each residual block."""

    has_attention = True


class UpDecoderBlock2D(_Level):
    """One level of the decoder: residual blocks, then a doubling (not at the last)."""

    def __init__(self, config: AutoencoderConfig, level: int):
        super().__init__()
        channels = config.block_out_channels
        inputs = channels[min(level + 1, len(channels) - 1)]
        self._set(config, inputs, channels[level], config.layers_per_block + 1)
        self.upsamplers = None if level == 0 else nn.ModuleList([Upsample2D(channels[level])])

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self._inside(hidden_states, temb)
        return h if self.upsamplers is None else self.upsamplers[0](h)


class AttnUpDecoderBlock2D(UpDecoderBlock2D):
    """A level of the decoder with attention after each residual block."""

    has_attention = True


def encoder_block(config: AutoencoderConfig, level: int) -> DownEncoderBlock2D:
    """Return a level of the encoder."""
    return (AttnDownEncoderBlock2D if level in config.attention_levels else DownEncoderBlock2D)(config, level)


def decoder_block(config: AutoencoderConfig, level: int) -> UpDecoderBlock2D:
    """Return a level of the decoder."""
    return (AttnUpDecoderBlock2D if level in config.decoder_levels else UpDecoderBlock2D)(config, level)


class UNetMidBlock2D(Recomputed):
    """Residual block, perhaps attention, residual block at the lowest resolution."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels, attention = config.block_out_channels[-1], config.mid_block_add_attention
        resnets = _res_blocks(config, channels, channels, 2)
        self.attentions = _attentions(config, channels, 1) if attention else None
        self.resnets = resnets

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self._run(self.resnets[0], hidden_states, temb)
        if self.attentions is not None:
            h = self._run(self.attentions[0], h, temb=temb)
        out: Tensor = self._run(self.resnets[1], h, temb)
        return out
