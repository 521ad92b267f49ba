"""Attention that few published UNets have: that of Kandinsky and DeepFloyd IF."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.models.attention import Attention, to_map
from ldm_fast.models.image_prompts import Context, text_and_images
from ldm_fast.models.layers import GroupNorm


class AddedKVAttention(Attention):
    """Attention from the pixels of a map to a context and to themselves at once.

    Keys and values of the context have projections of their own; with `only_cross_attention` there are no others.
    `norm` is that of the context: None, "layer_norm" or "group_norm". Sub-modules stand in diffusers' order.
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
        group_norm = GroupNorm(groups, channels, 1e-5)
        super().__init__(channels, heads=heads, head_dim=head_dim, qkv_bias=True, group_norm=group_norm, residual=True)
        self.is_cross_attention, self.only_cross_attention = True, only_cross_attention
        self.added_kv_proj_dim = context_channels
        projections = {name: getattr(self, name) for name in ("to_q", "to_k", "to_v", "to_out")}
        for name in projections:
            delattr(self, name)
        if norm == "layer_norm":
            self.norm_cross = nn.LayerNorm(channels)
        elif norm == "group_norm":
            self.norm_cross = nn.GroupNorm(32, context_channels, eps=1e-5)
        self.to_q = projections["to_q"]
        self.to_k = None if only_cross_attention else projections["to_k"]
        self.to_v = None if only_cross_attention else projections["to_v"]
        self.add_k_proj = nn.Linear(context_channels, self.inner_dim)
        self.add_v_proj = nn.Linear(context_channels, self.inner_dim)
        self.to_out = projections["to_out"]

    def attend(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Context = None,
        attention_mask: Tensor | None = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        """As `Attention.attend`, to a context that must be given; attention_mask is over its tokens."""
        tokens = self._tokens(hidden_states)  # (B, H·W, C)
        context, images = text_and_images(encoder_hidden_states)
        if context is None or images is not None:
            raise ValueError(f"{self.path}: needs encoder_hidden_states, without images of IP-Adapters")
        if self.norm_cross is not None:
            context = self.norm_encoder_hidden_states(context)
        k, v = self.add_k_proj(context), self.add_v_proj(context)  # (B, L, inner)
        if self.to_k is not None and self.to_v is not None:
            k, v = torch.cat([k, self.to_k(tokens)], dim=1), torch.cat([v, self.to_v(tokens)], dim=1)
        q, k, v = self._split(self.to_q(tokens)), self._split(k), self._split(v)  # (B, H, N, D)
        mask = attention_mask
        if mask is not None:  # the pixels are never masked
            mask = self._mask(F.pad(mask, (0, k.shape[2] - mask.shape[-1])), len(q), k.shape[2])
        out = ops.attention(q, k, v, mask=mask)  # (B, H, N, D)
        return hidden_states + to_map(self.to_out[0](out.transpose(1, 2).flatten(2)), hidden_states)

    def join(self) -> None:
        """Change nothing: these projections are not computed in one product."""
