"""Configurations of what encodes the condition."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CLIPShape:
    """The sizes of a CLIP text model. `projection` is the width of the pooled vector, None if it is not projected."""

    vocab_size: int
    width: int
    layers: int
    inner: int
    max_length: int
    projection: int | None
    open_clip: bool


@dataclass(frozen=True)
class ClassEmbedderConfig:
    """The shape of a table of classes, one vector each."""

    num_classes: int
    width: int
    null_class: int | None = None  # the class that means "no condition", if the model was trained with one

    @classmethod
    def published(cls, num_classes: int, width: int) -> ClassEmbedderConfig:
        """Return the configuration of a published checkpoint: with 1001 classes, the last means "no condition"."""
        return cls(num_classes, width, null_class=1000 if num_classes == 1001 else None)


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of LDM's BERT-style text transformer."""

    vocab_size: int
    width: int
    depth: int
    max_length: int = 77
    heads: int = 8
    head_dim: int = 64


@dataclass(frozen=True)
class SpatialRescalerConfig:
    """How a map is brought to the size of the latent: `n_stages` resizings by `multiplier`, then a 1×1 convolution."""

    in_channels: int
    out_channels: int
    n_stages: int = 1
    multiplier: float = 0.5


@dataclass(frozen=True)
class TextEncoderConfig:
    """A tokenizer's vocabulary, and the shape of the transformer that reads its tokens."""

    vocabulary: tuple[str, ...]
    max_length: int
    width: int
    depth: int
    heads: int = 8
    head_dim: int = 64
