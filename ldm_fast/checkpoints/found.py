"""What a checkpoint holds: the parts that were found, and the models that were loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_fast.checkpoints.catalogue import layout
from ldm_fast.checkpoints.clip_skeleton import CLIPSkeleton, as_transformers
from ldm_fast.configs.diffusion import Defaults, DiffusionConfig
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.interop.names import check_names, from_compvis
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.pretrained import assemble
from ldm_fast.models.unet import UNet

OUR_FILE = "a model of ldm_fast"
NO_SCHEDULE = "a schedule that we do not have"


@dataclass
class Part:
    """A model inside a checkpoint: `build(config)` with these tensors.

    config: the configuration that `build` takes.
    layout: whose names the tensors have, "compvis", "diffusers" or, in a model file of ours, "ldm_fast".
    where: the prefix of their names in the file, or the folder they are in.
    """

    build: type[nn.Module]
    config: Any
    tensors: dict[str, Tensor]
    layout: str
    where: str

    def check(self) -> None:
        """Raise a CheckpointError that names every key that is missing, unexpected or of the wrong shape."""
        entries = layout(self.config)
        if self.layout == "compvis":
            shapes = {entry.theirs: entry.their_shape for entry in entries}
        else:
            shapes = {name: entry.our_shape for entry in entries for name in entry.ours}
        check_names(self.tensors, shapes, f"{self.layout} state dict of {self}")

    def load(self, dtype: torch.dtype | None) -> nn.Module:
        """Build the model around the tensors as they are in memory, or cast to `dtype`.

        CheckpointError if they do not fit.
        """
        ours = self.tensors
        if self.layout == "compvis":
            ours = from_compvis(ours, layout(self.config), type(self.config).__name__)
        model = assemble(self.build, self.config, ours, dtype, self.where, mixed=self.layout == "ldm_fast")
        return as_transformers(model) if isinstance(model, CLIPSkeleton) else model

    def __str__(self) -> str:
        return f"{self.build.__name__.replace('Skeleton', 'TextModel')} ({self.where})"

    def describe(self) -> str:
        """Say in one line what it is and how large."""
        numbers = sum(tensor.numel() for tensor in self.tensors.values())
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()})
        return f"{self}: {numbers / 1e6:.1f} M numbers, {', '.join(dtypes)}, {self.layout} names"


@dataclass
class Found:
    """What a path holds.

    model: the name of a published model, or OUR_FILE.
    ignored: names that are not weights of a model, by their kind.
    marks: keys that say what the network predicts, "v_pred" and "ztsnr".
    assumed: what the checkpoint does not tell and was assumed.
    defaults: sampling settings, and about: the whole description, both of a model file of ours.
    """

    path: Path
    model: str | None
    parts: dict[str, Part]
    schedule: DiffusionConfig | None = None
    scaling_factor: float = 1.0
    conditioning_key: str | None = None
    ignored: dict[str, list[str]] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    defaults: Defaults | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """The file's name, and which model is in it."""
        return f"{self.path.name} " + (f"sha256:{self.about['sha256'][:16]}" if self.about else f"({self.model})")

    def leave_out(self, part: str, error: Exception) -> None:
        """Note what is wrong with a part that was not asked for, and forget the part."""
        self.parts.pop(part, None)
        self.ignored[f"the {part}, which was not asked for"] = [str(error)]

    def _describe_schedule(self, schedule: DiffusionConfig) -> str:
        betas = "" if schedule.schedule == "cosine" else f", betas from {schedule.beta_start} to {schedule.beta_end}"
        snr = ", zero terminal SNR" if schedule.zero_terminal_snr else ""
        marks = f" (marked {', '.join(self.marks)})" if self.marks else ""
        return (
            f"{schedule.schedule}{betas}, {schedule.num_train_timesteps} steps, {schedule.prediction_type}{snr}{marks}"
        )

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.model or 'not a published model'}"]
        lines += [f"  {name}: {part.describe()}" for name, part in self.parts.items()]
        lines += [] if self.schedule is None else [f"  schedule: {self._describe_schedule(self.schedule)}"]
        lines += [f"  ignored, {what}: {_few(names)}" for what, names in self.ignored.items()]
        lines += [f"  assumed: {what}" for what in self.assumed]
        return "\n".join(lines)


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, … ({len(names)})"


@dataclass
class Checkpoint:
    """The models of a checkpoint, None for a part that it does not have.

    `LatentDiffusion.from_checkpoint` makes one model of them.
    """

    found: Found
    schedule: NoiseSchedule | None = None
    scaling_factor: float = 1.0
    conditioning_key: str | None = None
    unet: UNet | None = None
    first_stage: AutoencoderKL | VQModel | None = None
    cond_stage: nn.Module | None = None
    cond_stage_2: nn.Module | None = None
