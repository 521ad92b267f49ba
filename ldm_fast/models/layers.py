"""The layers that UNet and first stage are made of. They hold weights and call `ldm_fast.ops`, nothing more.

Sub-modules have diffusers' names, since LoRA, ControlNet and IP-Adapter files address them by name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.models.attention import Attention, ImagePrompts


class GroupNorm(nn.GroupNorm):
    """Group norm with the scale-shift modulation and the activation that follow it: `ops.group_norm_silu`."""

    def forward(
        self, x: Tensor, activation: str | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return ops.group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, activation=activation, scale=scale, shift=shift
        )


class ResBlock(nn.Module):
    """norm-silu-conv twice around a time embedding, plus the input (LDM's ResBlock, diffusers' ResnetBlock2D).

    With `scale_shift` the time embedding modulates the second norm, instead of being added before it. If `resample` is
    "up" or "down", both branches change their size by 2 between the first norm and the first convolution.
    """

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
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj: nn.Linear | None = None
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        h: Tensor = self.norm1(x, "silu")  # (B, C, H, W)
        if self.resample is not None:
            h, x = (_resample(t, self.resample, size) for t in (h, x))
        h = self.conv1(h)  # (B, C', H', W')
        scale = shift = None
        if self.time_emb_proj is not None:
            assert temb is not None, "ResBlock: the time embedding is missing"
            emb = self.time_emb_proj(F.silu(temb))  # (B, C') or (B, 2 C')
            if self.scale_shift:
                scale, shift = emb.chunk(2, dim=1)
            else:
                h = h + emb[:, :, None, None]
        h = self.conv2(self.dropout(self.norm2(h, "silu", scale, shift)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h


def _resample(x: Tensor, direction: str, size: tuple[int, int] | None) -> Tensor:
    return F.avg_pool2d(x, 2) if direction == "down" else upsample_nearest(x, size)


def upsample_nearest(x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Return x twice as large, or of `size`: that of the skip connection, which may be odd."""
    return F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size)


class Downsample(nn.Module):
    """3×3 convolution of stride 2. In the first stage it pads asymmetrically, on the right and below only."""

    def __init__(self, channels: int, *, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
        return h


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        h: Tensor = self.conv(upsample_nearest(x, size))
        return h


class Conditions(NamedTuple):
    """What the attention layers of a UNet look at besides the image."""

    context: Tensor | None = None  # τ_θ(y), (B, L, context channels)
    context_mask: Tensor | None = None  # (B, 1, 1, L), added to the scores of cross attention
    mask: Tensor | None = None  # (B, 1, 1, keys), added to the scores of self attention
    images: ImagePrompts | None = None

    def mask_over(self, keys: int) -> Tensor | None:
        """Return the mask of self attention over this many keys. ValueError if it is for another number."""
        if self.mask is not None and self.mask.shape[-1] != keys:
            raise ValueError(
                f"UNet: attention_mask must be (B, {keys}) for this size, got (B, {self.mask.shape[-1]}); a UNet with "
                "self attention at several resolutions takes none"
            )
        return self.mask


class SelfAttention2d(Attention):
    """Attention over the pixels of a map, with its own norm and residual (LDM's AttentionBlock and AttnBlock)."""

    def __init__(self, channels: int, *, heads: int, head_dim: int, groups: int = 32, eps: float = 1e-5):
        super().__init__(channels, heads=heads, head_dim=head_dim, qkv_bias=True)
        projections = dict(self.named_children())
        for name in projections:
            delattr(self, name)
        self.group_norm = GroupNorm(groups, channels, eps)  # first: the order of parameters is that of diffusers
        for name, layer in projections.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor, conditions: Conditions | None = None) -> Tensor:  # type: ignore[override]  # of a map
        tokens = _to_tokens(self.group_norm(x))  # (B, H·W, C)
        mask = None if conditions is None else conditions.mask_over(tokens.shape[1])
        return x + _to_map(super().forward(tokens, mask=mask), x)


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C), contiguous: every norm and product of a view would copy it."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H·W, C) → (B, C, H, W) of the size of `like`, as a view."""
    return torch.unflatten(tokens, 1, like.shape[2:]).permute(0, 3, 1, 2)


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


class TransformerBlock(nn.Module):
    """Self attention, cross attention, feed-forward, each after a layer norm and around a residual.

    With `only_cross_attention` the first attention looks at the context, too.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        context_channels: int | None,
        only_cross_attention: bool = False,
    ):
        super().__init__()
        self.only_cross_attention = only_cross_attention
        own = context_channels if only_cross_attention else None
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads=heads, head_dim=head_dim, context_channels=own)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads=heads, head_dim=head_dim, context_channels=context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        context = conditions.context
        own = context if self.only_cross_attention else None
        mask = conditions.mask_over((x if own is None else own).shape[1])
        x = x + self.attn1(self.norm1(x), own, mask)
        x = x + self.attn2(self.norm2(x), context, conditions.context_mask, conditions.images)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a map (LDM's SpatialTransformer, diffusers' Transformer2DModel)."""

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
    ):
        super().__init__()
        inner = heads * head_dim
        self.linear = linear
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                inner,
                heads=heads,
                head_dim=head_dim,
                context_channels=context_channels,
                only_cross_attention=only_cross_attention,
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(inner, channels) if linear else nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        h: Tensor = self.norm(x)  # (B, C, H, W)
        h = self.proj_in(_to_tokens(h)) if self.linear else _to_tokens(self.proj_in(h))  # (B, H·W, C)
        for block in self.transformer_blocks:
            h = block(h, conditions)
        h = _to_map(self.proj_out(h), x) if self.linear else self.proj_out(_to_map(h, x))
        return x + h
