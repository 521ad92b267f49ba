"""The levels of a UNet: residual blocks, attention after each, and the change of size between levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm_fast.configs.unet import UNetConfig
from ldm_fast.models.layers import Conditions, Downsample, ResBlock, SelfAttention2d, SpatialTransformer, Upsample
from ldm_fast.models.recompute import Recomputed


def _res_block(
    config: UNetConfig, inputs: int, outputs: int, time_channels: int, resample: str | None = None
) -> ResBlock:
    return ResBlock(
        inputs,
        outputs,
        time_channels=time_channels,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        resample=resample,
        dropout=config.dropout,
    )


def _attention(
    config: UNetConfig, level: int, block_type: str, depth: int = 1, only_cross_attention: bool = False
) -> nn.Module:
    channels = config.block_out_channels[level]
    heads, head_dim = config.heads(level)
    if "CrossAttn" not in block_type:
        groups, eps = config.norm_num_groups, config.norm_eps
        return SelfAttention2d(channels, heads=heads, head_dim=head_dim, groups=groups, eps=eps)
    return SpatialTransformer(
        channels,
        heads=heads,
        head_dim=head_dim,
        context_channels=config.cross_attention_dim,
        depth=depth,
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        only_cross_attention=only_cross_attention,
    )


class Block(Recomputed):
    """Residual blocks and attention; with `gradient_checkpointing` their inside is computed twice instead of stored.

    A block without attention has no attribute `attentions`: programs made for diffusers' blocks ask `hasattr`.
    """

    resnets: nn.ModuleList
    has_cross_attention = False

    def _add_attentions(self, config: UNetConfig, level: int, depths: Sequence[int]) -> None:
        block_type, only_cross = config.down_block_types[level], config.at_level("only_cross_attention", level)
        self.has_cross_attention = "CrossAttn" in block_type
        if block_type != "DownBlock2D":
            self.attentions = nn.ModuleList(_attention(config, level, block_type, n, only_cross) for n in depths)

    def _pair(self, i: int, h: Tensor, temb: Tensor, conditions: Conditions) -> Tensor:
        """Run the i-th residual block and, if there is one, the attention after it."""
        h = self._run(self.resnets[i], h, temb)
        return self._run(self.attentions[i], h, conditions) if hasattr(self, "attentions") else h


class DownBlock(Block):
    """One level on the way down: residual blocks, each with attention, then a reduction by 2 (not at the last)."""

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels = config.block_out_channels
        inputs, outputs = channels[max(level - 1, 0)], channels[level]
        self.resnets = nn.ModuleList(
            _res_block(config, inputs if i == 0 else outputs, outputs, time_channels)
            for i in range(config.layers_per_block)
        )
        self._add_attentions(config, level, config.depths_down(level))
        self.downsamplers = None
        if level < len(channels) - 1:
            resnet = config.resample_type == "resnet"
            down = _res_block(config, outputs, outputs, time_channels, "down") if resnet else Downsample(outputs)
            self.downsamplers = nn.ModuleList([down])

    def forward(
        self, h: Tensor, temb: Tensor, conditions: Conditions, extra: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return h and the skips.

        `extra` is a T2I-Adapter's residual. With cross attention it is added before the reduction, else after it.
        """
        skips = []
        for i in range(len(self.resnets)):
            h = self._pair(i, h, temb, conditions)
            skips.append(h)
        if extra is not None and self.has_cross_attention:
            skips[-1] = h = h + extra
        if self.downsamplers is not None:
            h = self.downsamplers[0](h, temb)
            skips.append(h)
        if extra is not None and not self.has_cross_attention:
            skips[-1] = h = h + extra
        return h, skips


class MidBlock(Block):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig, time_channels: int):
        super().__init__()
        channels = config.block_out_channels[-1]
        level = len(config.block_out_channels) - 1
        self.resnets = nn.ModuleList(_res_block(config, channels, channels, time_channels) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(config, level, config.mid_block_type, config.depth_of_middle)])
        self.has_cross_attention = "CrossAttn" in config.mid_block_type

    def forward(self, h: Tensor, temb: Tensor, conditions: Conditions) -> Tensor:
        h = self._pair(0, h, temb, conditions)
        return self._run(self.resnets[1], h, temb)


class UpBlock(Block):
    """One level on the way up: residual blocks over h and a skip, each with attention, then a doubling."""

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels = config.block_out_channels
        below, outputs = channels[min(level + 1, len(channels) - 1)], channels[level]
        count = config.layers_per_block + 1
        skips = [*[outputs] * (count - 1), channels[max(level - 1, 0)]]
        inputs = [below, *[outputs] * (count - 1)]
        self.resnets = nn.ModuleList(
            _res_block(config, i + s, outputs, time_channels) for i, s in zip(inputs, skips, strict=True)
        )
        self._add_attentions(config, level, config.depths_up(level))
        self.upsamplers = None
        if level > 0:
            resnet = config.resample_type == "resnet"
            up = _res_block(config, outputs, outputs, time_channels, "up") if resnet else Upsample(outputs)
            self.upsamplers = nn.ModuleList([up])

    def forward(self, h: Tensor, skips: list[Tensor], temb: Tensor, conditions: Conditions) -> Tensor:
        """Take the skips of this level from the end of the list."""
        for i in range(len(self.resnets)):
            h = self._pair(i, torch.cat([h, skips.pop()], dim=1), temb, conditions)
        if self.upsamplers is not None:
            h = self.upsamplers[0](h, temb, size=tuple(skips[-1].shape[2:]))
        return h
