"""The layers that UNet and first stage are made of. They hold weights and call `ldm_fast.ops`, nothing more.

Classes, sub-modules, attributes and arguments have diffusers' names: LoRA, ControlNet and IP-Adapter files address
modules by name, and other programs find classes by name, call layers in our place and replace how they compute.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.models.attention import Attention, to_map, to_tokens
from ldm_fast.models.attention_processors import NOTHING
from ldm_fast.models.image_prompts import Context, text_and_images
from ldm_fast.models.recompute import Recomputed


class GroupNorm(nn.GroupNorm):
    """Group norm with the scale-shift modulation and the activation that follow it: `ops.group_norm_silu`."""

    def forward(
        self, x: Tensor, activation: str | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return ops.group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, activation=activation, scale=scale, shift=shift
        )


def norm_and_activation(
    norm: nn.Module, activation: nn.Module, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Return activation(norm(x) · (1 + scale) + shift): one op, unless the norm was replaced or the activation differs.

    Programs replace `norm.forward` by functions of x alone.
    """
    if type(norm) is GroupNorm and "forward" not in norm.__dict__ and type(activation) is nn.SiLU:
        fused: Tensor = norm(x, "silu", scale, shift)
        return fused
    h: Tensor = norm(x)
    if scale is not None and shift is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    out: Tensor = activation(h)
    return out


class ResnetBlock2D(nn.Module):
    """norm-silu-conv twice around a time embedding, plus the input (LDM's ResBlock).

    With `scale_shift` the time embedding modulates the second norm, instead of being added before it. If `resample` is
    "up" or "down", both branches change their size by 2 between the first norm and the first convolution. With
    `skip_time_act` there is no activation before the projection of the time embedding. The sum is divided by
    `out_scale`.
    """

    pre_norm = True
    use_conv_shortcut = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_channels: int | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        scale_shift: bool = False,
        resample: str | None = None,
        dropout: float = 0.0,
        nonlinearity: nn.Module | None = None,
        skip_time_act: bool = False,
        out_scale: float = 1.0,
    ):
        super().__init__()
        self.skip_time_act, self.output_scale_factor = skip_time_act, out_scale
        self.in_channels, self.out_channels = in_channels, out_channels
        self.time_embedding_norm = "scale_shift" if scale_shift else "default"
        self.up, self.down = resample == "up", resample == "down"
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj: nn.Linear | None = None
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = nonlinearity or nn.SiLU()
        self.upsample = Upsample2D(in_channels, use_conv=False) if self.up else None
        self.downsample = Downsample2D(in_channels, use_conv=False) if self.down else None
        self.use_in_shortcut = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if self.use_in_shortcut else None

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None = None, output_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Return (B, C', H', W'), given (B, C, H, W) and the time embedding (B, time channels)."""
        x, h = input_tensor, norm_and_activation(self.norm1, self.nonlinearity, input_tensor)  # (B, C, H, W)
        if self.upsample is not None:
            h, x = (self.upsample(t, output_size) for t in (h, x))
        elif self.downsample is not None:
            h, x = self.downsample(h), self.downsample(x)
        h = self.conv1(h)  # (B, C', H', W')
        scale = shift = None
        if self.time_emb_proj is not None:
            assert temb is not None, "ResnetBlock2D: the time embedding is missing"
            emb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))  # (B, C') or (B, 2 C')
            if self.time_embedding_norm == "scale_shift":
                scale, shift = emb.chunk(2, dim=1)
            else:
                h = h + emb[:, :, None, None]
        h = self.conv2(self.dropout(norm_and_activation(self.norm2, self.nonlinearity, h, scale, shift)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        out: Tensor = x + h
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor


def upsample_nearest(x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Return x twice as large, or of `size`: that of the skip connection, which may be odd."""
    return F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size)


class Downsample2D(nn.Module):
    """3×3 convolution of stride 2, or without `use_conv` the average of 2×2 pixels.

    In the first stage the convolution pads asymmetrically, on the right and below only.
    """

    def __init__(self, channels: int, *, use_conv: bool = True, asymmetric: bool = False):
        super().__init__()
        self.channels = self.out_channels = channels
        self.use_conv, self.padding = use_conv, 0 if asymmetric else 1
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=self.padding) if use_conv else nn.AvgPool2d(2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        asymmetric = self.use_conv and self.padding == 0
        h: Tensor = self.conv(F.pad(hidden_states, (0, 1, 0, 1)) if asymmetric else hidden_states)
        return h


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling and, with `use_conv`, a 3×3 convolution."""

    def __init__(self, channels: int, *, use_conv: bool = True):
        super().__init__()
        self.channels = self.out_channels = channels
        self.use_conv = use_conv
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        h = upsample_nearest(hidden_states, output_size)
        out: Tensor = h if self.conv is None else self.conv(h)
        return out


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer, arXiv:2002.05202)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = torch.chunk(self.proj(x), 2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to `factor` times the width, and a projection back."""

    def __init__(self, channels: int, *, factor: int = 4):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, factor * channels), nn.Dropout(0.0), nn.Linear(factor * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.net(x)
        return h


class BasicTransformerBlock(nn.Module):
    """Self attention, cross attention, feed-forward, each after a layer norm and around a residual.

    With `only_cross_attention` the first attention looks at the context, too.
    """

    norm_type = "layer_norm"  # programs that compute the block in our place ask for the other kinds
    use_layer_norm = True
    use_ada_layer_norm = use_ada_layer_norm_zero = use_ada_layer_norm_single = use_ada_layer_norm_continuous = False
    double_self_attention = False

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        context_channels: int | None,
        only_cross_attention: bool = False,
        upcast_attention: bool = False,
    ):
        super().__init__()
        self.dim, self.num_attention_heads, self.attention_head_dim = channels, heads, head_dim
        self.cross_attention_dim, self.only_cross_attention = context_channels, only_cross_attention
        self.pos_embed = None
        attention = functools.partial(
            Attention, channels, heads=heads, head_dim=head_dim, upcast_attention=upcast_attention
        )
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = attention(context_channels=context_channels if only_cross_attention else None)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = attention(context_channels=context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Context = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> Tensor:
        """Return (B, N, C), given such tokens. Masks are those of `Attention.forward`."""
        h, more = hidden_states, cross_attention_kwargs or NOTHING
        own = text_and_images(encoder_hidden_states)[0] if self.only_cross_attention else None
        h = h + self.attn1(self.norm1(h), encoder_hidden_states=own, attention_mask=attention_mask, **more)
        h = h + self.attn2(
            self.norm2(h), encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **more
        )
        out: Tensor = h + self.ff(self.norm3(h))
        return out


class TransformerOutput(NamedTuple):
    """What `Transformer2DModel` returns: `output.sample`, or `output[0]`."""

    sample: Tensor  # (B, C, H, W)


class Transformer2DModel(Recomputed):
    """Transformer blocks over the pixels of a map (LDM's SpatialTransformer)."""

    is_input_continuous = True

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        context_channels: int | None,
        depth: int = 1,
        groups: int = 32,
        linear: bool = False,
        only_cross_attention: bool = False,
        upcast_attention: bool = False,
    ):
        super().__init__()
        inner = heads * head_dim
        self.in_channels = self.out_channels = channels
        self.num_attention_heads, self.attention_head_dim, self.inner_dim = heads, head_dim, inner
        self.use_linear_projection = linear
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner,
                heads=heads,
                head_dim=head_dim,
                context_channels=context_channels,
                only_cross_attention=only_cross_attention,
                upcast_attention=upcast_attention,
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(inner, channels) if linear else nn.Conv2d(inner, channels, 1)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Context = None,
        timestep: Any = None,
        added_cond_kwargs: Any = None,
        class_labels: Any = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Tensor]:
        """Return a map like hidden_states, (B, C, H, W).

        Masks (B, keys) hold 1 for keys that count and 0 for others; masks of more dimensions are added to the scores.
        """
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": bias(attention_mask, hidden_states),
            "encoder_attention_mask": bias(encoder_attention_mask, hidden_states),
            "timestep": timestep,
            "cross_attention_kwargs": cross_attention_kwargs,
            "class_labels": class_labels,
        }
        out: Tensor = self._run(self._transform, hidden_states, given)
        return TransformerOutput(out) if return_dict else (out,)

    def _transform(self, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        h: Tensor = self.norm(x)  # (B, C, H, W)
        h = self.proj_in(to_tokens(h)) if self.use_linear_projection else to_tokens(self.proj_in(h))  # (B, H·W, C)
        for block in self.transformer_blocks:
            h = block(h, **given)
        h = to_map(self.proj_out(h), x) if self.use_linear_projection else self.proj_out(to_map(h, x))
        return x + h


def bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a mask (B, keys), 1 = attend, as what is added to the scores, (B, 1, keys): 0, and -10000 for a 0."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(like.dtype)) * -10000.0)[:, None, :]
