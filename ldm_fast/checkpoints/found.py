"""What a checkpoint holds: found out from names and shapes, then loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_fast.checkpoints.catalogue import MODELS, compvis_to_ours, layout
from ldm_fast.checkpoints.clip_skeleton import CLIPSkeleton, as_transformers
from ldm_fast.configs.diffusion import DiffusionConfig
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.interop.names import Config, check_names
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.encoders import TransformerEmbedder
from ldm_fast.models.pretrained import assemble
from ldm_fast.models.unet import UNet

OUR_FILE = "a model of ldm_fast"
NO_SCHEDULE = "a schedule that is none of ours"
OPEN_CLIP_LAYERS = 24  # of Stable Diffusion 2.x' text encoder; that of 1.x has 12


@dataclass
class Part:
    """A model inside a checkpoint. `tensors` have the names of `layout`, "compvis" or "diffusers"."""

    config: Config
    tensors: dict[str, Tensor]
    layout: str
    where: str

    def check(self) -> None:
        """CheckpointError that names every key that is missing, unexpected or of the wrong shape."""
        entries = layout(self.config)
        if self.layout == "compvis":
            shapes = {entry.theirs: entry.their_shape for entry in entries}
        else:
            shapes = {name: entry.our_shape for entry in entries for name in entry.ours}
        check_names(self.tensors, shapes, f"{self.layout} state dict of {self}")

    def load(self, dtype: torch.dtype | None) -> nn.Module:
        """The model around the tensors as they are in memory, or in another `dtype`."""
        ours = compvis_to_ours(self.tensors, self.config) if self.layout == "compvis" else self.tensors
        model = assemble(MODELS[type(self.config)], self.config, ours, dtype, self.where)
        return as_transformers(model) if isinstance(model, CLIPSkeleton) else model

    def __str__(self) -> str:
        model = MODELS[type(self.config)].__name__.replace("Skeleton", "TextModel")
        return f"{model} ({self.where})"

    def describe(self) -> str:
        numbers = sum(tensor.numel() for tensor in self.tensors.values())
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()})
        return f"{self}: {numbers / 1e6:.1f} M numbers, {', '.join(dtypes)}, {self.layout} names"


@dataclass
class Found:
    """What a path holds. `model`: a published model's name. `ignored`: what is no weight of a model, by its kind.
    `assumed`: what nothing in the checkpoint tells, and what was taken instead."""

    path: Path
    model: str | None
    parts: dict[str, Part]
    schedule: DiffusionConfig | None = None
    scaling_factor: float = 1.0
    conditioning_key: str | None = None
    ignored: dict[str, list[str]] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)

    def leave_out(self, part: str, error: Exception) -> None:
        """Notes what is wrong with a part that nobody asked for."""
        self.parts.pop(part, None)
        self.ignored[f"the {part}, which was not asked for"] = [str(error)]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.model or 'not a published model'}"]
        lines += [f"  {name}: {part.describe()}" for name, part in self.parts.items()]
        lines += [f"  ignored, {what}: {_few(names)}" for what, names in self.ignored.items()]
        lines += [f"  assumed: {what}" for what in self.assumed]
        return "\n".join(lines)


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, … ({len(names)})"


@dataclass
class Checkpoint:
    """The models of a checkpoint; None where it has no such part."""

    found: Found
    schedule: NoiseSchedule | None = None
    scaling_factor: float = 1.0
    conditioning_key: str | None = None
    unet: UNet | None = None
    first_stage: AutoencoderKL | VQModel | None = None
    cond_stage: nn.Module | None = None
    cond_stage_2: nn.Module | None = None

    def pipeline(self, cond_stage: nn.Module | None = None) -> Any:
        """All of it as one model. `cond_stage` takes the place of the checkpoint's, which, where it is a text encoder,
        is the network alone: CLIPTextEncoder(checkpoint.cond_stage, tokenizer), say.

        ValueError where the checkpoint lacks a part or its schedule is none of ours, and for what needs more than
        `generate` gives it: Stable Diffusion XL (the pooled text and the sizes of images at every step), latent
        consistency models, latents that are shifted. diffusers' pipelines run them, with `accelerate`.
        """
        from ldm_fast.pipelines.latent_diffusion import LatentDiffusion
        from ldm_fast.pipelines.whole import _defaults, _needs_of_other_pipelines

        parts = {"unet": self.unet, "first_stage": self.first_stage, "schedule": self.schedule}
        missing = [name for name, part in parts.items() if part is None]
        if missing:
            why = "".join(f" ({reason})" for reason in self.found.ignored.get(NO_SCHEDULE, ()))
            raise ValueError(f"{self.found.path} is no whole model: there is no {', '.join(missing)}{why}")
        needs = _needs_of_other_pipelines(self.unet.config, self.first_stage.config)
        if needs is not None:
            raise ValueError(f"{self.found.path}: {needs}; run it in diffusers' pipeline, with ldm_fast.accelerate")
        cond_stage = self.cond_stage if cond_stage is None else cond_stage
        clip = type(cond_stage).__module__.startswith("transformers")
        if clip or isinstance(cond_stage, TransformerEmbedder):
            network = "checkpoint.cond_stage"
            # Stable Diffusion 2.x takes the last layer but one of 24; where a file lacks the last, all of 23.
            skip = ", skip=1" if clip and cond_stage.config.num_hidden_layers == OPEN_CLIP_LAYERS else ""
            complete = f"ldm_fast.clip.CLIPTextEncoder({network}, tokenizer{skip})"
            if not clip:
                complete = f"ldm_fast.conditioning.BertTextEncoder.from_transformer(tokenizer, {network})"
            raise ValueError(
                f"{self.found.path} holds a text encoder without its tokenizer; give cond_stage, {complete}"
            )
        return LatentDiffusion(
            **parts,
            cond_stage=cond_stage,
            scaling_factor=self.scaling_factor,
            conditioning_key=self.conditioning_key,
            defaults=_defaults(cond_stage),
        )
