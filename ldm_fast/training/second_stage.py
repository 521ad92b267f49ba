"""Training of the second stage: a UNet on the frozen first stage's latents, and the encoder of its condition with it.

    L = E ‖ target - UNet(z_t, t, τ(y)) ‖²,   z_t ~ q(z_t | z_0),   z_0 = scaling factor · encode(image)

The target is ε, z_0 or v, according to the schedule's prediction type (arXiv:2112.10752, sections 3.2 and 3.3). The
first stage never changes, so every image is encoded once, before the first step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.files.images import grid
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion
from ldm_fast.training.denoiser import Denoiser
from ldm_fast.training.ema import Ema
from ldm_fast.training.image_set import DataError, ImageSet
from ldm_fast.training.recipe import SecondStageRecipe
from ldm_fast.training.stage import DataOrder, adamw, global_seed, mixed_precision, placed, seeded, update_weights

EVALUATION_IMAGES = 256
GRID_IMAGES = 16
ENCODE_BATCH = 32


class SecondStage:
    """The second stage as the loop sees it. `first_stage` is trained and stays as it is."""

    name = "second_stage"

    def __init__(
        self,
        recipe: SecondStageRecipe,
        first_stage: AutoencoderKL | VQModel,
        data: ImageSet,
        seed: int,
        device: torch.device,
    ):
        self.recipe, self.loop, self.seed, self.device = recipe, recipe.loop, seed, device
        check_fits(recipe, first_stage.config, data)
        self.first_stage = first_stage.to(device).eval().requires_grad_(False)
        self.data = data.training()
        measured = data.measured()
        self.measured = measured.select(torch.arange(min(len(measured), EVALUATION_IMAGES)))
        self.schedule = NoiseSchedule(recipe.diffusion)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed(seeded(seed, self.name, "weights")))
            self.model = placed(Denoiser(recipe, self.data), device, self.loop)
        self.optimizer = adamw(self.model.parameters(), self.loop)
        self.ema = Ema(self.model, self.loop.ema_decay)
        self.latents = Latents(self.first_stage, self.data, recipe.horizontal_flip)
        self.measured_latents = Latents(self.first_stage, self.measured)
        self.conditions = self.model.inputs(self.data)
        self.measured_conditions = self.model.inputs(self.measured)
        self.scaling_factor = torch.tensor(self._scaling_factor(), dtype=torch.float64)

    def _scaling_factor(self) -> float:
        """1 / standard deviation of the first batch's latents, unless the recipe gives it."""
        if self.recipe.scaling_factor is not None:
            return self.recipe.scaling_factor
        first = DataOrder(len(self), self.seed, self.name).take(0, self.loop.batch_size)
        deviation = float(self.latents.take(first, seeded(self.seed, self.name, "scaling")).double().std())
        if not deviation > 0:
            raise DataError("the first batch's latents are all the same: the first stage is not trained")
        return 1 / deviation

    def __len__(self) -> int:
        return len(self.data)

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "ema": self.ema.module}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"model": self.optimizer}

    def extra(self) -> dict[str, Tensor]:
        return {"scaling_factor": self.scaling_factor}

    # One step

    def step(self, number: int, batches: list[Tensor], generator: torch.Generator) -> dict[str, float]:
        total, recipe = 0.0, self.recipe.at(number)
        for index in batches:
            inputs = self._dropped(self.conditions, index, generator, recipe.condition_dropout)
            loss = self._loss(self.model, self.latents.take(index, generator), inputs, generator, recipe)
            (loss / len(batches)).backward()
            total += float(loss.detach()) / len(batches)
        norm = update_weights(self.optimizer, self.loop.grad_clip)
        self.ema.update(number)
        return {"loss": total, "gradient_norm": float(norm)}

    def _dropped(
        self, conditions: Tensor | None, index: Tensor, generator: torch.Generator, probability: float
    ) -> Tensor | None:
        """The examples' conditions, each one replaced by "no condition" with this probability (arXiv:2207.12598)."""
        if conditions is None or self.model.condition is None:
            return None
        inputs = conditions[index]
        drop = torch.rand(len(index), generator=generator) < probability
        inputs[drop] = self.model.condition.null_input
        return inputs

    def _timesteps(self, count: int, generator: torch.Generator, shift: float) -> Tensor:
        """(count,) random timesteps: uniform or shifted towards noise, stratified over the whole range or not."""
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        if self.recipe.stratified_timesteps:
            uniform = (torch.arange(count) + uniform) / count
        steps = self.schedule.num_train_timesteps
        shifted = shift * uniform / (1 + (shift - 1) * uniform)
        return (shifted * steps).long().clamp(max=steps - 1)

    def _loss(
        self, model: Denoiser, z: Tensor, inputs: Tensor | None, generator: torch.Generator, recipe: SecondStageRecipe
    ) -> Tensor:
        z_0 = z * float(self.scaling_factor)  # (B, C, h, w)
        t = self._timesteps(len(z), generator, recipe.timestep_shift)
        noise = torch.randn(z.shape, generator=generator).to(self.device)
        z_t = self.schedule.add_noise(z_0, noise, t)
        if self.loop.channels_last:
            z_t = z_t.to(memory_format=torch.channels_last)
        with mixed_precision(self.device, self.loop):
            output = model(z_t, t.to(self.device), inputs)
        error = multiscale_error(output.float() - self.schedule.target(z_0, noise, t), recipe.loss_levels)
        if recipe.min_snr_gamma is not None:
            error = error * self.schedule.min_snr_weight(t, recipe.min_snr_gamma).to(error)
        return error.mean()

    # Measuring and showing

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure the averaged weights' loss on held-out images.

        That is the mean square at the first phase's timesteps, with the same noise every time. If nothing is held out,
        it is the loss on trained images, and is called so.
        """
        recipe = replace(self.recipe, loss_levels=1)
        generator, total = seeded(self.seed, self.name, "evaluate"), 0.0
        for index in torch.arange(len(self.measured)).split(self.loop.batch_size):
            inputs = None if self.measured_conditions is None else self.measured_conditions[index]
            z = self.measured_latents.take(index, generator)
            total += float(self._loss(self.ema.module, z, inputs, generator, recipe)) * len(index)
        name = "held_out" if self.measured.held_out.all() else "trained"
        return {f"{name}_loss": total / len(self.measured)}

    def latent_diffusion(self, card: dict[str, Any] | None = None) -> LatentDiffusion:
        """The whole model with the averaged weights."""
        return self.ema.module.latent_diffusion(self.first_stage, float(self.scaling_factor), card)

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """A grid of images drawn with the recipe's prompts and sampling settings, from the same noise every time."""
        images = self.latent_diffusion().generate(self._grid_prompts(), seed=self.seed)  # (B, H, W, 3) uint8
        return grid(images, columns=min(8, len(images)), gap=2, fill=200)

    def _grid_prompts(self) -> list[str] | list[int] | int:
        if self.recipe.condition == "none":
            return GRID_IMAGES
        if self.recipe.condition == "text" and self.recipe.grid_prompts:
            return list(self.recipe.grid_prompts)
        spread = torch.linspace(0, len(self.data) - 1, min(GRID_IMAGES, len(self.data))).long().tolist()
        if self.data.captions is not None and self.recipe.condition == "text":
            return [self.data.captions[i] for i in spread]
        assert self.data.labels is not None  # `check_fits`
        return [int(self.data.labels[i]) for i in spread]


def multiscale_error(difference: Tensor, levels: int) -> Tensor:
    """Mean squares (B,) of a difference (B, C, h, w), averaged over scales (Hoogeboom et al., arXiv:2301.11093, 3.4).

    Level l sees means over 2^l × 2^l cells, and weighs them by the 4^l cells that they stand for. An error that
    averages out counts on every level as it does in the plain mean square, which is one level; an error that is the
    same over a region, such as a slightly wrong colour, counts 4^l times.
    """
    total = difference.square().flatten(1).mean(1)
    for level in range(1, levels):
        difference = F.avg_pool2d(difference, 2)
        total = total + 4**level * difference.square().flatten(1).mean(1)
    return total / levels


class Latents:
    """All images' latents, encoded once: (flips, N, C, h, w) on the first stage's device.

    A VQ-reg first stage gives the latent before quantization; a KL-reg one a distribution, sampled anew every time.
    """

    @torch.no_grad()
    def __init__(self, first_stage: AutoencoderKL | VQModel, data: ImageSet, flip: bool = False):
        means, deviations = [], []
        flips = [False, True] if flip else [False]
        work = [(mirrored, part) for mirrored in flips for part in torch.arange(len(data)).split(ENCODE_BATCH)]
        for mirrored, part in tqdm(work, desc="encoding images", unit="batch", leave=False, delay=2):
            images = data.batch(part, flip=torch.full((len(part),), mirrored)).to(first_stage.device)
            if isinstance(first_stage, AutoencoderKL):
                posterior = first_stage.encode(images).latent_dist
                means.append(posterior.mean)
                deviations.append(posterior.std)
            else:
                means.append(first_stage.encode_latents(images))
        self.mean = torch.cat(means).unflatten(0, (len(flips), len(data)))
        self.deviation = torch.cat(deviations).unflatten(0, (len(flips), len(data))) if deviations else None

    def take(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (B, C, h, w) of the examples `index`, each mirrored at random if both versions are there."""
        flip = torch.zeros(len(index), dtype=torch.int64)
        if len(self.mean) > 1:
            flip = torch.randint(2, (len(index),), generator=generator)
        z: Tensor = self.mean[flip, index]
        if self.deviation is not None:
            z = z + self.deviation[flip, index] * torch.randn(z.shape, generator=generator).to(z)
        return z


def check_fits(recipe: SecondStageRecipe, first_stage: AutoencoderConfig, data: ImageSet) -> None:
    """DataError if the UNet, the first stage and the data do not belong together.

    This needs no trained first stage, so it is known before days are spent on one.
    """
    channels, side = first_stage.latent_channels, data.images.shape[-1] // first_stage.downsampling_factor
    unet = recipe.unet
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        raise DataError(
            f"second_stage.unet has {unet.in_channels} input and {unet.out_channels} output channels; "
            f"the first stage's latents have {channels}"
        )
    if unet.sample_size != side:
        raise DataError(
            f"second_stage.unet.sample_size is {unet.sample_size}; the latents have {side} a side "
            f"(data.size {data.images.shape[-1]}, f = {first_stage.downsampling_factor})"
        )
    levels = max(recipe.at(step).loss_levels for step in (0, *(phase.start for phase in recipe.phases)))
    cells = 2 ** (levels - 1)
    if cells > side:
        raise DataError(
            f"second_stage.loss_levels is {levels}: means over {cells} × {cells} cells; the latents have {side} a side"
        )
    if recipe.condition == "text" and data.captions is None:
        raise DataError('second_stage.condition is "text", but the training images have no captions')
    if recipe.condition == "class" and data.labels is None:
        raise DataError('second_stage.condition is "class", but the training images have no classes (sub-folders)')
