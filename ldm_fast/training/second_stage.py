"""Training of the second stage: a UNet on the frozen first stage's latents, and the encoder of its condition with it.

    L = E || target - UNet(z_t, t, tau(y)) ||^2,   z_t ~ q(z_t | z_0),   z_0 = scaling factor * encode(image)

The target is eps, z_0 or v as the schedule's prediction type says (arXiv:2112.10752, section 3.2 and 3.3). The first
stage never changes, so every image is encoded once, before the first step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast.configs.encoders import ClassEmbedderConfig
from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.files.images import grid
from ldm_fast.models.encoders import ClassEmbedder, TextEncoder, WordTokenizer
from ldm_fast.models.unet import UNet
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion
from ldm_fast.training.ema import Ema
from ldm_fast.training.image_set import DataError, ImageSet
from ldm_fast.training.recipe import SecondStageRecipe
from ldm_fast.training.stage import DataOrder, seeded, update_weights

EVALUATION_IMAGES = 256
GRID_IMAGES = 16
ENCODE_BATCH = 32


class SecondStage:
    """The second stage as the loop sees it. `first_stage` is trained and stays as it is."""

    name = "second_stage"

    def __init__(
        self, recipe: SecondStageRecipe, first_stage: nn.Module, data: ImageSet, seed: int, device: torch.device
    ):
        self.recipe, self.loop, self.seed, self.device = recipe, recipe.loop, seed, device
        check_fits(recipe, first_stage.config, data)
        self.first_stage = first_stage.to(device).eval().requires_grad_(False)
        self.data = data.training()
        held_out = data.evaluation() if bool(data.held_out.any()) else self.data
        self.held_out = held_out.select(torch.arange(min(len(held_out), EVALUATION_IMAGES)))
        self.schedule = NoiseSchedule(recipe.diffusion)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=seeded(seed, self.name, "weights"))))
            self.model = build_model(recipe, self.data).to(device)
        if self.loop.channels_last:
            self.model["unet"].to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.loop.learning_rate,
            betas=self.loop.betas,
            weight_decay=self.loop.weight_decay,
            fused=True,
        )
        self.ema = Ema(self.model, self.loop.ema_decay)
        self.latents = Latents(self.first_stage, self.data, recipe.horizontal_flip)
        self.held_out_latents = Latents(self.first_stage, self.held_out)
        self.conditions = condition_inputs(recipe, self.model, self.data)
        self.held_out_conditions = condition_inputs(recipe, self.model, self.held_out)
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
            condition = self._dropped(self.conditions, index, generator, recipe.condition_dropout)
            loss = self._loss(self.model, self.latents.take(index, generator), condition, generator, recipe)
            (loss / len(batches)).backward()
            total += float(loss.detach()) / len(batches)
        norm = update_weights(self.optimizer, self.loop.grad_clip)
        self.ema.update(number)
        return {"loss": total, "gradient_norm": float(norm)}

    def _dropped(
        self, conditions: Tensor | None, index: Tensor, generator: torch.Generator, probability: float
    ) -> Tensor | None:
        """The examples' conditions, each one replaced by "no condition" with this probability."""
        if conditions is None:
            return None
        inputs = conditions[index]
        drop = torch.rand(len(index), generator=generator) < probability
        inputs[drop] = no_condition(self.model)
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
        self,
        model: nn.ModuleDict,
        z: Tensor,
        condition: Tensor | None,
        generator: torch.Generator,
        recipe: SecondStageRecipe,
    ) -> Tensor:
        z_0 = z * float(self.scaling_factor)  # (B, C, h, w)
        t = self._timesteps(len(z), generator, recipe.timestep_shift)
        noise = torch.randn(z.shape, generator=generator).to(self.device)
        z_t = self.schedule.add_noise(z_0, noise, t)
        if self.loop.channels_last:
            z_t = z_t.to(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.loop.precision == "bf16"):
            context = None if condition is None else encode_condition(model, condition.to(self.device))  # (B, L, d)
            output = model["unet"](z_t, t.to(self.device), encoder_hidden_states=context).sample
        error = multiscale_error(output.float() - self.schedule.target(z_0, noise, t), recipe.loss_levels)
        if recipe.min_snr_gamma is not None:
            error = error * self.schedule.min_snr_weight(t, recipe.min_snr_gamma).to(error)
        return error.mean()

    # What one looks at

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The EMA weights' loss on held-out images, the mean square at the first phase's timesteps, with the same noise
        every time. Where nothing is held out it is that on trained images, and is called so."""
        recipe = replace(self.recipe, loss_levels=1)
        generator, total = seeded(self.seed, self.name, "evaluate"), 0.0
        conditions, name = self.held_out_conditions, "held_out" if self.held_out.held_out.all() else "trained"
        for index in torch.arange(len(self.held_out)).split(self.loop.batch_size):
            condition = None if conditions is None else conditions[index]
            z = self.held_out_latents.take(index, generator)
            loss = self._loss(self.ema.module, z, condition, generator, recipe)
            total += float(loss) * len(index)
        return {f"{name}_loss": total / len(self.held_out)}

    def latent_diffusion(self, card: dict[str, Any] | None = None) -> LatentDiffusion:
        """The whole model with the EMA weights."""
        return assemble(self.recipe, self.ema.module, self.first_stage, float(self.scaling_factor), card)

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """A grid of images by the recipe's prompts and sampling settings, the same noise every time."""
        images = self.latent_diffusion().generate(self._grid_prompts(), seed=self.seed)  # (B, H, W, 3) uint8
        return grid(images, columns=min(8, len(images)), gap=2, fill=200)

    def _grid_prompts(self) -> list[str] | list[int] | int:
        if self.recipe.condition == "none":
            return GRID_IMAGES
        if self.recipe.condition == "text" and self.recipe.grid_prompts:
            return list(self.recipe.grid_prompts)
        spread = torch.linspace(0, len(self.data) - 1, min(GRID_IMAGES, len(self.data))).long().tolist()
        if self.recipe.condition == "class":
            return [int(self.data.labels[i]) for i in spread]
        return [self.data.captions[i] for i in spread]


def multiscale_error(difference: Tensor, levels: int) -> Tensor:
    """Mean squares (B,) of a difference (B, C, h, w), averaged over scales: level l sees means over 2^l × 2^l cells,
    and weighs them by the 4^l cells that they stand for.

    What averages out counts on every level as it does in the plain mean square (one level); what is the same over a
    region, a slightly wrong colour say, counts 4^l times. After Hoogeboom et al., arXiv:2301.11093, section 3.4.
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
    def __init__(self, first_stage: nn.Module, data: ImageSet, flip: bool = False):
        from tqdm import tqdm

        device, means, deviations = first_stage.device, [], []
        flips = [False, True] if flip else [False]
        parts = torch.arange(len(data)).split(ENCODE_BATCH)
        work = [(mirrored, part) for mirrored in flips for part in parts]
        for mirrored, part in tqdm(work, desc="encoding images", unit="batch", leave=False, delay=2):
            images = data.batch(part, flip=torch.full((len(part),), mirrored)).to(device)
            encoded = first_stage.encode(images)
            if hasattr(encoded, "latent_dist"):
                means.append(encoded.latent_dist.mean)
                deviations.append((0.5 * encoded.latent_dist.logvar).exp())
            else:
                means.append(encoded.latents)
        self.mean = torch.cat(means).unflatten(0, (len(flips), len(data)))
        self.deviation = torch.cat(deviations).unflatten(0, (len(flips), len(data))) if deviations else None

    def take(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (B, C, h, w) of the examples `index`, each mirrored or not at random where both are there."""
        flip = torch.zeros(len(index), dtype=torch.int64)
        if len(self.mean) > 1:
            flip = torch.randint(2, (len(index),), generator=generator)
        mean = self.mean[flip, index]
        if self.deviation is None:
            return mean
        return mean + self.deviation[flip, index] * torch.randn(mean.shape, generator=generator).to(mean)


def check_fits(recipe: SecondStageRecipe, first_stage: AutoencoderConfig, data: ImageSet) -> None:
    """DataError where the UNet, the first stage and the data do not belong together. What it tells needs no trained
    first stage, so that it is known before days are spent on one."""
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
    if 2 ** (levels - 1) > side:
        raise DataError(
            f"second_stage.loss_levels is {levels}: means over {2 ** (levels - 1)} × {2 ** (levels - 1)} cells; "
            f"the latents have {side} a side"
        )
    if recipe.condition == "text" and data.captions is None:
        raise DataError('second_stage.condition is "text", but the training images have no captions')
    if recipe.condition == "class" and data.labels is None:
        raise DataError('second_stage.condition is "class", but the training images have no classes (sub-folders)')


# The model: {"unet": UNet, "condition": TextEncoder | ClassEmbedder}, the latter only where there is a condition


def build_model(recipe: SecondStageRecipe, data: ImageSet) -> nn.ModuleDict:
    """Untrained modules for the recipe; the vocabulary or the classes are those of the training images."""
    parts: dict[str, nn.Module] = {"unet": UNet(recipe.unet)}
    parts["unet"].zero_residuals()
    if recipe.condition == "text":
        text = recipe.text
        tokenizer = WordTokenizer.from_captions(data.captions, max_length=text.max_length)
        parts["condition"] = TextEncoder.from_tokenizer(
            tokenizer, width=text.width, depth=text.depth, heads=text.heads, head_dim=text.head_dim
        )
    elif recipe.condition == "class":
        classes, width = len(data.classes), recipe.unet.cross_attention_dim
        parts["condition"] = ClassEmbedder(ClassEmbedderConfig(classes + 1, width, null_class=classes))
    return nn.ModuleDict(parts)


def condition_inputs(recipe: SecondStageRecipe, model: nn.ModuleDict, data: ImageSet) -> Tensor | None:
    """What the encoder reads, for all images: tokens (N, L), classes (N,), or None."""
    if recipe.condition == "none":
        return None
    return model["condition"].inputs(data.captions if recipe.condition == "text" else data.labels)


def no_condition(model: nn.ModuleDict) -> Tensor:
    """The input that stands for "no condition": the empty caption's tokens (L,), or the null class ()."""
    return model["condition"].null_input


def encode_condition(model: nn.ModuleDict, inputs: Tensor) -> Tensor:
    """Rows of `condition_inputs` -> context (B, L, d)."""
    return model["condition"].encode_inputs(inputs)


def assemble(
    recipe: SecondStageRecipe,
    model: nn.ModuleDict,
    first_stage: nn.Module,
    scaling_factor: float,
    card: dict[str, Any] | None = None,
) -> LatentDiffusion:
    """The modules as one LatentDiffusion."""
    return LatentDiffusion(
        model["unet"],
        first_stage,
        model["condition"] if "condition" in model else None,
        NoiseSchedule(recipe.diffusion),
        scaling_factor,
        conditioning_key=None if recipe.condition == "none" else "crossattn",
        defaults=recipe.sampling,
        card=card,
    )
