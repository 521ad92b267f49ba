"""Encoder E and decoder D of the first stage (arXiv:2112.10752, section 3.1 and appendix G).

Both are convolutional, and there are no skip connections between them. Sub-modules have diffusers' names.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.models.layers import Downsample, GroupNorm, ResBlock, SelfAttention2d, Upsample
from ldm_fast.models.recompute import Recomputed

EPS = 1e-6  # of every group norm in the first stage


class Encoder(Recomputed):
    """Image (B, in, H, W) → features (B, outputs, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig, outputs: int):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(EncoderBlock(config, level) for level in range(len(channels)))
        self.mid_block = MidBlock(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, C, H, W)
        for block in self.down_blocks:
            h = self._run(block, h)  # (B, C', H/2, W/2)
        h = self._run(self.mid_block, h)
        return _plain(self.conv_out, self.conv_norm_out(h, "silu"))  # (B, outputs, H/f, W/f)


class Decoder(Recomputed):
    """Latent (B, z, H/f, W/f) → image (B, out, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.encoder_channels, channels[-1], 3, padding=1)
        middle = MidBlock(config)
        self.up_blocks = nn.ModuleList(DecoderBlock(config, level) for level in reversed(range(len(channels))))
        self.mid_block = middle  # the order of parameters is that of diffusers
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], EPS)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self._run(self.mid_block, self.conv_in(z))  # (B, C, H/f, W/f)
        for block in self.up_blocks:
            h = self._run(block, h)  # (B, C', 2H, 2W)
        return _plain(self.conv_out, self.conv_norm_out(h, "silu"))  # (B, out, H, W)


def _plain(block: nn.Module, h: Tensor) -> Tensor:
    out: Tensor = block(h)
    return out


def _res_blocks(config: AutoencoderConfig, inputs: int, outputs: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResBlock(inputs if i == 0 else outputs, outputs, groups=config.norm_num_groups, eps=EPS) for i in range(count)
    )


def _self_attention(config: AutoencoderConfig, channels: int) -> SelfAttention2d:
    return SelfAttention2d(channels, heads=1, head_dim=channels, groups=config.norm_num_groups, eps=EPS)


def _attentions(config: AutoencoderConfig, level: int, count: int) -> nn.ModuleList | None:
    if level not in config.attention_levels:
        return None
    return nn.ModuleList(_self_attention(config, config.block_out_channels[level]) for _ in range(count))


class EncoderBlock(nn.Module):
    """One level of the encoder: residual blocks, perhaps with attention, then a reduction by 2 (not at the last)."""

    def __init__(self, config: AutoencoderConfig, level: int):
        super().__init__()
        channels, count = config.block_out_channels, config.layers_per_block
        resnets = _res_blocks(config, channels[max(level - 1, 0)], channels[level], count)
        self.attentions = _attentions(config, level, count)
        self.resnets = resnets
        last = level == len(channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample(channels[level], asymmetric=True)])

    def forward(self, h: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h)
            if self.attentions is not None:
                h = self.attentions[i](h)
        return h if self.downsamplers is None else self.downsamplers[0](h)


class DecoderBlock(nn.Module):
    """One level of the decoder: residual blocks, perhaps with attention, then a doubling (not at the last)."""

    def __init__(self, config: AutoencoderConfig, level: int):
        super().__init__()
        channels, count = config.block_out_channels, config.layers_per_block + 1
        resnets = _res_blocks(config, channels[min(level + 1, len(channels) - 1)], channels[level], count)
        self.attentions = _attentions(config, level, count)
        self.resnets = resnets
        self.upsamplers = None if level == 0 else nn.ModuleList([Upsample(channels[level])])

    def forward(self, h: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h)
            if self.attentions is not None:
                h = self.attentions[i](h)
        return h if self.upsamplers is None else self.upsamplers[0](h)


class MidBlock(nn.Module):
    """Residual block, perhaps attention, residual block at the lowest resolution."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.block_out_channels[-1]
        resnets = _res_blocks(config, channels, channels, 2)
        attention = config.mid_block_add_attention
        self.attentions = nn.ModuleList([_self_attention(config, channels)]) if attention else None
        self.resnets = resnets

    def forward(self, h: Tensor) -> Tensor:
        h = self.resnets[0](h)
        if self.attentions is not None:
            h = self.attentions[0](h)
        return _plain(self.resnets[1], h)
