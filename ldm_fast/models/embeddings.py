"""What makes up the UNet's time embedding: timesteps, labels, and texts as one vector each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.models.memory import open_scope


def sinusoidal_embedding(t: Tensor, channels: int, max_period: float = 10000.0) -> Tensor:
    """Return cos and sin of t (B,) at `channels`/2 frequencies, (B, channels) float32 (arXiv:2006.11239)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, channels % 2))


class Timesteps(nn.Module):
    """`sinusoidal_embedding` as a module, since programs that copy parts of a UNet expect one."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, t: Tensor) -> Tensor:
        return sinusoidal_embedding(t, self.channels)


class TimestepEmbedding(nn.Module):
    """A two-layer network on top of a sinusoidal embedding, or of any other vector, (B, in) → (B, out).

    `condition_channels` is the width of a condition that is projected and added first (arXiv:2310.04378: the guidance
    scale). The embeddings of a whole schedule may be computed at once, to be looked up later.
    """

    def __init__(self, in_channels: int, out_channels: int, condition_channels: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.cond_proj = None if condition_channels is None else nn.Linear(condition_channels, in_channels, bias=False)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            assert self.cond_proj is not None, "TimestepEmbedding: there is no projection of the condition"
            x = x + self.cond_proj(condition)
        embedding: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return embedding

    @torch.no_grad()
    def remember(self, t: Tensor, x: Tensor) -> None:
        """Keep the embeddings of timesteps t (T,), whose vectors are x (T, in), in this scope of `fixed_weights`."""
        layers = (self.linear_1, self.linear_2)
        if (scope := open_scope(x, layers)) is not None:
            scope[layers] = dict(zip(t.float().tolist(), self(x), strict=True))

    def look_up(self, t: Tensor | float, like: Tensor) -> Tensor | None:
        """Return the embeddings (1 or B, out) that are remembered of these timesteps, like `like` in dtype and device.

        None if one is not, or if looking at its value means waiting for a GPU.
        """
        layers = (self.linear_1, self.linear_2)
        scope = open_scope(like, layers)
        if scope is None or layers not in scope or (isinstance(t, Tensor) and not t.is_cpu):
            return None
        rows = [scope[layers].get(value) for value in torch.as_tensor(t).float().reshape(-1).tolist()]
        if any(row is None or (row.dtype, row.device) != (like.dtype, like.device) for row in rows):
            return None
        return torch.stack(rows)


class AttentionPooling(nn.Module):
    """A sequence as one vector: attention from its mean (with a learned offset) to itself, (B, L, C) → (B, C)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, channels) / channels**0.5)
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True) + self.positional_embedding  # (B, 1, C)
        x = torch.cat([mean, x], dim=1)  # (B, 1 + L, C)
        projected = self.q_proj(mean), self.k_proj(x), self.v_proj(x)
        q, k, v = (torch.unflatten(t, -1, (self.heads, -1)).transpose(1, 2) for t in projected)
        return ops.attention(q, k, v).transpose(1, 2).flatten(1)


class TextTimeEmbedding(nn.Module):
    """The whole context as one vector to add to the time embedding, (B, L, C) → (B, out_channels)."""

    def __init__(self, channels: int, out_channels: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.pool = AttentionPooling(channels, heads)
        self.proj = nn.Linear(channels, out_channels)
        self.norm2 = nn.LayerNorm(out_channels)

    def forward(self, context: Tensor) -> Tensor:
        embedding: Tensor = self.norm2(self.proj(self.pool(self.norm1(context))))
        return embedding


def class_embedding(config: UNetConfig, time_channels: int) -> nn.Module | None:
    """Return what embeds class labels, None if the model takes none."""
    kind, width = config.class_embed_type, "projection_class_embeddings_input_dim"
    if kind == "timestep":
        return TimestepEmbedding(config.block_out_channels[0], time_channels)
    if kind == "projection":
        return TimestepEmbedding(config.given(width), time_channels)
    if kind == "simple_projection":
        return nn.Linear(config.given(width), time_channels)
    if kind == "identity":
        return nn.Identity()
    return None if config.num_class_embeds is None else nn.Embedding(config.num_class_embeds, time_channels)


def class_label_shape(config: UNetConfig, batch: int) -> tuple[int, ...]:
    """Return the shape of the labels that `class_embedding` takes: a number for each image, or a vector."""
    if config.class_embed_type == "identity":
        return batch, 4 * config.block_out_channels[0]
    if config.class_embed_type in ("projection", "simple_projection"):
        return batch, config.given("projection_class_embeddings_input_dim")
    return (batch,)


def add_embedding(config: UNetConfig, time_channels: int) -> nn.Module | None:
    """Return what embeds the pooled text, None if the model takes none."""
    if config.addition_embed_type == "text":
        width = config.encoder_hid_dim or config.given("cross_attention_dim")
        return TextTimeEmbedding(width, time_channels, config.addition_embed_type_num_heads)
    if config.addition_embed_type == "text_time":
        return TimestepEmbedding(config.given("projection_class_embeddings_input_dim"), time_channels)
    return None
