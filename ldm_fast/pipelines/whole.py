"""A checkpoint as a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_fast.checkpoints.load import load
from ldm_fast.configs.diffusion import Defaults
from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.interop.names import Config
from ldm_fast.models.clip import load_text_encoder
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion


def _needs_of_other_pipelines(unet: UNetConfig, first_stage: AutoencoderConfig) -> str | None:
    """What `generate` would sample wrongly without a word."""
    if unet.addition_embed_type == "text_time":
        return "it is a Stable Diffusion XL"
    if unet.time_cond_proj_dim is not None:
        return f"it is a latent consistency model (time_cond_proj_dim {unet.time_cond_proj_dim})"
    shifts = {name: getattr(first_stage, name) for name in ("shift_factor", "latents_mean", "latents_std")}
    return next((f"its first stage has {name} {value}" for name, value in shifts.items() if value), None)


def _defaults(cond_stage: nn.Module | None) -> Defaults:
    """The settings that the published models were shown with."""
    if hasattr(cond_stage, "tokenizer"):
        return Defaults(steps=50, guidance=7.5, spacing="leading")
    has_null = getattr(getattr(cond_stage, "config", None), "null_class", None) is not None
    return Defaults(steps=50, guidance=3.0 if has_null else 1.0, spacing="leading")


def load_pipeline(
    path: str | Path, config: Config | Mapping[str, Any] | None = None, variant: str | None = None
) -> LatentDiffusion:
    """The whole model in a folder as diffusers writes it, with its text encoder, or in a checkpoint of the original
    code whose condition needs no tokenizer; float32.

    Arguments and errors as for `load` and `Checkpoint.pipeline`; FileNotFoundError where a folder lacks an encoder.
    """
    checkpoint = load(path, config=config, variant=variant, torch_dtype=torch.float32)
    missing = checkpoint.cond_stage is None and checkpoint.conditioning_key == "crossattn"
    model = checkpoint.pipeline(load_text_encoder(path, variant=variant) if missing and Path(path).is_dir() else None)
    model.origin = f"{Path(path).name} ({checkpoint.found.model})"
    return model.eval()
