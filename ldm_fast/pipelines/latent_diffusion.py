"""LatentDiffusion: condition -> sample -> decode, and the one file such a model is stored in.

prompt --tau_theta--> context
noise z_T --UNet and sampler under the context--> z_0 --first stage's decoder--> image
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_fast.checkpoints import model_file
from ldm_fast.checkpoints.found import Checkpoint
from ldm_fast.checkpoints.load import load
from ldm_fast.checkpoints.model_file import SHIPPED
from ldm_fast.configs.checks import check_number, check_seed, whole_number
from ldm_fast.configs.diffusion import Defaults
from ldm_fast.diffusion.condition import Condition, classifier_free_guidance, unet_arguments
from ldm_fast.diffusion.samplers import SAMPLERS, Step, spaced_timesteps
from ldm_fast.diffusion.schedule import NoiseSchedule, noise_like
from ldm_fast.files.images import check_images, check_multiple, to_uint8
from ldm_fast.interop.names import Config
from ldm_fast.models.attention import join_projections
from ldm_fast.models.clip import load_text_encoder
from ldm_fast.models.memory import fixed_weights
from ldm_fast.pipelines.start import _Start
from ldm_fast.pipelines.whole import check_whole, default_settings

Prompts = str | Sequence[str] | Sequence[int] | Tensor | Condition | int
Progress = Callable[[int, int], None]


class LatentDiffusion(nn.Module):
    """A first stage, a UNet on its latents, and what conditions it (Rombach et al. 2022, figure 3).

    Args:
        unet: UNet; its config's sample_size is the native latent size.
        first_stage: AutoencoderKL or VQModel.
        cond_stage: TextEncoder, ClassEmbedder, SpatialRescaler, or None where conditions come ready-made.
        schedule: NoiseSchedule.
        scaling_factor: the UNet sees latents multiplied by it (1 / standard deviation of the latents).
        conditioning_key: None, "crossattn", "concat", "hybrid" or "adm"; see `conditioning.unet_arguments`.
        defaults: sampling settings stored with the model.
        card: model card fields (data, licence, recipe, metrics ...), anything JSON can hold.
    """

    def __init__(
        self,
        unet: nn.Module,
        first_stage: nn.Module,
        cond_stage: nn.Module | None,
        schedule: NoiseSchedule,
        scaling_factor: float = 1.0,
        *,
        conditioning_key: str | None = "crossattn",
        defaults: Defaults | None = None,
        card: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.unet, self.first_stage, self.cond_stage = unet, first_stage, cond_stage
        self.schedule, self.scaling_factor = schedule, float(scaling_factor)
        self.conditioning_key = conditioning_key
        self.defaults = defaults or Defaults()
        if conditioning_key is None:  # nothing to be guided by
            self.defaults = replace(self.defaults, guidance=1.0)
        self.card = dict(card or {})
        self.origin = "not loaded from a file"

    @property
    def downsampling_factor(self) -> int:
        return self.first_stage.config.downsampling_factor

    @property
    def image_size(self) -> tuple[int, int]:
        """The native image size (height, width)."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.downsampling_factor, width * self.downsampling_factor

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        config: Config | Mapping[str, Any] | None = None,
        *,
        variant: str | None = None,
    ) -> LatentDiffusion:
        """Loads the model at `path` (None: the shipped one) in float32 on the CPU, in eval mode.

        `path` is a model file of ours, a folder as diffusers writes it, or a checkpoint of the original code whose
        condition needs no tokenizer. `config` and `variant` are those of `ldm_fast.load`.

        Raises what `ldm_fast.load` and `from_checkpoint` raise: FileNotFoundError if nothing is there, or a folder
        lacks its text encoder; ValueError that names what is wrong otherwise.
        """
        path = SHIPPED if path is None else Path(path)
        if not path.exists():
            hint = "; this copy of ldm_fast comes without the shipped model" if path == SHIPPED else ""
            raise FileNotFoundError(f"no model file at {path}{hint}")
        checkpoint = load(path, config=config, variant=variant, torch_dtype=torch.float32)
        cond_stage = checkpoint.cond_stage
        if cond_stage is None and checkpoint.conditioning_key == "crossattn" and path.is_dir():
            cond_stage = load_text_encoder(path, variant=variant)
        model = cls.from_checkpoint(checkpoint, cond_stage)
        join_projections(model)
        return model

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, cond_stage: nn.Module | None = None) -> LatentDiffusion:
        """Makes one model, in eval mode, of what `ldm_fast.load` found.

        `cond_stage` takes the place of the checkpoint's. That is needed for a text encoder, which in a checkpoint is a
        network without its tokenizer: CLIPTextEncoder(checkpoint.cond_stage, tokenizer), say.

        Raises ValueError if the checkpoint lacks a part or has a schedule that we do not have, and for what needs more
        than `generate` gives it: Stable Diffusion XL (the pooled text and the sizes of images at every step), latent
        consistency models, latents that are shifted. diffusers' pipelines run those, with `accelerate`.
        """
        found = checkpoint.found
        cond_stage = checkpoint.cond_stage if cond_stage is None else cond_stage
        check_whole(checkpoint, cond_stage)
        model = cls(
            checkpoint.unet,
            checkpoint.first_stage,
            cond_stage,
            checkpoint.schedule,
            checkpoint.scaling_factor,
            conditioning_key=checkpoint.conditioning_key,
            defaults=found.defaults or default_settings(cond_stage),
            card=found.about.get("card"),
        )
        model.origin = found.origin
        return model.eval()

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the whole model to one .safetensors file. See `model_file.save`."""
        model_file.save(
            path,
            {"unet": self.unet, "first_stage": self.first_stage, "cond_stage": self.cond_stage},
            schedule=self.schedule.config,
            scaling_factor=self.scaling_factor,
            conditioning_key=self.conditioning_key,
            defaults=self.defaults,
            card=self.card,
            dtype=dtype,
        )

    # Images and latents

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 (B, H, W, 3), H and W multiples of f -> scaled latents (B, C, H/f, W/f)."""
        images = check_images(images)
        for size in images.shape[1:3]:
            check_multiple(size, self.downsampling_factor, "an image's side")
        stage = self.first_stage
        with stage.upcast() as dtype:
            x = images.to(stage.device).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1
            return stage.encode_latents(x, generator=generator).float() * self.scaling_factor

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> uint8 (B, h f, w f, 3) on the CPU. ValueError where they, or what becomes of
        them, are not finite."""
        stage = self.first_stage
        with stage.upcast() as dtype:
            x = stage.decode((z / self.scaling_factor).to(stage.device, dtype)).sample.float()
        for tensor, what, part in ((z, "latents", "UNet"), (x, "images", "first stage")):
            if not tensor.isfinite().all():
                dtype = (self.unet if part == "UNet" else self.first_stage).dtype
                raise ValueError(
                    f"decode: the {what} hold values that are not finite; the {part} computes in {dtype}: "
                    "float16 overflows above 65504, bfloat16 and float32 do not; or its weights are damaged"
                )
        return to_uint8(x)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) of any size through the first stage and back. Sides that are no multiple of f are padded
        by repeating the border and cut again afterwards."""
        images = check_images(images)
        height, width = images.shape[1:3]
        rows, columns = (
            torch.arange(-(-n // self.downsampling_factor) * self.downsampling_factor).clamp(max=n - 1)
            for n in (height, width)
        )
        return self.decode(self.encode(images[:, rows][:, :, columns]))[:, :height, :width]

    # Conditions

    @torch.no_grad()
    def condition(self, prompts: Prompts) -> tuple[Condition, int]:
        """(what the UNet is conditioned on, number of images).

        prompts: for a text model one str or a list; for a class model a list of labels; for a concat model a map
        (B, C, H, W); for an unconditional one the number of images; or a Condition made elsewhere.
        """
        key = self.conditioning_key
        if isinstance(prompts, Condition):
            tensors = list(prompts.tensors().values())
            if not tensors:
                raise ValueError(
                    "generate: the Condition given is empty; an unconditional model takes a number of images"
                )
            return prompts, len(tensors[0])
        if key is None:
            if not isinstance(prompts, numbers.Integral) or prompts < 1:
                raise ValueError(f"generate: this model is unconditional and takes a number of images, got {prompts!r}")
            return Condition(), int(prompts)
        if key == "hybrid":
            raise ValueError("generate: a hybrid model takes a Condition with both crossattn and concat")
        encoded = self._encode(prompts)
        return Condition(**{key: encoded}), len(encoded)

    def _encode(self, prompts: Prompts) -> Tensor:
        """Row by row what the encoder makes of prompts, or the prompts themselves where there is no encoder."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if np.ndim(prompts) == 0 or len(prompts) == 0:
            raise ValueError(f"generate: prompts must be a list of at least one, got {prompts!r}")
        if self.cond_stage is None:
            return torch.as_tensor(prompts)
        if isinstance(prompts, Tensor):
            return self.cond_stage(prompts)
        distinct = list(dict.fromkeys(prompts))  # four images of one prompt: encoded, and warned about, once
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        encoded = self.cond_stage(distinct)
        return encoded[rows.to(encoded.device)]

    def _uncondition(self, negative: Prompts | None, condition: Condition, count: int) -> Condition:
        if isinstance(negative, Condition):
            uncondition, given = self.condition(negative)
        elif self.conditioning_key is None or (negative is None and self.cond_stage is None):
            instead = "guidance 1" if self.conditioning_key is None else "a negative one, or guidance 1"
            raise ValueError(f"generate: this model has no unconditional input; give {instead}")
        else:
            if negative is None:
                encoded = self.cond_stage.unconditional(count)
            else:
                encoded = self._encode([negative] if np.ndim(negative) == 0 else negative)
            hybrid = self.conditioning_key == "hybrid"
            uncondition, given = Condition(**{"crossattn" if hybrid else self.conditioning_key: encoded}), len(encoded)
        if given == 1:
            uncondition = uncondition[torch.zeros(count, dtype=torch.long)]
        elif given != count:
            raise ValueError(f"generate: {given} negative prompts for {count} images; give one, or one per image")
        if self.conditioning_key == "hybrid" and uncondition.concat is None:  # other words, under the same map
            return replace(uncondition, concat=condition.concat)
        return uncondition

    # Sampling

    @torch.no_grad()
    @fixed_weights()
    def generate(
        self,
        prompts: Prompts,
        *,
        negative: Prompts | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        init: Any = None,
        strength: float | None = None,
        mask: Any = None,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> Tensor:
        """Images for prompts: uint8 (B, H, W, 3) on the CPU.

        Args:
            prompts: one str, a list, or whatever else `condition` takes. The empty prompt is unconditional.
            negative: what to steer away from, one for all or one per image; default the unconditional input. Without
                effect at guidance 1. For a hybrid model it may be without a map: that of `prompts` is taken.
            steps, guidance, sampler, eta, spacing: default `self.defaults`; eta is ddim's alone, spacing is "leading"
                (the original's), "trailing" or "linspace".
            seed: image i draws all its random numbers from seed + i, whatever the batch size.
            size: height and width, multiples of f; default `init`'s, else the native size.
            init: uint8 (H, W, 3) or (B, H, W, 3), or Pillow images, to start from (SDEdit, Meng et al. 2022); (B, ...)
                is one per prompt.
            strength: share of the steps that are run on a noised `init`, above 0 up to 1; default 0.75, 1 with a mask.
            mask: bool (H, W) or (B, H, W), True where `init` is to be repainted, or Pillow images, white there. The
                rest is re-noised at every step and pasted back as latent at the end, so it changes by no more than a
                reconstruction does.
            batch_size: how many images are sampled at once.
            progress: called with (steps done, steps in all).

        Raises:
            ValueError, TypeError: an argument is out of range; the message names it.
        """
        settings = self._settings(steps, guidance, sampler, eta, spacing)
        condition, count = self.condition(prompts)
        uncondition = self._uncondition(negative, condition, count) if settings.guidance != 1 else None
        seed, batch_size = check_seed(seed, count), whole_number("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"generate: batch_size must be at least 1, got {batch_size}")
        start = _Start.prepare(
            count,
            size,
            init,
            strength,
            mask,
            factor=self.downsampling_factor,
            native_size=self.image_size,
            encode=self.encode,
        )
        timesteps = spaced_timesteps(self.schedule.num_train_timesteps, settings.steps, settings.spacing)
        timesteps = timesteps[len(timesteps) - max(1, round(start.strength * len(timesteps))) :]
        self.unet.precompute_time(timesteps)
        images = []
        for first in range(0, count, batch_size):
            rows = slice(first, min(first + batch_size, count))
            generators = [torch.Generator().manual_seed(seed + i) for i in range(rows.start, rows.stop)]
            denoise = classifier_free_guidance(
                self._denoise,
                condition[rows].to(self.unet.device, self.unet.dtype),
                None if uncondition is None else uncondition[rows].to(self.unet.device, self.unet.dtype),
                settings.guidance,
            )

            def report(done: int, before: int = first // batch_size) -> None:
                if progress is not None:
                    progress(before * len(timesteps) + done, -(-count // batch_size) * len(timesteps))

            images.append(self.decode(self._sample(denoise, start.rows(rows), timesteps, settings, generators, report)))
        return torch.cat(images)

    def _settings(self, steps, guidance, sampler, eta, spacing) -> Defaults:
        given = {"steps": steps, "guidance": guidance, "sampler": sampler, "eta": eta, "spacing": spacing}
        settings = Defaults(
            **{name: getattr(self.defaults, name) if value is None else value for name, value in given.items()}
        )
        spaced_timesteps(self.schedule.num_train_timesteps, settings.steps, settings.spacing)
        for name in ("guidance", "eta"):
            check_number(name, getattr(settings, name))
        if settings.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {settings.sampler!r}; known: {', '.join(SAMPLERS)}")
        if not math.isfinite(settings.guidance):
            raise ValueError(f"guidance must be a finite number, got {settings.guidance}")
        if not 0 <= settings.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {settings.eta}")
        if eta and settings.sampler != "ddim":
            raise ValueError(f"eta is of the sampler ddim; {settings.sampler} has none, got {eta}")
        return settings

    def _denoise(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        unet = self.unet
        arguments = unet_arguments(self.conditioning_key, z, condition)
        arguments["sample"] = arguments["sample"].to(unet.device, unet.dtype)
        return unet(timestep=t, **arguments).sample.to(z.dtype)

    def _sample(self, denoise, start: _Start, timesteps, settings: Defaults, generators, report) -> Tensor:
        """One batch: noise, or the noised start, down to z_0."""
        # The original's spacing ends where the original ends; the others end at the clean latent.
        alpha_end = None if settings.spacing == "leading" else 1.0
        shape = (len(generators), self.first_stage.config.latent_channels, *start.latent_size)
        noise = noise_like(torch.empty(shape, device=self.unet.device), generators)
        z = noise
        known: Callable[[float], Tensor] | None = None
        if start.z is not None:

            def known(alpha: float) -> Tensor:
                return math.sqrt(alpha) * start.z + math.sqrt(1 - alpha) * noise

            noised = known(self.schedule.alphas_cumprod[timesteps[0]].item())
            if start.strength < 1:
                z = noised
            if start.keep is not None:
                z = torch.where(start.keep, noised, z)

        def on_step(step: Step) -> Tensor | None:
            report(step.index + 1)
            if start.keep is None:
                return None
            last = step.index == step.total - 1
            return torch.where(start.keep, start.z if last else known(step.alpha), step.z)

        extra = {"eta": settings.eta} if settings.sampler == "ddim" else {}
        sample = SAMPLERS[settings.sampler]
        return sample(
            denoise,
            z,
            self.schedule,
            timesteps,
            generator=generators,
            on_step=on_step,
            alpha_end=alpha_end,
            **extra,
        )
