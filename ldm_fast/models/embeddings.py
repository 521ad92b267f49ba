"""What makes up the UNet's time embedding: timesteps, labels, and texts as one vector each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.models.memory import open_scope


def activation(name: str) -> nn.Module:
    """Return the activation of this name, as diffusers' configurations call it."""
    kinds: dict[str, type[nn.Module]] = {"mish": nn.Mish, "gelu": nn.GELU, "relu": nn.ReLU}
    return kinds.get(name, nn.SiLU)()


def sinusoidal_embedding(
    t: Tensor, channels: int, max_period: float = 10000.0, *, cos_first: bool = True, shift: float = 0
) -> Tensor:
    """Return cos and sin of t (B,) at `channels`/2 frequencies, (B, channels) float32 (arXiv:2006.11239).

    The frequencies fall geometrically from 1 to 1/max_period, which is that of the number `channels`/2 - shift.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * steps)
    parts = [angles.cos(), angles.sin()] if cos_first else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, channels % 2))


class Timesteps(nn.Module):
    """`sinusoidal_embedding` as a module, since programs that copy parts of a UNet expect one."""

    def __init__(self, channels: int, flip_sin_to_cos: bool = True, freq_shift: float = 0):
        super().__init__()
        self.num_channels = channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.downscale_freq_shift = freq_shift

    def forward(self, t: Tensor) -> Tensor:
        return sinusoidal_embedding(
            t, self.num_channels, cos_first=self.flip_sin_to_cos, shift=self.downscale_freq_shift
        )


class GaussianFourierProjection(nn.Module):
    """Sines and cosines of t at random frequencies that are not trained, (B,) → (B, 2 · channels) (arXiv:2006.10739).

    With `log` those of ln t: t is then a noise level (arXiv:2011.13456).
    """

    def __init__(self, channels: int, *, scale: float, log: bool, flip_sin_to_cos: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels) * scale, requires_grad=False)
        self.log = log
        self.flip_sin_to_cos = flip_sin_to_cos

    def forward(self, t: Tensor) -> Tensor:
        t = torch.log(t) if self.log else t
        angles = t[:, None] * self.weight[None, :] * (2 * math.pi)
        parts = [angles.sin(), angles.cos()]
        return torch.cat(parts[::-1] if self.flip_sin_to_cos else parts, dim=-1)


def time_projection(config: UNetConfig) -> nn.Module:
    """Return what makes a vector of each timestep, (B,) → (B, timestep_channels)."""
    channels = config.block_out_channels[0]
    if config.time_embedding_type == "learned":
        return nn.Embedding(config.given("num_train_timesteps"), channels)
    if config.time_embedding_type == "positional":
        return Timesteps(channels, config.flip_sin_to_cos, config.freq_shift)
    if config.is_conditional:
        half, flip = config.time_channels // 2, config.flip_sin_to_cos
        return GaussianFourierProjection(half, scale=1.0, log=False, flip_sin_to_cos=flip)
    return GaussianFourierProjection(channels, scale=16.0, log=True, flip_sin_to_cos=False)


def time_embedding(config: UNetConfig) -> TimestepEmbedding:
    """Return the network over a timestep's vector."""
    return TimestepEmbedding(
        config.timestep_channels,
        config.time_channels,
        config.time_cond_proj_dim,
        act=config.act_fn if config.is_conditional else "silu",
        post_act=config.timestep_post_act,
    )


class TimestepEmbedding(nn.Module):
    """A two-layer network on top of a sinusoidal embedding, or of any other vector, (B, in) → (B, out).

    `condition_channels` is the width of a condition that is projected and added first (arXiv:2310.04378: the guidance
    scale). The embeddings of a whole schedule may be computed at once, to be looked up later.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        condition_channels: int | None = None,
        *,
        act: str = "silu",
        post_act: str | None = None,
    ):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.cond_proj = None if condition_channels is None else nn.Linear(condition_channels, in_channels, bias=False)
        self.act = activation(act)
        self.linear_2 = nn.Linear(out_channels, out_channels)
        self.post_act = None if post_act is None else activation(post_act)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            assert self.cond_proj is not None, "TimestepEmbedding: there is no projection of the condition"
            x = x + self.cond_proj(condition)
        embedding: Tensor = self.linear_2(self.act(self.linear_1(x)))
        return embedding if self.post_act is None else self.post_act(embedding)

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


class ImageProjection(nn.Module):
    """An image's embedding as tokens of the context, (B, C) → (B, tokens, context) (Kandinsky 2.2)."""

    def __init__(self, channels: int, context_channels: int, tokens: int = 32):
        super().__init__()
        self.num_image_text_embeds = tokens
        self.image_embeds = nn.Linear(channels, tokens * context_channels)
        self.norm = nn.LayerNorm(context_channels)

    def forward(self, image_embeds: Tensor) -> Tensor:
        tokens = self.image_embeds(image_embeds.to(self.image_embeds.weight.dtype))
        out: Tensor = self.norm(tokens.reshape(len(image_embeds), self.num_image_text_embeds, -1))
        return out


class TextImageProjection(nn.Module):
    """A text and the embedding of an image as one context, (B, L, C) and (B, context) → (B, tokens + L, context).

    The width of the image's embedding is that of the context (Kandinsky 2.1).
    """

    def __init__(self, channels: int, context_channels: int, tokens: int = 10):
        super().__init__()
        self.num_image_text_embeds = tokens
        self.image_embeds = nn.Linear(context_channels, tokens * context_channels)
        self.text_proj = nn.Linear(channels, context_channels)

    def forward(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        tokens = self.image_embeds(image_embeds).reshape(len(text_embeds), self.num_image_text_embeds, -1)
        return torch.cat([tokens, self.text_proj(text_embeds)], dim=1)


class TextImageTimeEmbedding(nn.Module):
    """Texts and images, a vector each, to add to the time embedding, (B, C) and (B, C) → (B, out) (Kandinsky 2.1)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.text_proj = nn.Linear(channels, out_channels)
        self.text_norm = nn.LayerNorm(out_channels)
        self.image_proj = nn.Linear(channels, out_channels)

    def forward(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        embedding: Tensor = self.image_proj(image_embeds) + self.text_norm(self.text_proj(text_embeds))
        return embedding


class ImageTimeEmbedding(nn.Module):
    """An image's embedding to add to the time embedding, (B, C) → (B, out) (Kandinsky 2.2)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.image_proj = nn.Linear(channels, out_channels)
        self.image_norm = nn.LayerNorm(out_channels)

    def forward(self, image_embeds: Tensor) -> Tensor:
        embedding: Tensor = self.image_norm(self.image_proj(image_embeds))
        return embedding


class ImageHintTimeEmbedding(ImageTimeEmbedding):
    """`ImageTimeEmbedding`, and what makes channels of the sample of a picture (B, 3, 8 H, 8 W) → (B, 4, H, W)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in (
            (3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2), (256, 4, 1)
        ):  # fmt: skip
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride), nn.SiLU()]
        self.input_hint_block = nn.Sequential(*layers[:-1])

    def forward(self, image_embeds: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(image_embeds), self.input_hint_block(hint)


def context_projection(config: UNetConfig) -> nn.Module | None:
    """Return what makes the context of what the model is called with; None if nothing does, or IP-Adapters will."""
    kind, width, context = config.encoder_hid_dim_type, config.encoder_hid_dim, config.cross_attention_dim
    if width is None or context is None:
        return None
    if kind == "text_image_proj":
        return TextImageProjection(width, context)
    if kind == "image_proj":
        return ImageProjection(width, context)
    return nn.Linear(width, context) if kind == "text_proj" else None


def class_embedding(config: UNetConfig) -> nn.Module | None:
    """Return what embeds class labels, None if the model takes none."""
    kind, width, time_channels = config.class_embed_type, "projection_class_embeddings_input_dim", config.time_channels
    if kind == "timestep":
        act = config.act_fn if config.is_conditional else "silu"
        return TimestepEmbedding(config.timestep_channels, time_channels, act=act)
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
        return batch, config.time_channels
    if config.class_embed_type in ("projection", "simple_projection"):
        return batch, config.given("projection_class_embeddings_input_dim")
    return (batch,)


def add_embedding(config: UNetConfig) -> nn.Module | None:
    """Return what embeds pooled texts, images or numbers, None if the model takes none."""
    kind, time_channels = config.addition_embed_type, config.time_channels
    if kind == "text":
        width = config.encoder_hid_dim or config.given("cross_attention_dim")
        return TextTimeEmbedding(width, time_channels, config.addition_embed_type_num_heads)
    if kind == "text_time":
        return TimestepEmbedding(config.given("projection_class_embeddings_input_dim"), time_channels)
    if kind == "text_image":
        return TextImageTimeEmbedding(config.given("cross_attention_dim"), time_channels)
    if kind == "image":
        return ImageTimeEmbedding(config.given("encoder_hid_dim"), time_channels)
    if kind == "image_hint":
        return ImageHintTimeEmbedding(config.given("encoder_hid_dim"), time_channels)
    return None
