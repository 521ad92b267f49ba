"""The denoising UNet ε_θ(z_t, t, τ_θ(y)) of latent diffusion (Rombach et al., arXiv:2112.10752, 3.2, figure 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm_fast.layers import (
    Downsample,
    GroupNorm,
    ResBlock,
    SelfAttention2d,
    SpatialTransformer,
    TextTimeEmbedding,
    TimestepEmbedding,
    Upsample,
    sinusoidal_embedding,
)

DOWN_BLOCK_TYPES = ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D")
MID_BLOCK_TYPES = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn")


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet; field names are those of diffusers. The defaults are Stable Diffusion 1.x.

    A level of `down_block_types` has no attention ("DownBlock2D"), self attention ("AttnDownBlock2D") or a spatial
    transformer with cross attention ("CrossAttnDownBlock2D"); the up path mirrors it. `num_attention_heads` holds for all
    levels or is given level by level.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int | None = 768
    transformer_layers_per_block: int = 1
    num_attention_heads: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    resnet_time_scale_shift: str = "default"
    resample_type: str = "conv"
    num_class_embeds: int | None = None
    addition_embed_type: str | None = None  # "text": the context, pooled, joins the time embedding
    addition_embed_type_num_heads: int = 64
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if len(self.down_block_types) != levels:
            raise ValueError(f"UNetConfig: down_block_types needs {levels} entries, got {self.down_block_types}")
        for name, value, allowed in (
            *(("down_block_types", t, DOWN_BLOCK_TYPES) for t in self.down_block_types),
            ("mid_block_type", self.mid_block_type, MID_BLOCK_TYPES),
            ("resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift")),
            ("addition_embed_type", self.addition_embed_type, (None, "text")),
            ("resample_type", self.resample_type, ("conv", "resnet")),
        ):
            if value not in allowed:
                raise ValueError(f"UNetConfig: {name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"UNetConfig: norm_num_groups {self.norm_num_groups} must divide {channels} channels")

    def heads(self, level: int) -> tuple[int, int]:
        """(number of heads, width of one head) at a level."""
        channels, given = self.block_out_channels[level], self.num_attention_heads
        heads = given if isinstance(given, int) else given[level]
        if channels % heads:
            raise ValueError(f"UNetConfig: {channels} channels do not divide into {heads} heads")
        return heads, channels // heads


@dataclass
class UNetOutput:
    sample: Tensor  # (B, out_channels, H, W)


class UNet(nn.Module):
    """UNet(config)(sample, timestep, encoder_hidden_states) → prediction in the parameterisation it was trained in.

    Shapes in the comments are for the first-level size H × W; sizes that are not multiples of 2^levels work, since
    upsampling goes to the size of the skip connection.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        time_channels = 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_channels)
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_channels)
        else:
            self.class_embedding = None
        self.add_embedding = None
        if config.addition_embed_type == "text":
            heads = config.addition_embed_type_num_heads
            self.add_embedding = TextTimeEmbedding(config.cross_attention_dim, time_channels, heads)

        levels = range(len(channels))
        self.down_blocks = nn.ModuleList(DownBlock(config, level, time_channels) for level in levels)
        self.mid_block = MidBlock(config, time_channels)
        self.up_blocks = nn.ModuleList(UpBlock(config, level, time_channels) for level in reversed(levels))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    @torch.no_grad()
    def zero_residuals(self) -> None:
        """Sets the last layer of every residual branch, and of the whole, to zero: how training is to start."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                last = module.conv2
            elif isinstance(module, SpatialTransformer):
                last = module.proj_out
            elif isinstance(module, SelfAttention2d):
                last = module.to_out[0]
            else:
                continue
            last.weight.zero_()
            last.bias.zero_()
        self.conv_out.weight.zero_()
        self.conv_out.bias.zero_()

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        """One evaluation of the network.

        Args:
            sample: z_t, (B, in_channels, H, W).
            timestep: int, float, 0-d or (B,) tensor.
            encoder_hidden_states: context τ_θ(y), (B, L, cross_attention_dim); needed by cross attention.
            class_labels: (B,) int64, for a UNet with class embeddings (conditioning key "adm").
            encoder_attention_mask: (B, L), True = attend, or additive.
            return_dict: `UNetOutput` if True, else a tuple with the sample.

        Raises:
            ValueError: an input is missing or has the wrong shape.
        """
        self._check(sample, timestep, encoder_hidden_states, encoder_attention_mask, class_labels)
        temb = self._embed(sample, timestep, encoder_hidden_states, class_labels)  # (B, 4 C)
        context, mask = encoder_hidden_states, encoder_attention_mask
        mask = mask[:, None, None, :] if mask is not None else None  # (B, 1, 1, L)

        h = self.conv_in(sample)  # (B, C, H, W)
        skips = [h]
        for block in self.down_blocks:
            h, skips_of_block = block(h, temb, context, mask)  # (B, C', H/2, W/2)
            skips += skips_of_block
        h = self.mid_block(h, temb, context, mask)
        for block in self.up_blocks:
            h = block(h, skips, temb, context, mask)  # (B, C', 2H, 2W)
        h = self.conv_out(self.conv_norm_out(h, "silu"))  # (B, out, H, W)
        return UNetOutput(h) if return_dict else (h,)

    def _embed(
        self, sample: Tensor, timestep: Tensor | float | int, context: Tensor | None, class_labels: Tensor | None
    ) -> Tensor:
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])  # (B,)
        temb = self.time_embedding(sinusoidal_embedding(t, self.config.block_out_channels[0]).to(sample.dtype))
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(class_labels)
        if self.add_embedding is not None:
            temb = temb + self.add_embedding(context)
        return temb

    def _check(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        context: Tensor | None,
        mask: Tensor | None,
        class_labels: Tensor | None,
    ) -> None:
        config = self.config
        if sample.ndim != 4 or sample.shape[1] != config.in_channels:
            raise ValueError(f"UNet: sample must be (B, {config.in_channels}, H, W), got {tuple(sample.shape)}")
        batch, width = sample.shape[0], config.cross_attention_dim
        if isinstance(timestep, Tensor) and tuple(timestep.shape) not in ((), (1,), (batch,)):
            raise ValueError(f"UNet: timestep must be a number or ({batch},), got {tuple(timestep.shape)}")
        if context is None:
            if self.uses_context:
                raise ValueError("UNet: encoder_hidden_states is missing; this UNet has cross attention")
        elif width is None:
            raise ValueError("UNet: encoder_hidden_states given, but this UNet has no cross attention")
        elif context.ndim != 3 or context.shape[0] != batch or context.shape[2] != width:
            raise ValueError(f"UNet: encoder_hidden_states must be ({batch}, L, {width}), got {tuple(context.shape)}")
        if mask is not None and (context is None or tuple(mask.shape) != tuple(context.shape[:2])):
            needed = "None without encoder_hidden_states" if context is None else tuple(context.shape[:2])
            raise ValueError(f"UNet: encoder_attention_mask must be {needed}, got {tuple(mask.shape)}")
        if (class_labels is None) != (self.class_embedding is None):
            needed = "needs" if class_labels is None else "does not take"
            raise ValueError(f"UNet: this UNet {needed} class_labels (num_class_embeds is {config.num_class_embeds})")
        if class_labels is not None and tuple(class_labels.shape) != (batch,):
            raise ValueError(f"UNet: class_labels must be ({batch},), got {tuple(class_labels.shape)}")

    @property
    def uses_context(self) -> bool:
        """Whether any block has cross attention."""
        config = self.config
        types = (*config.down_block_types, config.mid_block_type)
        return config.cross_attention_dim is not None and any("CrossAttn" in t for t in types)


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


def _attention(config: UNetConfig, level: int, block_type: str) -> nn.Module:
    channels = config.block_out_channels[level]
    heads, head_dim = config.heads(level)
    if "CrossAttn" not in block_type:
        return SelfAttention2d(channels, heads=heads, head_dim=head_dim, groups=config.norm_num_groups)
    return SpatialTransformer(
        channels,
        heads=heads,
        head_dim=head_dim,
        context_channels=config.cross_attention_dim,
        depth=config.transformer_layers_per_block,
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
    )


def _attentions(config: UNetConfig, level: int, count: int) -> nn.ModuleList | None:
    block_type = config.down_block_types[level]
    if block_type == "DownBlock2D":
        return None
    return nn.ModuleList(_attention(config, level, block_type) for _ in range(count))


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, attention after each, then a reduction by 2 (not at the last)."""

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels = config.block_out_channels
        inputs, outputs = channels[max(level - 1, 0)], channels[level]
        self.resnets = nn.ModuleList(
            _res_block(config, inputs if i == 0 else outputs, outputs, time_channels)
            for i in range(config.layers_per_block)
        )
        self.attentions = _attentions(config, level, config.layers_per_block)
        self.downsamplers = None
        if level < len(channels) - 1:
            resnet = config.resample_type == "resnet"
            down = _res_block(config, outputs, outputs, time_channels, "down") if resnet else Downsample(outputs)
            self.downsamplers = nn.ModuleList([down])

    def forward(
        self, h: Tensor, temb: Tensor, context: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, temb)
            if self.attentions is not None:
                h = self.attentions[i](h, context, mask)
            skips.append(h)
        if self.downsamplers is not None:
            h = self.downsamplers[0](h, temb)
            skips.append(h)
        return h, skips


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig, time_channels: int):
        super().__init__()
        channels = config.block_out_channels[-1]
        level = len(config.block_out_channels) - 1
        self.resnets = nn.ModuleList(_res_block(config, channels, channels, time_channels) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(config, level, config.mid_block_type)])

    def forward(self, h: Tensor, temb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        h = self.resnets[0](h, temb)
        h = self.attentions[0](h, context, mask)
        return self.resnets[1](h, temb)


class UpBlock(nn.Module):
    """One level on the way up: residual blocks over h and a skip each, attention after each, then doubling."""

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
        self.attentions = _attentions(config, level, count)
        self.upsamplers = None
        if level > 0:
            resnet = config.resample_type == "resnet"
            up = _res_block(config, outputs, outputs, time_channels, "up") if resnet else Upsample(outputs)
            self.upsamplers = nn.ModuleList([up])

    def forward(
        self, h: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), temb)
            if self.attentions is not None:
                h = self.attentions[i](h, context, mask)
        if self.upsamplers is not None:
            h = self.upsamplers[0](h, temb, size=tuple(skips[-1].shape[2:]))
        return h
