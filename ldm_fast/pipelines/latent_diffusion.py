"""`LatentDiffusion`: condition, sample, decode (Rombach et al., arXiv:2112.10752, figure 3).

prompt ──τ_θ──▶ context
noise z_T ──UNet and sampler under the context──▶ z_0 ──decoder of the first stage──▶ image
"""

from __future__ import annotations

import functools
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
from ldm_fast.diffusion.samplers import SAMPLERS, Denoise, Step, spaced_timesteps
from ldm_fast.diffusion.schedule import NoiseSchedule, noise_like
from ldm_fast.files.images import check_images, check_multiple, to_uint8
from ldm_fast.interop.names import Config
from ldm_fast.models.attention import join_projections
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.clip import load_text_encoder
from ldm_fast.models.encoders import ConditionEncoder
from ldm_fast.models.memory import fixed_weights
from ldm_fast.models.unet import UNet
from ldm_fast.pipelines.start import Start
from ldm_fast.pipelines.whole import default_settings, whole_parts

Prompts = str | Sequence[str] | Sequence[int] | Tensor | Condition | int
Progress = Callable[[int, int], None]


class LatentDiffusion(nn.Module):
    """A first stage, a UNet on its latents, and an encoder of what conditions the UNet.

    Args:
        unet: its config's sample_size is the native size of a latent.
        first_stage: AutoencoderKL or VQModel.
        cond_stage: the encoder of conditions; None if they are given encoded, or if the model is unconditional.
        schedule: the noise schedule.
        scaling_factor: 1 / (standard deviation of the latents). The UNet sees latents multiplied by it.
        conditioning_key: None, "crossattn", "concat", "hybrid" or "adm"; see `condition.unet_arguments`.
        defaults: sampling settings that are stored with the model.
        card: fields of the model card (data, licence, recipe, metrics, …), anything that JSON can hold.
    """

    unet: UNet
    first_stage: AutoencoderKL | VQModel
    cond_stage: ConditionEncoder | None

    def __init__(
        self,
        unet: UNet,
        first_stage: AutoencoderKL | VQModel,
        cond_stage: ConditionEncoder | None,
        schedule: NoiseSchedule,
        scaling_factor: float = 1.0,
        *,
        conditioning_key: str | None = "crossattn",
        defaults: Defaults | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.first_stage, self.cond_stage = unet, first_stage, cond_stage
        self.schedule, self.scaling_factor = schedule, float(scaling_factor)
        self.conditioning_key = conditioning_key
        self.defaults = defaults or Defaults()
        if conditioning_key is None:  # there is nothing to be guided by
            self.defaults = replace(self.defaults, guidance=1.0)
        self.card = dict(card or {})
        self.origin = "not loaded from a file"

    @property
    def downsampling_factor(self) -> int:
        """f, the side of an image over that of its latent."""
        return self.first_stage.config.downsampling_factor

    @property
    def image_size(self) -> tuple[int, int]:
        """The native size of images, (height, width). ValueError if the UNet has none."""
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("this UNet has no native size (sample_size): give the size of images")
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
        """Load the model at `path` (None: the shipped one) in float32 on the CPU, in eval mode.

        `path` is a model file of ours, a folder as diffusers writes it, or a checkpoint of the original code whose
        conditions need no tokenizer. `config` and `variant` are those of `ldm_fast.load`.

        Raises:
            FileNotFoundError: nothing is there, or a folder lacks its text encoder.
            ValueError: what `ldm_fast.load` or `from_checkpoint` finds wrong.
        """
        path = SHIPPED if path is None else Path(path)
        if not path.exists():
            hint = "; this copy of ldm_fast comes without the shipped model" if path == SHIPPED else ""
            raise FileNotFoundError(f"no model file at {path}{hint}")
        checkpoint = load(path, config=config, variant=variant, torch_dtype=torch.float32)
        encoder = None
        if path.is_dir() and checkpoint.cond_stage is None and checkpoint.conditioning_key == "crossattn":
            encoder = load_text_encoder(path, variant=variant)
        model = cls.from_checkpoint(checkpoint, encoder)
        join_projections(model)
        return model

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, cond_stage: ConditionEncoder | None = None) -> LatentDiffusion:
        """Make one model, in eval mode, of what `ldm_fast.load` returned.

        cond_stage: takes the place of the checkpoint's. A text encoder in a checkpoint is a network without its
        tokenizer, so it needs this: CLIPTextEncoder(checkpoint.cond_stage, tokenizer), say.

        Raises:
            ValueError: the checkpoint lacks a part, or has a schedule that we do not have, or needs more than
                `generate` gives it. That is Stable Diffusion XL (the pooled text and the sizes of images at every
                step), latent consistency models, and shifted latents; diffusers' pipelines run those, with
                `accelerate`.
        """
        found = checkpoint.found
        encoder: Any = checkpoint.cond_stage if cond_stage is None else cond_stage
        unet, first_stage, schedule = whole_parts(checkpoint, encoder)
        model = cls(
            unet,
            first_stage,
            encoder,
            schedule,
            checkpoint.scaling_factor,
            conditioning_key=checkpoint.conditioning_key,
            defaults=found.defaults or default_settings(encoder),
            card=found.about.get("card"),
        )
        model.origin = found.origin
        return model.eval()

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the whole model to one .safetensors file. Arguments and errors as for `model_file.save`."""
        model_file.save(
            path,
            dict(self.named_children()),
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
        """Return scaled latents (B, C, H/f, W/f) of images, uint8 (B, H, W, 3) with H and W multiples of f."""
        images = check_images(images)
        for side in images.shape[1:3]:
            check_multiple(side, self.downsampling_factor, "an image's side")
        stage = self.first_stage
        with stage.upcast() as dtype:
            x = images.to(stage.device).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1
            return stage.encode_latents(x, generator=generator).float() * self.scaling_factor

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return images, uint8 (B, h f, w f, 3) on the CPU, of scaled latents (B, C, h, w).

        ValueError if the latents, or the images before they are rounded, are not finite.
        """
        stage = self.first_stage
        with stage.upcast() as dtype:
            x: Tensor = stage.decode((z / self.scaling_factor).to(stage.device, dtype)).sample.float()
        _check_finite(z, "latents", "UNet", self.unet.dtype)
        _check_finite(x, "images", "first stage", stage.dtype)
        return to_uint8(x)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return images, uint8 (B, H, W, 3), after the first stage's encoder and decoder.

        Sides that are not multiples of f are padded by repeating the border, and cropped afterwards.
        """
        images, factor = check_images(images), self.downsampling_factor
        height, width = images.shape[1:3]
        rows, columns = (torch.arange(math.ceil(n / factor) * factor).clamp(max=n - 1) for n in (height, width))
        return self.decode(self.encode(images[:, rows][:, :, columns]))[:, :height, :width]

    # Conditions

    @torch.no_grad()
    def condition(self, prompts: Prompts) -> tuple[Condition, int]:
        """Return (what the UNet is conditioned on, the number of images).

        prompts: one str or a list for a text model; a list of labels for a class model; a map (B, C, H, W) for a concat
        model; the number of images for an unconditional one; or a Condition made elsewhere.
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

    def _encode(self, prompts: Any) -> Tensor:
        """Return the encoded prompts, one row each; the prompts themselves if there is no encoder."""
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
        """Return what to steer away from, one row for each of `count` images under `condition`."""
        uncondition = self._negative_condition(negative, count)
        given = len(next(iter(uncondition.tensors().values())))
        if given == 1:
            uncondition = uncondition[torch.zeros(count, dtype=torch.long)]
        elif given != count:
            raise ValueError(f"generate: {given} negative prompts for {count} images; give one, or one per image")
        if self.conditioning_key == "hybrid" and uncondition.concat is None:  # other words, under the same map
            return replace(uncondition, concat=condition.concat)
        return uncondition

    def _negative_condition(self, negative: Prompts | None, count: int) -> Condition:
        if isinstance(negative, Condition):
            return self.condition(negative)[0]
        key = "crossattn" if self.conditioning_key == "hybrid" else self.conditioning_key
        if key is None:
            raise ValueError("generate: this model has no unconditional input; give guidance 1")
        if negative is not None:
            return Condition(**{key: self._encode([negative] if np.ndim(negative) == 0 else negative)})
        if self.cond_stage is None:
            raise ValueError("generate: this model has no unconditional input; give a negative one, or guidance 1")
        return Condition(**{key: self.cond_stage.unconditional(count)})

    # Sampling

    @torch.no_grad()
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
        """Return images for prompts, uint8 (B, H, W, 3) on the CPU.

        Args:
            prompts: one str, a list, or whatever else `condition` takes. The empty prompt is unconditional.
            negative: what to steer away from, one for all images or one for each; default, the unconditional input. It
                has no effect at guidance 1. For a hybrid model it may lack the map: that of `prompts` is taken.
            steps, guidance, sampler, eta, spacing: default, those of `self.defaults`. Only the sampler ddim has an eta.
                spacing is "leading" (the original's), "trailing" or "linspace".
            seed: image i draws all its random numbers from seed + i, whatever the batch size.
            size: height and width, multiples of f; default, those of `init`, else the native size.
            init: images to start from (SDEdit, Meng et al., arXiv:2108.01073), one for all or one for each prompt:
                uint8 (H, W, 3) or (B, H, W, 3), or Pillow images.
            strength: the share of the steps that are run, on a noised `init`; above 0 and at most 1. Default 0.75, or 1
                with a mask.
            mask: bool (H, W) or (B, H, W), True where `init` is to be repainted, or Pillow images, white there. The
                rest is noised again at every step and pasted back as a latent at the end, so it changes no more than a
                reconstruction does.
            batch_size: how many images are sampled at once.
            progress: called with (steps done, steps in all).

        Raises:
            ValueError, TypeError: an argument is out of range; the message names it.
        """
        settings = self._settings(steps=steps, guidance=guidance, sampler=sampler, eta=eta, spacing=spacing)
        condition, count = self.condition(prompts)
        uncondition = self._uncondition(negative, condition, count) if settings.guidance != 1 else None
        seed, batch_size = check_seed(seed, count), whole_number("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"generate: batch_size must be at least 1, got {batch_size}")
        size = self.image_size if size is None and init is None else size
        factor = self.downsampling_factor
        start = Start.prepare(count, size, init, strength, mask, factor=factor, encode=self.encode)
        timesteps = spaced_timesteps(self.schedule.num_train_timesteps, settings.steps, settings.spacing)
        timesteps = timesteps[len(timesteps) - max(1, round(start.strength * len(timesteps))) :]
        total = math.ceil(count / batch_size) * len(timesteps)
        images: list[Tensor] = []
        for batch, first in enumerate(range(0, count, batch_size)):
            rows = slice(first, min(first + batch_size, count))
            z = self._sample(
                self._denoise(condition[rows], None if uncondition is None else uncondition[rows], settings.guidance),
                start.rows(rows),
                timesteps,
                settings,
                [torch.Generator().manual_seed(seed + i) for i in range(rows.start, rows.stop)],
                functools.partial(_report, progress, batch * len(timesteps), total),
            )
            images.append(self.decode(z))
        return torch.cat(images)

    def _settings(self, **given: Any) -> Defaults:
        """Return the sampling settings: those given, and the defaults for those that are None."""
        settings = replace(self.defaults, **{name: value for name, value in given.items() if value is not None})
        spaced_timesteps(self.schedule.num_train_timesteps, settings.steps, settings.spacing)
        for name in ("guidance", "eta"):
            check_number(name, getattr(settings, name))
        if settings.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {settings.sampler!r}; known: {', '.join(SAMPLERS)}")
        if not math.isfinite(settings.guidance):
            raise ValueError(f"guidance must be a finite number, got {settings.guidance}")
        if not 0 <= settings.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {settings.eta}")
        if given["eta"] and settings.sampler != "ddim":
            raise ValueError(f"eta belongs to the sampler ddim; {settings.sampler} has none, got {given['eta']}")
        return settings

    def _denoise(self, condition: Condition, uncondition: Condition | None, guidance: float) -> Denoise:
        """Return the guided UNet under these conditions as a function of (z_t, t)."""
        unet = self.unet

        def model(z: Tensor, t: Tensor, condition: Condition) -> Tensor:
            arguments = unet_arguments(self.conditioning_key, z, condition)
            arguments["sample"] = arguments["sample"].to(unet.device, unet.dtype)
            predicted: Tensor = unet(timestep=t, **arguments).sample
            return predicted.to(z.dtype)

        without = None if uncondition is None else uncondition.to(unet.device, unet.dtype)
        return classifier_free_guidance(model, condition.to(unet.device, unet.dtype), without, guidance)

    @fixed_weights()
    def _sample(
        self,
        denoise: Denoise,
        start: Start,
        timesteps: list[int],
        settings: Defaults,
        generators: list[torch.Generator],
        report: Callable[[Step], None],
    ) -> Tensor:
        """Return z_0 of one batch, from noise or from the noised start."""
        self.unet.precompute_time(timesteps)
        shape = (len(generators), self.first_stage.config.latent_channels, *start.latent_size)
        noise = noise_like(torch.empty(shape, device=self.unet.device), generators)

        def on_step(step: Step) -> Tensor | None:
            report(step)
            return start.with_what_is_kept(step, noise)

        return SAMPLERS[settings.sampler](
            denoise,
            start.first(noise, self.schedule.alphas_cumprod[timesteps[0]].item()),
            self.schedule,
            timesteps,
            generator=generators,
            on_step=on_step,
            # The original's spacing ends where the original ends; the others end at the clean latent.
            alpha_end=None if settings.spacing == "leading" else 1.0,
            **({"eta": settings.eta} if settings.sampler == "ddim" else {}),
        )


def _report(progress: Progress | None, before: int, total: int, step: Step) -> None:
    if progress is not None:
        progress(before + step.index + 1, total)


def _check_finite(tensor: Tensor, what: str, part: str, dtype: torch.dtype) -> None:
    if not tensor.isfinite().all():
        raise ValueError(
            f"decode: the {what} hold values that are not finite; the {part} computes in {dtype}: "
            "float16 overflows above 65504, bfloat16 and float32 do not; or its weights are damaged"
        )
