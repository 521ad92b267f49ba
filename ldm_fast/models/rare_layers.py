"""Layers that few published UNets have, in plain PyTorch: those of Kandinsky and DeepFloyd IF.

Sub-modules have diffusers' names and stand in its order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.models.embeddings import activation
from ldm_fast.models.layers import (
    Conditions,
    GroupNorm,
    ResBlock,
    SelfAttention2d,
    _resample,
    _to_map,
    _to_tokens,
    upsample_nearest,
)


class PlainResBlock(ResBlock):
    """ResBlock with another activation, a smaller output (divided by `out_scale`), or a time embedding as it is.

    With `skip_time_act` there is no activation before the projection of the time embedding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        act: str = "silu",
        skip_time_act: bool = False,
        out_scale: float = 1.0,
        **others: Any,
    ):
        super().__init__(in_channels, out_channels, **others)
        self.nonlinearity = activation(act)
        self.skip_time_act = skip_time_act
        self.output_scale_factor = out_scale

    def forward(self, x: Tensor, temb: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        h = self.nonlinearity(self.norm1(x))  # (B, C, H, W)
        if self.resample is not None:
            h, x = (_resample(t, self.resample, size) for t in (h, x))
        h = self.conv1(h)  # (B, C', H', W')
        scale = shift = None
        if self.time_emb_proj is not None:
            assert temb is not None, "ResBlock: the time embedding is missing"
            emb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))  # (B, C') or (B, 2 C')
            if self.scale_shift:
                scale, shift = emb.chunk(2, dim=1)
            else:
                h = h + emb[:, :, None, None]
        h = self.nonlinearity(self.norm2(h, None, scale, shift))
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        out: Tensor = (x + h) / self.output_scale_factor
        return out


class Pool(nn.Module):
    """A reduction by 2 without weights: the mean of 2×2 pixels."""

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        return F.avg_pool2d(x, 2)


class Nearest(nn.Module):
    """A doubling without weights."""

    def forward(self, x: Tensor, temb: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        return upsample_nearest(x, size)


class ScaledSelfAttention(SelfAttention2d):
    """SelfAttention2d whose output is divided by `scale`."""

    def __init__(self, scale: float, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rescale_output_factor = scale

    def forward(self, x: Tensor, conditions: Conditions | None = None) -> Tensor:  # type: ignore[override]  # of a map
        return super().forward(x, conditions) / self.rescale_output_factor


class AddedKVAttention(nn.Module):
    """Attention from the pixels of a map to a context and to themselves at once (DeepFloyd IF, Kandinsky).

    Keys and values of the context have projections of their own; with `only_cross_attention` there are no others.
    `norm` is that of the context: None, "layer_norm" or "group_norm".
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        context_channels: int,
        groups: int = 32,
        only_cross_attention: bool = False,
        norm: str | None = None,
    ):
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.group_norm = GroupNorm(groups, channels, 1e-5)
        self.norm_cross: nn.Module | None = None
        if norm == "layer_norm":
            self.norm_cross = nn.LayerNorm(channels)
        elif norm == "group_norm":
            self.norm_cross = nn.GroupNorm(32, context_channels, eps=1e-5)
        self.to_q = nn.Linear(channels, inner)
        self.to_k = None if only_cross_attention else nn.Linear(channels, inner)
        self.to_v = None if only_cross_attention else nn.Linear(channels, inner)
        self.add_k_proj = nn.Linear(context_channels, inner)
        self.add_v_proj = nn.Linear(context_channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels), nn.Dropout(0.0)])

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        tokens = _to_tokens(self.group_norm(x))  # (B, H·W, C)
        context = conditions.context
        assert context is not None, "AddedKVAttention: the context is missing"
        if isinstance(self.norm_cross, nn.GroupNorm):
            context = self.norm_cross(context.transpose(1, 2)).transpose(1, 2)
        elif self.norm_cross is not None:
            context = self.norm_cross(context)
        k, v = self.add_k_proj(context), self.add_v_proj(context)  # (B, L, inner)
        if self.to_k is not None and self.to_v is not None:
            k, v = torch.cat([k, self.to_k(tokens)], dim=1), torch.cat([v, self.to_v(tokens)], dim=1)
        mask = conditions.mask if conditions.mask is not None else conditions.context_mask
        if mask is not None:  # the pixels are never masked
            mask = F.pad(mask, (0, k.shape[1] - mask.shape[-1]))
        out = ops.attention(self._split(self.to_q(tokens)), self._split(k), self._split(v), mask=mask)  # (B, H, N, D)
        return x + _to_map(self.to_out[0](out.transpose(1, 2).flatten(2)), x)

    def _split(self, t: Tensor) -> Tensor:
        return torch.unflatten(t, -1, (self.heads, -1)).transpose(1, 2)
