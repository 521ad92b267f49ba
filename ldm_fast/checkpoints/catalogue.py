"""Which model a configuration describes, and what the original code calls its tensors."""

from __future__ import annotations

from torch import nn

from ldm_fast.checkpoints.clip_skeleton import CLIPSkeleton
from ldm_fast.configs.encoders import ClassEmbedderConfig, CLIPShape, SpatialRescalerConfig, TransformerConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.interop.names import Config, Entry
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.encoders import ClassEmbedder, SpatialRescaler, TransformerEmbedder
from ldm_fast.models.pretrained import layout_of
from ldm_fast.models.unet import UNet

MODELS: dict[type, type[nn.Module]] = {
    UNetConfig: UNet,
    AutoencoderConfig: AutoencoderKL,
    VQConfig: VQModel,
    TransformerConfig: TransformerEmbedder,
    ClassEmbedderConfig: ClassEmbedder,
    SpatialRescalerConfig: SpatialRescaler,
    CLIPShape: CLIPSkeleton,
}


def layout(config: Config) -> tuple[Entry, ...]:
    """Return every tensor of the model that `config` describes, in both layouts, without allocating weights."""
    if type(config) not in MODELS:
        raise TypeError(f"layout: no model for {type(config).__name__}; known: {[c.__name__ for c in MODELS]}")
    return layout_of(MODELS[type(config)], config)
