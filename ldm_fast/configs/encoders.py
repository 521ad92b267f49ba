"""Configurations of what encodes the condition."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CLIPShape:
    """Sizes of a CLIP text model. `projection`: width of the pooled vector, None where it is not projected."""

    vocab_size: int
    width: int
    layers: int
    inner: int
    max_length: int
    projection: int | None
    open_clip: bool


@dataclass(frozen=True)
class ClassEmbedderConfig:
    num_classes: int
    width: int
    null_class: int | None = None  # the class that stands for "no condition", where the model was trained with one

    @classmethod
    def published(cls, num_classes: int, width: int) -> ClassEmbedderConfig:
        """Of a published checkpoint: where ImageNet has 1001 classes, the last one stands for "no condition"."""
        return cls(num_classes, width, null_class=1000 if num_classes == 1001 else None)


@dataclass(frozen=True)
class TransformerConfig:
    vocab_size: int
    width: int
    depth: int
    max_length: int = 77
    heads: int = 8
    head_dim: int = 64


@dataclass(frozen=True)
class SpatialRescalerConfig:
    in_channels: int
    out_channels: int
    n_stages: int = 1
    multiplier: float = 0.5


@dataclass(frozen=True)
class TextEncoderConfig:
    """vocab_size and max_length of the transformer are the tokenizer's."""

    vocabulary: tuple[str, ...]
    max_length: int
    width: int
    depth: int
    heads: int = 8
    head_dim: int = 64
