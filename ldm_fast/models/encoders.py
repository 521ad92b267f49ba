"""Condition encoders τ_θ (Rombach et al., arXiv:2112.10752, section 3.3 and figure 3).

An encoder turns what the user gives (words, a class, a map) into tensors. `diffusion.condition` says where a UNet takes
them in. The text encoders of Stable Diffusion are in `clip.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.configs.encoders import ClassEmbedderConfig, SpatialRescalerConfig, TextEncoderConfig, TransformerConfig
from ldm_fast.models.tokenizers import WordPieceTokenizer, WordTokenizer


class ConditionEncoder(Protocol):
    """What every encoder offers to a pipeline: the `cond_stage` of a `LatentDiffusion`."""

    @property
    def takes_text(self) -> bool:
        """Whether conditions are prompts."""

    @property
    def has_unconditional(self) -> bool:
        """Whether the model was trained with a condition that means "no condition"."""

    def __call__(self, conditions: Any, /) -> Tensor:
        """Return the encoded conditions, one row each."""

    def unconditional(self, batch: int) -> Tensor:
        """Return `batch` rows of "no condition". ValueError if the model has none."""


class ClassEmbedder(nn.Module):
    """Class label → context of one token, (B,) int64 → (B, 1, width)."""

    takes_text = False

    def __init__(self, config: ClassEmbedderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_classes, config.width)

    def forward(self, labels: Tensor | Sequence[int]) -> Tensor:
        """Return the vectors (B, 1, width) of labels (B,). Errors as for `inputs`."""
        return self.encode_inputs(self.inputs(labels))

    def inputs(self, labels: Tensor | Sequence[int]) -> Tensor:
        """Return labels (B,) as int64. TypeError if they are no integers, ValueError if one is out of range."""
        given = labels
        try:
            labels = torch.as_tensor(given)
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
        return labels

    def encode_inputs(self, labels: Tensor) -> Tensor:
        """Return the vectors (B, 1, width) of labels (B,) int64, which are not checked."""
        vectors: Tensor = self.embedding(labels.to(self.embedding.weight.device))
        return vectors[:, None]

    @property
    def has_unconditional(self) -> bool:
        """Whether there is a null class."""
        return self.config.null_class is not None

    @property
    def null_input(self) -> Tensor:
        """The label () of the null class. ValueError if there is none."""
        if self.config.null_class is None:
            raise ValueError(
                "ClassEmbedder: this model has no null class; give the class to steer away from, or guidance 1"
            )
        return torch.tensor(self.config.null_class)

    def unconditional(self, batch: int) -> Tensor:
        """Return (batch, 1, width) of the null class. ValueError if there is none."""
        return self.forward(self.null_input.expand(batch))


class SelfAttention(nn.Module):
    """Multi-head self attention of the text transformer, (B, L, width) → (B, L, width)."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        out: Tensor = self.to_out(ops.attention(q, k, v).transpose(1, 2).flatten(2))  # (B, L, width)
        return out


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
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class TransformerEmbedder(nn.Module):
    """The BERT-style transformer that LDM trains along with its text-to-image UNet, tokens (B, L) → (B, L, width)."""

    takes_text = has_unconditional = False

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
        """Encode tokens (B, L) int64, L at most `max_length`. ValueError for another shape.

        Padding is attended to: LDM's encoder was trained like that, and it makes a prompt of padding alone a proper
        unconditional context.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"TransformerEmbedder: tokens have shape {tuple(tokens.shape)}; "
                f"(B, L) with L <= {self.config.max_length} is needed"
            )
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, L, width)
        for layer in self.layers:
            x = layer(x)
        normed: Tensor = self.norm(x)
        return normed

    def unconditional(self, batch: int) -> Tensor:
        """ValueError: without a tokenizer nobody knows the tokens of the empty prompt."""
        raise ValueError("TransformerEmbedder: tokens have no unconditional input; give negative ones, or guidance 1")


class SpatialRescaler(nn.Module):
    """A map (segmentation, low-resolution image) resized to the latent, (B, C, H, W) → (B, out, h, w).

    The map may have any dtype and be on any device; the result has those of the weights.
    """

    takes_text = has_unconditional = False

    def __init__(self, config: SpatialRescalerConfig):
        super().__init__()
        self.config = config
        self.channel_mapper = nn.Conv2d(config.in_channels, config.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.channel_mapper.weight)
        for _ in range(self.config.n_stages):
            x = F.interpolate(x, scale_factor=self.config.multiplier, mode="bilinear")
        mapped: Tensor = self.channel_mapper(x)
        return mapped

    def unconditional(self, batch: int) -> Tensor:
        """ValueError: no map means "no condition"."""
        raise ValueError("SpatialRescaler: this model has no unconditional input; give a negative one, or guidance 1")


class TextEncoder(nn.Module):
    """Prompts → context for cross attention, list of B str → (B, max_length, width)."""

    tokenizer_class: type[WordTokenizer | WordPieceTokenizer] = WordTokenizer
    takes_text = has_unconditional = True

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.tokenizer: WordTokenizer | WordPieceTokenizer = self.tokenizer_class(config.vocabulary, config.max_length)
        sizes = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "vocabulary"}
        self.transformer = TransformerEmbedder(TransformerConfig(vocab_size=len(config.vocabulary), **sizes))

    @classmethod
    def from_tokenizer(cls, tokenizer: WordTokenizer, **sizes: int) -> TextEncoder:
        """Return an untrained encoder. sizes: width, depth and optionally heads, head_dim."""
        return cls(TextEncoderConfig(vocabulary=tokenizer.vocabulary, max_length=tokenizer.max_length, **sizes))

    @classmethod
    def from_transformer(
        cls, tokenizer: WordTokenizer | WordPieceTokenizer, transformer: TransformerEmbedder
    ) -> TextEncoder:
        """Return the encoder made of its two halves. ValueError if they do not fit."""
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
        """Return the context (B, max_length, width). Warns (UserWarning) as the tokenizer does."""
        return self.encode_inputs(self.inputs(prompts))

    def inputs(self, prompts: str | Sequence[str]) -> Tensor:
        """Return the tokens of the prompts, (B, max_length) int64."""
        return self.tokenizer(prompts)

    def encode_inputs(self, tokens: Tensor) -> Tensor:
        """Return the context (B, L, width) of tokens (B, L) int64."""
        context: Tensor = self.transformer(tokens.to(self.transformer.norm.weight.device))
        return context

    @property
    def null_input(self) -> Tensor:
        """The tokens (max_length,) of the empty prompt."""
        return self.tokenizer("")[0]

    def unconditional(self, batch: int) -> Tensor:
        """Return the context of the empty prompt, (batch, max_length, width)."""
        return self.forward([""]).expand(batch, -1, -1)


class BertTextEncoder(TextEncoder):
    """The text encoder of LDM's text-to-image models: the same transformer on the pieces of BERT's vocabulary."""

    tokenizer_class = WordPieceTokenizer
