"""The levels of a UNet: residual blocks, attention after each, and the change of size between levels.

Blocks are classes of diffusers' names, chosen by the configuration's block types, and take diffusers' arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ldm_fast.configs.unet import UNetConfig
from ldm_fast.models.attention import Attention
from ldm_fast.models.attention_processors import NOTHING
from ldm_fast.models.embeddings import activation
from ldm_fast.models.freeu import apply_freeu
from ldm_fast.models.image_prompts import Context
from ldm_fast.models.k_blocks import KCrossAttnDownBlock2D, KCrossAttnUpBlock2D, KDownBlock2D, KUpBlock2D
from ldm_fast.models.layers import Downsample2D, GroupNorm, ResnetBlock2D, Transformer2DModel, Upsample2D
from ldm_fast.models.rare_layers import AddedKVAttention
from ldm_fast.models.recompute import Recomputed
from ldm_fast.models.skip_blocks import AttnSkipDownBlock2D, AttnSkipUpBlock2D, SkipDownBlock2D, SkipUpBlock2D

B = TypeVar("B", bound=nn.Module)


def _res_block(
    config: UNetConfig,
    block_type: str,
    inputs: int,
    outputs: int,
    time_channels: int,
    resample: str | None = None,
    out_scale: float = 1.0,
) -> ResnetBlock2D:
    skip_time_act = False
    if "SimpleCrossAttn" in block_type or block_type.startswith(("ResnetDown", "ResnetUp")):
        skip_time_act = config.resnet_skip_time_act
        out_scale *= 1.0 if "Mid" in block_type else config.resnet_out_scale_factor
    return ResnetBlock2D(
        inputs,
        outputs,
        time_channels=time_channels,
        groups=config.groups(inputs),
        eps=config.norm_eps,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        resample=resample,
        dropout=config.dropout,
        nonlinearity=activation(config.act_fn),
        skip_time_act=skip_time_act,
        out_scale=out_scale,
    )


def _attention(
    config: UNetConfig, level: int, block_type: str, depth: int = 1, only_cross_attention: bool = False
) -> nn.Module:
    channels = config.block_out_channels[level]
    groups = config.groups(channels)
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
        norm = GroupNorm(groups, channels, config.norm_eps)
        return Attention(channels, heads=heads, head_dim=head_dim, qkv_bias=True, group_norm=norm, residual=True)
    return Transformer2DModel(
        channels,
        heads=heads,
        head_dim=head_dim,
        context_channels=config.cross_attention_dim,
        depth=depth,
        groups=groups,
        linear=config.use_linear_projection,
        only_cross_attention=only_cross_attention,
        upcast_attention=config.upcast_attention,
    )


def _resampler(config: UNetConfig, level: int, block_type: str, time_channels: int, direction: str) -> nn.ModuleList:
    """Return what changes the size between this level and the next, "down" or "up"."""
    channels, kind = config.block_out_channels[level], config.at_level("resample_type", level)
    if kind == "resnet" or block_type.startswith(("Resnet", "Simple")):
        return nn.ModuleList([_res_block(config, block_type, channels, channels, time_channels, direction)])
    if direction == "up":
        return nn.ModuleList([Upsample2D(channels, use_conv=kind != "pool")])
    return nn.ModuleList([Downsample2D(channels, use_conv=kind != "pool", asymmetric=config.downsample_padding == 0)])


class Block(Recomputed):
    """Residual blocks and attention; with `gradient_checkpointing` their inside is computed twice instead of stored.

    A block without attention has no attribute `attentions`: programs made for diffusers' blocks ask `hasattr`.
    Attentions come before residual blocks in the order of parameters, as in diffusers' blocks.
    """

    # "self", over the pixels; "cross", a transformer; "added", over the pixels and the context at once; None for none
    attention: ClassVar[str | None] = None
    has_cross_attention = False
    resnets: nn.ModuleList
    attentions: nn.ModuleList

    def _set(self, resnets: nn.ModuleList, config: UNetConfig, level: int, depths: Sequence[int]) -> None:
        """Set the residual blocks, and the attention after each."""
        if self.attention is not None:
            kind, only_cross = type(self).__name__, config.at_level("only_cross_attention", level)
            self.attentions = nn.ModuleList(_attention(config, level, kind, depth, only_cross) for depth in depths)
        self.resnets = resnets

    def _pairs(self) -> Iterable[tuple[nn.Module, nn.Module | None]]:
        """Return residual blocks, each with the attention after it if there is one."""
        attentions = self.attentions if self.attention is not None else [None] * len(self.resnets)
        return zip(self.resnets, attentions, strict=True)

    def _attend(self, attention: nn.Module | None, h: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Return what the attention makes of h, given the conditions that the block was called with."""
        if attention is None:
            return h
        mask, more = conditions["attention_mask"], conditions["cross_attention_kwargs"] or NOTHING
        if self.attention == "cross":
            return attention(h, **conditions, return_dict=False)[0]  # type: ignore[no-any-return]
        if self.attention == "added":
            context = conditions["encoder_hidden_states"]
            if mask is None and context is not None:
                mask = conditions["encoder_attention_mask"]
            return self._run(attention, h, encoder_hidden_states=context, attention_mask=mask, **more)  # type: ignore[no-any-return]
        masked = NOTHING if mask is None else {"attention_mask": mask}
        return self._run(attention, h, **masked, **more)  # type: ignore[no-any-return]


class DownBlock2D(Block):
    """One level on the way down: residual blocks, each perhaps with attention, then a reduction by 2 (but the last)."""

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels, kind = config.block_out_channels, type(self).__name__
        inputs, outputs = channels[max(level - 1, 0)], channels[level]
        resnets = nn.ModuleList(
            _res_block(config, kind, inputs if i == 0 else outputs, outputs, time_channels)
            for i in range(config.layers(level))
        )
        self._set(resnets, config, level, config.depths_down(level))
        last = level == len(channels) - 1
        self.downsamplers = None if last else _resampler(config, level, kind, time_channels, "down")

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        encoder_hidden_states: Context = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        encoder_attention_mask: Tensor | None = None,
        additional_residuals: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (h, the skips): h after every residual block with its attention, and after the reduction.

        `additional_residuals`, of a T2I-Adapter, are added before the reduction.
        """
        conditions = {
            "encoder_hidden_states": encoder_hidden_states,
            "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
        }
        h, skips = hidden_states, []
        for resnet, attention in self._pairs():
            h = self._attend(attention, self._run(resnet, h, temb), conditions)  # (B, C', H, W)
            skips.append(h)
        if additional_residuals is not None:
            skips[-1] = h = h + additional_residuals
        for downsampler in self.downsamplers or ():
            h = downsampler(h, temb) if isinstance(downsampler, ResnetBlock2D) else downsampler(h)  # (B, C', H/2, W/2)
            skips.append(h)
        return h, tuple(skips)


class AttnDownBlock2D(DownBlock2D):
    """A level on the way down with attention over pixels."""

    attention = "self"


class CrossAttnDownBlock2D(DownBlock2D):
    """A level on the way down with transformers that look at the context."""

    attention, has_cross_attention = "cross", True


class ResnetDownsampleBlock2D(DownBlock2D):
    """A level on the way down without attention, whose size a residual block changes."""


class SimpleCrossAttnDownBlock2D(DownBlock2D):
    """A level on the way down with attention over pixels and context at once."""

    attention, has_cross_attention = "added", True


class UNetMidBlock2D(Block):
    """Residual block, attention, residual block at the lowest resolution; "ResnetMidBlock2D" is the first alone."""

    attention = "self"

    def __init__(self, config: UNetConfig, time_channels: int):
        super().__init__()
        kind, channels = config.mid_block_type or "", config.block_out_channels[-1]
        count, scale = 1 if kind == "ResnetMidBlock2D" else 2, config.mid_block_scale_factor
        resnets = nn.ModuleList(
            _res_block(config, kind, channels, channels, time_channels, out_scale=scale) for _ in range(count)
        )
        attentions = [_middle_attention(config, kind)] if count == 2 else []
        self.attentions = nn.ModuleList(attentions)  # type: ignore[arg-type]  # None, as there, if there is none
        self.resnets = resnets

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        encoder_hidden_states: Context = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return a map like hidden_states, (B, C, H, W)."""
        if self.attention == "self":
            cross_attention_kwargs = {"temb": temb}  # as in diffusers, for processors that look at it
        conditions = {
            "encoder_hidden_states": encoder_hidden_states,
            "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
        }
        first, *others = self.resnets
        h: Tensor = self._run(first, hidden_states, temb)
        for attention, resnet in zip(self.attentions, others, strict=True):
            h = self._run(resnet, self._attend(attention, h, conditions), temb)
        return h


class UNetMidBlock2DCrossAttn(UNetMidBlock2D):
    """The middle with transformers that look at the context."""

    attention, has_cross_attention = "cross", True


class UNetMidBlock2DSimpleCrossAttn(UNetMidBlock2D):
    """The middle with attention over pixels and context at once."""

    attention, has_cross_attention = "added", True


def _middle_attention(config: UNetConfig, kind: str) -> nn.Module | None:
    level = len(config.block_out_channels) - 1
    if "Cross" in kind:
        return _attention(config, level, kind, config.depth_of_middle, config.mid_block_only_cross_attention)
    if not config.add_attention:
        return None
    channels = config.block_out_channels[level]
    groups = config.groups(channels) if config.attn_norm_num_groups is None else config.attn_norm_num_groups
    heads, head_dim = config.heads(level, kind)
    return Attention(
        channels,
        heads=heads,
        head_dim=head_dim,
        qkv_bias=True,
        group_norm=GroupNorm(groups, channels, config.norm_eps) if groups else None,
        residual=True,
        rescale_output_factor=config.mid_block_scale_factor,
    )


class UpBlock2D(Block):
    """One level on the way up: residual blocks over h and a skip, each perhaps with attention, then a doubling."""

    has_freeu: ClassVar[bool] = True  # in diffusers, other kinds of levels do not look at these factors
    s1: float | None = None  # FreeU's factors, see `apply_freeu`
    s2: float | None = None
    b1: float | None = None
    b2: float | None = None

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels, kind = config.block_out_channels, type(self).__name__
        below, outputs = channels[min(level + 1, len(channels) - 1)], channels[level]
        count = config.layers(level) + 1
        skips = [*[outputs] * (count - 1), channels[max(level - 1, 0)]]
        inputs = [below, *[outputs] * (count - 1)]
        resnets = nn.ModuleList(
            _res_block(config, kind, i + s, outputs, time_channels) for i, s in zip(inputs, skips, strict=True)
        )
        self._set(resnets, config, level, config.depths_up(level))
        self.upsamplers = None if level == 0 else _resampler(config, level, kind, time_channels, "up")
        self.resolution_idx = len(channels) - 1 - level  # FreeU changes the first two

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Sequence[Tensor],
        temb: Tensor | None = None,
        encoder_hidden_states: Context = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        upsample_size: tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return (B, C', H', W') of upsample_size, twice that of hidden_states by default.

        res_hidden_states_tuple: the skips of this level, of which the last is taken first.
        """
        conditions = {
            "encoder_hidden_states": encoder_hidden_states,
            "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
        }
        if len(res_hidden_states_tuple) < len(self.resnets):
            raise ValueError(
                f"{type(self).__name__}: res_hidden_states_tuple must hold {len(self.resnets)} skips, got "
                f"{len(res_hidden_states_tuple)}"
            )
        h = hidden_states
        for (resnet, attention), skip in zip(self._pairs(), reversed(res_hidden_states_tuple), strict=False):
            if self.has_freeu and self.s1 and self.s2 and self.b1 and self.b2:
                h, skip = apply_freeu(self.resolution_idx, h, skip, s1=self.s1, s2=self.s2, b1=self.b1, b2=self.b2)
            h = self._attend(attention, self._run(resnet, torch.cat([h, skip], dim=1), temb), conditions)
        for upsampler in self.upsamplers or ():
            if isinstance(upsampler, ResnetBlock2D):
                h = upsampler(h, temb) if _is_double(h, upsample_size) else upsampler(h, temb, upsample_size)
            else:
                h = upsampler(h, upsample_size)  # (B, C', H', W')
        return h


class AttnUpBlock2D(UpBlock2D):
    """A level on the way up with attention over pixels."""

    attention, has_freeu = "self", False


class CrossAttnUpBlock2D(UpBlock2D):
    """A level on the way up with transformers that look at the context."""

    attention, has_cross_attention = "cross", True


class ResnetUpsampleBlock2D(UpBlock2D):
    """A level on the way up without attention, whose size a residual block changes."""

    has_freeu = False


class SimpleCrossAttnUpBlock2D(UpBlock2D):
    """A level on the way up with attention over pixels and context at once."""

    attention, has_cross_attention, has_freeu = "added", True, False


def _is_double(x: Tensor, size: tuple[int, int] | None) -> bool:
    return size is None or tuple(size) == (2 * x.shape[2], 2 * x.shape[3])


def _by_name(*blocks: type[B]) -> dict[str, type[B]]:
    return {block.__name__: block for block in blocks}


DOWN_BLOCKS: dict[str, type[nn.Module]] = {
    **_by_name(DownBlock2D, AttnDownBlock2D, CrossAttnDownBlock2D, ResnetDownsampleBlock2D, SimpleCrossAttnDownBlock2D),
    **_by_name(KDownBlock2D, KCrossAttnDownBlock2D, SkipDownBlock2D, AttnSkipDownBlock2D),
}
MID_BLOCKS = _by_name(UNetMidBlock2D, UNetMidBlock2DCrossAttn, UNetMidBlock2DSimpleCrossAttn)
MID_BLOCKS["ResnetMidBlock2D"] = UNetMidBlock2D
UP_BLOCKS: dict[str, type[nn.Module]] = {
    **_by_name(UpBlock2D, AttnUpBlock2D, CrossAttnUpBlock2D, ResnetUpsampleBlock2D, SimpleCrossAttnUpBlock2D),
    **_by_name(KUpBlock2D, KCrossAttnUpBlock2D, SkipUpBlock2D, AttnSkipUpBlock2D),
}
