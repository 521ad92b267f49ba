"""The levels of a UNet: residual blocks, attention after each, and the change of size between levels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm_fast.configs.unet import UNetConfig
from ldm_fast.models.layers import Conditions, Downsample, ResBlock, SelfAttention2d, SpatialTransformer, Upsample
from ldm_fast.models.rare_layers import (
    AddedKVAttention,
    Nearest,
    PlainResBlock,
    Pool,
    ScaledSelfAttention,
)
from ldm_fast.models.recompute import Recomputed


def _res_block(
    config: UNetConfig,
    block_type: str,
    inputs: int,
    outputs: int,
    time_channels: int,
    resample: str | None = None,
    out_scale: float = 1.0,
) -> ResBlock:
    skip_time_act = False
    if "SimpleCrossAttn" in block_type or block_type.startswith(("ResnetDown", "ResnetUp")):
        skip_time_act = config.resnet_skip_time_act
        out_scale *= 1.0 if "Mid" in block_type else config.resnet_out_scale_factor
    common: dict[str, Any] = dict(
        time_channels=time_channels,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        resample=resample,
        dropout=config.dropout,
    )
    if config.act_fn in ("silu", "swish") and out_scale == 1 and not skip_time_act:
        return ResBlock(inputs, outputs, **common)
    act = config.act_fn
    return PlainResBlock(inputs, outputs, act=act, skip_time_act=skip_time_act, out_scale=out_scale, **common)


def _attention(
    config: UNetConfig, level: int, block_type: str, depth: int = 1, only_cross_attention: bool = False
) -> nn.Module:
    channels, groups = config.block_out_channels[level], config.norm_num_groups
    heads, head_dim = config.heads(level, block_type)
    if "SimpleCrossAttn" in block_type:
        return AddedKVAttention(
            channels,
            heads=heads,
            head_dim=head_dim,
            context_channels=config.given("cross_attention_dim"),
            groups=groups,
            only_cross_attention=only_cross_attention,
            norm=config.cross_attention_norm,
        )
    if "CrossAttn" not in block_type:
        return SelfAttention2d(channels, heads=heads, head_dim=head_dim, groups=groups, eps=config.norm_eps)
    return SpatialTransformer(
        channels,
        heads=heads,
        head_dim=head_dim,
        context_channels=config.cross_attention_dim,
        depth=depth,
        groups=groups,
        linear=config.use_linear_projection,
        only_cross_attention=only_cross_attention,
    )


def _resampler(config: UNetConfig, level: int, block_type: str, time_channels: int, direction: str) -> nn.ModuleList:
    """Return what changes the size between this level and the next, "down" or "up"."""
    channels, kind = config.block_out_channels[level], config.at_level("resample_type", level)
    if kind == "resnet" or block_type.startswith(("Resnet", "Simple")):
        return nn.ModuleList([_res_block(config, block_type, channels, channels, time_channels, direction)])
    if kind == "pool":
        return nn.ModuleList([Pool() if direction == "down" else Nearest()])
    if direction == "up":
        return nn.ModuleList([Upsample(channels)])
    return nn.ModuleList([Downsample(channels, asymmetric=config.downsample_padding == 0)])


class Block(Recomputed):
    """Residual blocks and attention; with `gradient_checkpointing` their inside is computed twice instead of stored.

    A block without attention has no attribute `attentions`: programs made for diffusers' blocks ask `hasattr`.
    Attentions come before residual blocks in the order of parameters, as in diffusers' blocks.
    """

    resnets: nn.ModuleList
    has_cross_attention = False

    def _add_attentions(self, config: UNetConfig, level: int, block_type: str, depths: Sequence[int]) -> None:
        only_cross = config.at_level("only_cross_attention", level)
        self.has_cross_attention = "CrossAttn" in block_type
        if "Attn" in block_type:
            self.attentions = nn.ModuleList(_attention(config, level, block_type, n, only_cross) for n in depths)

    def _pair(self, i: int, h: Tensor, temb: Tensor, conditions: Conditions) -> Tensor:
        """Run the i-th residual block and, if there is one, the attention after it."""
        h = self._run(self.resnets[i], h, temb)
        return self._run(self.attentions[i], h, conditions) if hasattr(self, "attentions") else h


class DownBlock(Block):
    """One level on the way down: residual blocks, each with attention, then a reduction by 2 (not at the last)."""

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels, block_type = config.block_out_channels, config.down_block_types[level]
        inputs, outputs = channels[max(level - 1, 0)], channels[level]
        resnets = nn.ModuleList(
            _res_block(config, block_type, inputs if i == 0 else outputs, outputs, time_channels)
            for i in range(config.layers(level))
        )
        self._add_attentions(config, level, block_type, config.depths_down(level))
        self.resnets = resnets
        last = level == len(channels) - 1
        self.downsamplers = None if last else _resampler(config, level, block_type, time_channels, "down")

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
    """Residual block, attention, residual block at the lowest resolution; "ResnetMidBlock2D" is the first alone."""

    def __init__(self, config: UNetConfig, time_channels: int):
        super().__init__()
        kind, channels, scale = (
            config.mid_block_type or "",
            config.block_out_channels[-1],
            config.mid_block_scale_factor,
        )
        count = 1 if kind == "ResnetMidBlock2D" else 2
        resnets = nn.ModuleList(
            _res_block(config, kind, channels, channels, time_channels, out_scale=scale) for _ in range(count)
        )
        attentions = [_middle_attention(config, kind)] if count == 2 else []
        self.attentions = nn.ModuleList(attentions)  # type: ignore[arg-type]  # None, as there, if there is none
        self.resnets = resnets
        self.has_cross_attention = "CrossAttn" in kind

    def forward(self, h: Tensor, temb: Tensor, conditions: Conditions) -> Tensor:
        h = self._run(self.resnets[0], h, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                h = self._run(attention, h, conditions)
            h = self._run(resnet, h, temb)
        return h


def _middle_attention(config: UNetConfig, kind: str) -> nn.Module | None:
    level, scale = len(config.block_out_channels) - 1, config.mid_block_scale_factor
    if "Cross" in kind:
        return _attention(config, level, kind, config.depth_of_middle, config.mid_block_only_cross_attention)
    if not config.add_attention:
        return None
    groups = config.norm_num_groups if config.attn_norm_num_groups is None else config.attn_norm_num_groups
    heads, head_dim = config.heads(level, kind)
    make = functools.partial(ScaledSelfAttention, scale) if scale != 1 else SelfAttention2d
    attention = make(
        config.block_out_channels[level], heads=heads, head_dim=head_dim, groups=groups or 1, eps=config.norm_eps
    )
    if groups == 0:
        attention.group_norm = nn.Identity()  # type: ignore[assignment]
    return attention


class UpBlock(Block):
    """One level on the way up: residual blocks over h and a skip, each with attention, then a doubling."""

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels, block_type = config.block_out_channels, config.up_block_types[-1 - level]
        below, outputs = channels[min(level + 1, len(channels) - 1)], channels[level]
        count = config.layers(level) + 1
        skips = [*[outputs] * (count - 1), channels[max(level - 1, 0)]]
        inputs = [below, *[outputs] * (count - 1)]
        resnets = nn.ModuleList(
            _res_block(config, block_type, i + s, outputs, time_channels) for i, s in zip(inputs, skips, strict=True)
        )
        self._add_attentions(config, level, block_type, config.depths_up(level))
        self.resnets = resnets
        self.upsamplers = None if level == 0 else _resampler(config, level, block_type, time_channels, "up")

    def forward(self, h: Tensor, skips: list[Tensor], temb: Tensor, conditions: Conditions) -> Tensor:
        """Take the skips of this level from the end of the list."""
        for i in range(len(self.resnets)):
            h = self._pair(i, torch.cat([h, skips.pop()], dim=1), temb, conditions)
        if self.upsamplers is not None:
            h = self.upsamplers[0](h, temb, size=tuple(skips[-1].shape[2:]))
        return h
