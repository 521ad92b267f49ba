"""Training of the first stage (arXiv:2112.10752, appendix G): pixel loss, LPIPS and PatchGAN, KL-reg or VQ-reg.

    L = L_rec + weight · adaptive · L_adv + regulariser

L_rec is the pixel loss + LPIPS: its mean under VQ-reg; under KL-reg the negative log-likelihood L_rec / exp(s) + s with
a learned s, summed over each image, as published.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ldm_fast.configs.first_stage import VQConfig
from ldm_fast.files.images import grid, to_uint8
from ldm_fast.interop.names import without_training_state
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.outputs import DecoderOutput
from ldm_fast.models.pretrained import assemble
from ldm_fast.models.regularisation import DiagonalGaussian
from ldm_fast.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from ldm_fast.training.ema import Ema
from ldm_fast.training.image_set import DataError, ImageSet
from ldm_fast.training.metrics import codebook_perplexity, codebook_usage, reconstruction_psnr
from ldm_fast.training.recipe import FirstStageRecipe
from ldm_fast.training.stage import adamw, global_seed, mixed_precision, placed, seeded, update_weights

INIT_LATENTS = 65536  # vectors that the codebook's k-means starts from
REVIVAL_IMAGES = 64  # dead codes move to latents of this many images
EVALUATION_IMAGES = 256  # at most so many held-out images for PSNR, and twice as many trained ones for codebook usage


class FirstStage:
    """The first stage as the loop sees it."""

    name = "first_stage"

    def __init__(self, recipe: FirstStageRecipe, data: ImageSet, seed: int, device: torch.device):
        self.recipe, self.loop, self.device = recipe, recipe.loop, device
        self.data, self.measured, self.seed = data.training(), data.measured(), seed
        side = self.data.images.shape[-1]
        if side % recipe.model.downsampling_factor:
            raise DataError(
                f"data.size {side} is no multiple of the first stage's f = {recipe.model.downsampling_factor}"
            )
        if recipe.disc_weight > 0 and side < (least := PatchDiscriminator.least_side(recipe.disc_layers)):
            raise DataError(f"data.size {side} is too small for disc_layers = {recipe.disc_layers}: {least} is needed")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed(seeded(seed, self.name, "weights")))
            self._build()
        self.ema = Ema(self.model, self.loop.ema_decay)
        codes = 0 if recipe.vq is None else recipe.vq.num_vq_embeddings
        self.counts = torch.zeros(codes, dtype=torch.int64)  # how often each code was chosen since the last revival
        self.quantizing = recipe.vq is not None  # False during the steps before `quantize_from`
        self.lpips = _lpips(device) if recipe.lpips_weight > 0 else None

    def _build(self) -> None:
        recipe, loop, device = self.recipe, self.loop, self.device
        self.model = placed(untrained(recipe), device, loop)
        self.model.open_latent_convs()
        self.logvar = nn.ParameterDict({"logvar": nn.Parameter(torch.zeros((), device=device))})
        learned_variance = self.logvar.parameters() if recipe.vq is None else ()
        self.optimizer = adamw([*self.model.parameters(), *learned_variance], loop)
        self.discriminator: PatchDiscriminator | None = None
        if recipe.disc_weight > 0:
            self.discriminator = placed(PatchDiscriminator(recipe.disc_channels, recipe.disc_layers), device, loop)
            self.disc_optimizer = adamw(self.discriminator.parameters(), loop, recipe.disc_learning_rate)

    def __len__(self) -> int:
        return len(self.data)

    def modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"model": self.model, "ema": self.ema.module, "logvar": self.logvar}
        return modules if self.discriminator is None else {**modules, "discriminator": self.discriminator}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        optimizers: dict[str, torch.optim.Optimizer] = {"model": self.optimizer}
        return optimizers if self.discriminator is None else {**optimizers, "discriminator": self.disc_optimizer}

    def extra(self) -> dict[str, Tensor]:
        return {"counts": self.counts} if len(self.counts) else {}

    def trained(self) -> AutoencoderKL | VQModel:
        """A model on the CPU with the averaged weights, and without what only training needs."""
        return trained_model(self.recipe, self.ema.module.state_dict(), "the first stage just trained")

    # One step

    def step(self, number: int, batches: list[Tensor], generator: torch.Generator) -> dict[str, float]:
        self.quantizing = self.recipe.vq is not None and number >= self.recipe.quantize_from
        if self.quantizing and number == self.recipe.quantize_from and self.recipe.init_codebook:
            self._init_codebook(generator)
        discriminator = self.discriminator if number >= self.recipe.disc_start else None
        metrics: dict[str, float] = {}
        for index in batches:
            images = self._images(index, generator)
            loss, reconstruction, values = self._generator_loss(images, generator, discriminator)
            (loss / len(batches)).backward()
            if discriminator is not None:
                disc_loss, disc_values = self._discriminator_loss(discriminator, images, reconstruction.detach())
                (disc_loss / len(batches)).backward()
                values.update(disc_values)
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0.0) + float(value) / len(batches)
        metrics["gradient_norm"] = float(update_weights(self.optimizer, self.loop.grad_clip))
        if discriminator is not None:
            metrics["disc_gradient_norm"] = float(update_weights(self.disc_optimizer, self.loop.grad_clip))
        self.ema.update(number)
        self._revive(number, generator)
        return metrics

    def _images(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """The examples `index`, augmented, on the device: (B, 3, H, W) in [-1, 1]."""
        recipe, count = self.recipe, len(index)
        shift = flip = None
        if recipe.shift:
            shift = torch.randint(-recipe.shift, recipe.shift + 1, (count, 2), generator=generator)
        if recipe.horizontal_flip:
            flip = torch.rand(count, generator=generator) < 0.5
        images = self.data.batch(index, shift=shift, flip=flip).to(self.device)
        return images.to(memory_format=torch.channels_last) if self.loop.channels_last else images

    def _generator_loss(
        self, images: Tensor, generator: torch.Generator, discriminator: PatchDiscriminator | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The autoencoder's loss, its reconstruction and the metrics."""
        recipe = self.recipe
        with mixed_precision(self.device, self.loop):
            out = self._reconstruct(images, generator)
        reconstruction, regulariser = out.sample.float(), out.regulariser
        error = self._pixel_error(images, reconstruction)  # (B, 3, H, W)
        values = {"pixel": error.mean().detach()}
        if self.lpips is not None:
            perceptual = self.lpips(images, reconstruction)  # (B, 1, 1, 1)
            values["lpips"] = perceptual.mean().detach()
            error = error + recipe.lpips_weight * perceptual
        if isinstance(regulariser, DiagonalGaussian):
            logvar = self.logvar["logvar"]
            reconstruction_loss = (error / logvar.exp() + logvar).sum() / len(images)
            kl = regulariser.kl().mean()
            loss = reconstruction_loss + recipe.kl_weight * kl
            values.update(kl=kl.detach(), logvar=logvar.detach())
        else:
            loss = reconstruction_loss = error.mean()
            if regulariser is not None:
                loss = reconstruction_loss + recipe.codebook_weight * regulariser.loss
                self.counts += torch.bincount(regulariser.indices.flatten(), minlength=len(self.counts)).cpu()
                values.update(vq=regulariser.loss.detach(), perplexity=regulariser.perplexity)
        if discriminator is not None:
            generator_loss, weight = self._adversarial_loss(discriminator, reconstruction_loss, reconstruction)
            loss = loss + recipe.disc_weight * weight * generator_loss
            values["adaptive"] = weight
        return loss, reconstruction, {"loss": loss.detach(), **values}

    def _reconstruct(self, images: Tensor, generator: torch.Generator) -> DecoderOutput:
        """The output in training; without a regulariser before the codebook starts."""
        out: DecoderOutput
        if isinstance(self.model, AutoencoderKL):
            out = self.model(images, sample_posterior=True, generator=generator)
        elif self.quantizing:
            out = self.model(images)
        else:
            z = self._noisy(self.model.encode_latents(images), generator)
            out = self.model.decode(z, force_not_quantize=True)
        return out

    def _noisy(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """z plus noise of `latent_noise` times its own standard deviation.

        The gradient flows through the deviation, too. What counts is the ratio, so the encoder gains nothing by larger
        latents, only by spreading them over all channels.
        """
        if self.recipe.latent_noise == 0:
            return z
        centred = z.float() - z.float().mean((0, 2, 3), keepdim=True)
        deviation = centred.square().mean().sqrt()
        return z + self.recipe.latent_noise * deviation * torch.randn(z.shape, generator=generator).to(z.device)

    def _pixel_error(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        difference = reconstruction - images
        if self.recipe.pixel_loss == "l1":
            return difference.abs()
        if self.recipe.pixel_loss == "l2":
            return difference.square()
        return difference.abs() + difference.square()

    def _adversarial_loss(
        self, discriminator: PatchDiscriminator, reconstruction_loss: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The generator's loss and its adaptive weight."""
        discriminator.requires_grad_(False)
        with mixed_precision(self.device, self.loop):
            fake = discriminator(reconstruction)
        discriminator.requires_grad_(True)
        loss = -fake.float().mean()
        return loss, adaptive_weight(reconstruction_loss, loss, self.model.decoder.conv_out.weight)

    def _discriminator_loss(
        self, discriminator: PatchDiscriminator, images: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with mixed_precision(self.device, self.loop):
            real, fake = discriminator(images), discriminator(reconstruction)
        real, fake = real.float(), fake.float()
        loss = hinge_loss(real, fake)
        return loss, {"disc": loss.detach(), "disc_real": real.mean().detach(), "disc_fake": fake.mean().detach()}

    # The codebook

    @torch.no_grad()
    def _latent_vectors(self, index: Tensor) -> Tensor:
        """The encoder's output on examples `index` as vectors (N, d), before quantization."""
        z = torch.cat([self._encode(self.data.batch(part)) for part in index.split(self.loop.batch_size)])
        return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])

    def _encode(self, images: Tensor) -> Tensor:
        with mixed_precision(self.device, self.loop):
            return self.model.encode_latents(images.to(self.device)).float()

    def _init_codebook(self, generator: torch.Generator) -> None:
        assert isinstance(self.model, VQModel) and isinstance(self.ema.module, VQModel)
        side = self.data.images.shape[-1] // self.model.config.downsampling_factor
        count = min(len(self.data), math.ceil(INIT_LATENTS / side**2))
        vectors = self._latent_vectors(torch.randperm(len(self.data), generator=generator)[:count])
        self.model.quantize.init_from_data(vectors, generator)
        self.ema.module.quantize.load_state_dict(self.model.quantize.state_dict())

    @torch.no_grad()
    def _revive(self, number: int, generator: torch.Generator) -> None:
        """Move codes that nothing chose to latents of other examples, in the average too; their momenta start anew."""
        recipe = self.recipe
        due = self.quantizing and recipe.revive_every and (number + 1) % recipe.revive_every == 0
        if not due or (recipe.revive_until is not None and number >= recipe.revive_until):
            return
        assert isinstance(self.model, VQModel) and isinstance(self.ema.module, VQModel)
        dead = (self.counts == 0).to(self.device)
        if dead.any():
            count = min(len(self.data), REVIVAL_IMAGES)
            vectors = self._latent_vectors(torch.randperm(len(self.data), generator=generator)[:count])
            self.model.quantize.revive_dead_codes(vectors, self.counts.to(self.device), generator)
            codebook = self.model.quantize.embedding.weight
            self.ema.module.quantize.embedding.weight[dead] = codebook[dead]
            for name in ("exp_avg", "exp_avg_sq") if codebook in self.optimizer.state else ():
                self.optimizer.state[codebook][name][dead] = 0
        self.counts.zero_()

    # Measuring and showing

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure the averaged weights: the PSNR on held-out images, and the use of the codebook on trained ones.

        If nothing is held out, the PSNR is that on trained images.
        """
        squares = []
        for part in torch.arange(min(len(self.measured), EVALUATION_IMAGES)).split(self.loop.batch_size):
            images = self.measured.batch(part)
            shown = to_uint8(self._shown(images)).permute(0, 3, 1, 2) / 255
            squares.append((shown - (images + 1) / 2).square().flatten(1).mean(1))
        values = reconstruction_psnr(torch.cat(squares), peak=1.0)
        if isinstance(self.ema.module, VQModel):
            counts = self._code_counts(self.ema.module)
            values |= {"codebook_usage": codebook_usage(counts), "codebook_perplexity": codebook_perplexity(counts)}
        return values

    def _code_counts(self, model: VQModel) -> Tensor:
        """(codes,) int64: how often each code is chosen on a sample of the training images."""
        counts = torch.zeros(len(self.counts), dtype=torch.int64)
        index = torch.randperm(len(self.data), generator=seeded(self.seed, "usage"))[: 2 * EVALUATION_IMAGES]
        for part in index.split(self.loop.batch_size):
            indices = model.quantize(model.encode_latents(self.data.batch(part).to(self.device))).indices
            counts += torch.bincount(indices.flatten().cpu(), minlength=len(counts))
        return counts

    def _shown(self, images: Tensor) -> Tensor:
        """The averaged weights' reconstruction of (B, 3, H, W), without noise."""
        model, images = self.ema.module, images.to(self.device)
        out: DecoderOutput
        if isinstance(model, AutoencoderKL):
            out = model.decode(model.encode(images).latent_dist.mode())
        else:
            out = model.decode(model.encode_latents(images), force_not_quantize=not self.quantizing)
        return out.sample

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """Rows of held-out images, each row above its reconstructions."""
        index = torch.randperm(len(self.measured), generator=generator)[:32]
        images = self.measured.batch(index)
        shown = torch.cat([to_uint8(self._shown(part)) for part in images.split(self.loop.batch_size)])
        rows = [torch.cat(pair) for pair in zip(to_uint8(images).split(8), shown.split(8), strict=True)]
        return torch.cat([grid(row, columns=min(8, len(images)), gap=2, fill=200) for row in rows])


def untrained(recipe: FirstStageRecipe) -> AutoencoderKL | VQModel:
    """The model that the recipe describes, with random weights."""
    config = recipe.model
    return VQModel(config) if isinstance(config, VQConfig) else AutoencoderKL(config)


def trained_model(recipe: FirstStageRecipe, averages: dict[str, Tensor], origin: str) -> AutoencoderKL | VQModel:
    """The recipe's model on the CPU with a copy of these averaged weights, without what only training needs.

    `origin` is named in errors: CheckpointError if the weights do not fit.
    """
    weights = {
        name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in without_training_state(averages).items()
    }
    config = recipe.model
    if isinstance(config, VQConfig):
        return assemble(VQModel, config.trained, weights, None, origin).requires_grad_(False)
    return assemble(AutoencoderKL, config, weights, None, origin).requires_grad_(False)


def _lpips(device: torch.device) -> nn.Module:
    try:
        import lpips
    except ImportError as error:
        raise DataError('lpips_weight needs the package lpips: pip install "ldm_fast[lpips]"') from error
    network: nn.Module = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    return network.to(device)
