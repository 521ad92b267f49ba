"""Whether the parts of a checkpoint are a whole model that `LatentDiffusion.generate` can run, and its settings."""

from __future__ import annotations

from typing import Any

from ldm_fast.checkpoints.found import NO_SCHEDULE, OUR_FILE, Checkpoint
from ldm_fast.configs.diffusion import Defaults
from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.encoders import ConditionEncoder, TransformerEmbedder
from ldm_fast.models.unet import UNet

OPEN_CLIP_LAYERS = 24  # of Stable Diffusion 2.x's text encoder; that of 1.x has 12


def whole_parts(checkpoint: Checkpoint, cond_stage: Any) -> tuple[UNet, AutoencoderKL | VQModel, NoiseSchedule]:
    """Return UNet, first stage and schedule. ValueError unless they and `cond_stage` are a model for `generate`."""
    found, schedule = checkpoint.found, checkpoint.schedule
    unet, first_stage = checkpoint.unet, checkpoint.first_stage
    if unet is None or first_stage is None or schedule is None:
        parts = {"unet": unet, "first_stage": first_stage, "schedule": schedule}
        missing = ", ".join(name for name, part in parts.items() if part is None)
        why = "".join(f" ({reason})" for reason in found.ignored.get(NO_SCHEDULE, ()))
        raise ValueError(f"{found.path} is not a whole model: there is no {missing}{why}")
    if found.model != OUR_FILE:  # what is in a file of ours was a whole model when it was saved
        if (need := _need_of_another_pipeline(unet.config, first_stage.config)) is not None:
            raise ValueError(f"{found.path}: {need}; run it in diffusers' pipeline, with ldm_fast.accelerate")
        if (complete := _with_a_tokenizer(cond_stage)) is not None:
            raise ValueError(f"{found.path} holds a text encoder without its tokenizer; give cond_stage, {complete}")
    return unet, first_stage, schedule


def _need_of_another_pipeline(unet: UNetConfig, first_stage: AutoencoderConfig) -> str | None:
    """Return what the model needs and `generate` would silently leave out; None if there is no such thing."""
    if unet.addition_embed_type == "text_time":
        return "it is a Stable Diffusion XL"
    if unet.time_cond_proj_dim is not None:
        return f"it is a latent consistency model (time_cond_proj_dim {unet.time_cond_proj_dim})"
    shifts = {name: getattr(first_stage, name) for name in ("shift_factor", "latents_mean", "latents_std")}
    return next((f"its first stage has {name} {value}" for name, value in shifts.items() if value), None)


def _with_a_tokenizer(cond_stage: Any) -> str | None:
    """Return how to complete a text encoder that is only a network; None if it is not one."""
    network = "checkpoint.cond_stage"
    if isinstance(cond_stage, TransformerEmbedder):
        return f"ldm_fast.models.encoders.BertTextEncoder.from_transformer(tokenizer, {network})"
    if type(cond_stage).__module__.startswith("transformers"):
        # Stable Diffusion 2.x takes the last layer but one of 24; if a file lacks the last, all of 23.
        skip = ", skip=1" if cond_stage.config.num_hidden_layers == OPEN_CLIP_LAYERS else ""
        return f"ldm_fast.models.clip.CLIPTextEncoder({network}, tokenizer{skip})"
    return None


def default_settings(cond_stage: ConditionEncoder | None) -> Defaults:
    """Return the settings that the published models were shown with."""
    if cond_stage is None or not cond_stage.has_unconditional:
        return Defaults(steps=50, guidance=1.0, spacing="leading")
    return Defaults(steps=50, guidance=7.5 if cond_stage.takes_text else 3.0, spacing="leading")
