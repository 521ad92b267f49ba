"""Conditioning encoders tau_theta and the conditioning keys (Rombach et al. 2022, section 3.3, figure 3).

An encoder turns what the user gives (words, a class, a map) into tensors; a conditioning key says where the UNet takes
them in: as context of its cross attention, as extra input channels, as both, or added to its time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.configs.encoders import ClassEmbedderConfig, SpatialRescalerConfig, TextEncoderConfig, TransformerConfig
from ldm_fast.models.tokenizers import WordPieceTokenizer, WordTokenizer


class ClassEmbedder(nn.Module):
    """Class label -> context of one token: (B,) int64 -> (B, 1, width)."""

    def __init__(self, config: ClassEmbedderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_classes, config.width)

    def forward(self, labels: Tensor | Sequence[int]) -> Tensor:
        """labels (B,) integers in [0, num_classes) -> (B, 1, width). ValueError for a label out of range, TypeError for
        what is no integer."""
        given = labels
        try:
            labels = torch.as_tensor(given, device=self.embedding.weight.device)
        except (TypeError, ValueError) as error:
            raise TypeError(f"ClassEmbedder: labels must be integers, got {given!r}") from error
        if labels.is_floating_point() and labels.numel():  # the dtype of an empty list says nothing
            raise TypeError(f"ClassEmbedder: labels must be integers, got {given!r}")
        labels = labels.long()
        if labels.ndim != 1:
            raise ValueError(
                f"ClassEmbedder: labels have shape {tuple(labels.shape)}; one label per image (B,) is needed"
            )
        wrong = [n for n in labels.tolist() if not 0 <= n < self.config.num_classes]
        if wrong:
            raise ValueError(f"ClassEmbedder: label {wrong[0]} is not in 0..{self.config.num_classes - 1}")
        return self.embedding(labels)[:, None]

    def unconditional(self, batch: int) -> Tensor:
        """(batch, 1, width) of the null class. ValueError where the model has none."""
        if self.config.null_class is None:
            raise ValueError(
                "ClassEmbedder: this model has no null class; give the class to steer away from, or guidance 1"
            )
        return self([self.config.null_class] * batch)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        out = ops.attention(q, k, v)  # (B, H, L, D)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, L, width)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config.width, config.heads, config.head_dim)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class TransformerEmbedder(nn.Module):
    """The BERT-style encoder that LDM trains along with its text-to-image UNet: (B, L) tokens -> (B, L, width)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) int64 with L <= max_length -> (B, L, width). Padding takes part: it is how LDM's encoder was
        trained, and what makes the all-padding prompt a proper unconditional context."""
        if tokens.ndim != 2 or tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"TransformerEmbedder: tokens have shape {tuple(tokens.shape)}; "
                f"(B, L) with L <= {self.config.max_length} is needed"
            )
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, L, width)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class SpatialRescaler(nn.Module):
    """A map (segmentation, low resolution image) brought to the latent's size: (B, C, H, W) of any dtype, on any
    device -> (B, out, h, w) of the weights'."""

    def __init__(self, config: SpatialRescalerConfig):
        super().__init__()
        self.config = config
        self.channel_mapper = nn.Conv2d(config.in_channels, config.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.channel_mapper.weight)
        for _ in range(self.config.n_stages):
            x = F.interpolate(x, scale_factor=self.config.multiplier, mode="bilinear")
        return self.channel_mapper(x)


class TextEncoder(nn.Module):
    """Prompts -> context for cross attention: list of B str -> (B, max_length, width)."""

    tokenizer_class: ClassVar[type] = WordTokenizer

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.tokenizer = self.tokenizer_class(config.vocabulary, config.max_length)
        sizes = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "vocabulary"}
        self.transformer = TransformerEmbedder(TransformerConfig(vocab_size=len(config.vocabulary), **sizes))

    @classmethod
    def from_tokenizer(cls, tokenizer: WordTokenizer, **sizes: int) -> TextEncoder:
        """sizes: width, depth and optionally heads, head_dim."""
        return cls(TextEncoderConfig(vocabulary=tokenizer.vocabulary, max_length=tokenizer.max_length, **sizes))

    @classmethod
    def from_transformer(
        cls, tokenizer: WordTokenizer | WordPieceTokenizer, transformer: TransformerEmbedder
    ) -> TextEncoder:
        """From its two halves. ValueError where they do not fit."""
        sizes = {f.name: getattr(transformer.config, f.name) for f in fields(transformer.config)}
        if (len(tokenizer), tokenizer.max_length) != (sizes.pop("vocab_size"), sizes["max_length"]):
            raise ValueError(
                f"{cls.__name__}: the tokenizer has {len(tokenizer)} tokens and max_length {tokenizer.max_length}, "
                f"the transformer {transformer.config.vocab_size} and {sizes['max_length']}"
            )
        with torch.device("meta"):
            encoder = cls(TextEncoderConfig(vocabulary=tokenizer.vocabulary, **sizes))
        encoder.tokenizer, encoder.transformer = tokenizer, transformer
        return encoder

    def forward(self, prompts: str | Sequence[str]) -> Tensor:
        return self.transformer(self.tokenizer(prompts).to(self.transformer.norm.weight.device))

    def unconditional(self, batch: int) -> Tensor:
        """The context of the empty prompt, (batch, max_length, width)."""
        return self([""]).expand(batch, -1, -1)


class BertTextEncoder(TextEncoder):
    """The text encoder of LDM's text-to-image models: the same transformer on the pieces of BERT's vocabulary."""

    tokenizer_class = WordPieceTokenizer
