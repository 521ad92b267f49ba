"""Training of the first stage (arXiv:2112.10752, appendix G): pixel loss, LPIPS and PatchGAN, KL-reg or VQ-reg.

    L = L_rec + weight * adaptive * L_adv + regulariser

L_rec is the pixel loss + LPIPS: its mean under VQ-reg; under KL-reg the negative log-likelihood L_rec / exp(s) + s with
a learned s, summed over each image, as published.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ldm_fast.files.images import grid, to_uint8
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from ldm_fast.training.ema import Ema
from ldm_fast.training.image_set import DataError, ImageSet
from ldm_fast.training.recipe import FirstStageRecipe
from ldm_fast.training.stage import seeded, update_weights

INIT_LATENTS = 65536  # vectors that the codebook's k-means starts from
REVIVAL_IMAGES = 64  # whose latents dead codes move to
EVALUATION_IMAGES = 256  # at most so many held-out images for PSNR, as many trained ones for codebook usage


class FirstStage:
    """The first stage as the loop sees it."""

    name = "first_stage"

    def __init__(self, recipe: FirstStageRecipe, data: ImageSet, seed: int, device: torch.device):
        self.recipe, self.loop, self.device = recipe, recipe.loop, device
        self.data, self.seed = data.training(), seed
        self.held_out = data.evaluation() if bool(data.held_out.any()) else self.data
        side = self.data.images.shape[-1]
        if side % recipe.model.downsampling_factor:
            raise DataError(
                f"data.size {side} is no multiple of the first stage's f = {recipe.model.downsampling_factor}"
            )
        if recipe.disc_weight > 0 and side < (least := PatchDiscriminator.least_side(recipe.disc_layers)):
            raise DataError(f"data.size {side} is too small for disc_layers = {recipe.disc_layers}: {least} is needed")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=seeded(seed, self.name, "weights"))))
            self._build()
        self.ema = Ema(self.model, self.loop.ema_decay)
        codes = recipe.vq.num_vq_embeddings if recipe.vq is not None else 0
        self.quantizing = recipe.vq is not None  # False while the steps before `quantize_from` last
        self.counts = torch.zeros(codes, dtype=torch.int64)  # how often each code was chosen since the last revival
        self.lpips = _lpips(device) if recipe.lpips_weight > 0 else None

    def _build(self) -> None:
        recipe, loop, device = self.recipe, self.loop, self.device
        self.model = (VQModel(recipe.vq) if recipe.vq is not None else AutoencoderKL(recipe.kl)).to(device)
        self.model.open_latent_convs()
        layout = torch.channels_last if loop.channels_last else torch.contiguous_format
        self.model.to(memory_format=layout)
        self.logvar = nn.ParameterDict({"logvar": nn.Parameter(torch.zeros((), device=device))})
        params = [*self.model.parameters(), *(self.logvar.parameters() if recipe.vq is None else ())]
        options = {"betas": loop.betas, "weight_decay": loop.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(params, lr=loop.learning_rate, **options)
        self.discriminator = self.disc_optimizer = None
        if recipe.disc_weight > 0:
            self.discriminator = PatchDiscriminator(recipe.disc_channels, recipe.disc_layers).to(device)
            self.discriminator.to(memory_format=layout)
            rate = recipe.disc_learning_rate or loop.learning_rate
            self.disc_optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=rate, **options)

    def __len__(self) -> int:
        return len(self.data)

    def modules(self) -> dict[str, nn.Module]:
        modules = {"model": self.model, "ema": self.ema.module, "logvar": self.logvar}
        return modules if self.discriminator is None else {**modules, "discriminator": self.discriminator}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        optimizers = {"model": self.optimizer}
        return optimizers if self.disc_optimizer is None else {**optimizers, "discriminator": self.disc_optimizer}

    def extra(self) -> dict[str, Tensor]:
        return {"counts": self.counts} if len(self.counts) else {}

    # One step

    def step(self, number: int, batches: list[Tensor], generator: torch.Generator) -> dict[str, float]:
        self.quantizing = self.recipe.vq is not None and number >= self.recipe.quantize_from
        if self.quantizing and number == self.recipe.quantize_from and self.recipe.init_codebook:
            self._init_codebook(generator)
        metrics: dict[str, float] = {}
        adversarial = self.discriminator is not None and number >= self.recipe.disc_start
        for index in batches:
            images = self._images(index, generator)
            loss, reconstruction, values = self._generator_loss(images, generator, adversarial)
            (loss / len(batches)).backward()
            if adversarial:
                disc_loss, disc_values = self._discriminator_loss(images, reconstruction.detach())
                (disc_loss / len(batches)).backward()
                values.update(disc_values)
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0.0) + float(value) / len(batches)
        metrics["gradient_norm"] = float(update_weights(self.optimizer, self.loop.grad_clip))
        if adversarial:
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

    def _autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.loop.precision == "bf16")

    def _generator_loss(self, images: Tensor, generator: torch.Generator, adversarial: bool):
        """The autoencoder's loss, its reconstruction and the metrics."""
        recipe = self.recipe
        with self._autocast():
            if self.quantizing:
                out = self.model(images)
            elif recipe.vq is not None:
                z = self._noisy(self.model.encode_latents(images), generator)
                out = self.model.decode(z, force_not_quantize=True)
            else:
                out = self.model(images, sample_posterior=True, generator=generator)
        reconstruction, regulariser = out.sample.float(), out.regulariser
        error = self._pixel_error(images, reconstruction)  # (B, 3, H, W)
        values = {"pixel": error.mean().detach()}
        if self.lpips is not None:
            perceptual = self.lpips(images, reconstruction)  # (B, 1, 1, 1)
            values["lpips"] = perceptual.mean().detach()
            error = error + recipe.lpips_weight * perceptual
        if recipe.vq is not None and not self.quantizing:
            loss = reconstruction_loss = error.mean()
        elif recipe.vq is not None:
            reconstruction_loss = error.mean()
            loss = reconstruction_loss + recipe.codebook_weight * regulariser.loss
            self.counts += torch.bincount(regulariser.indices.flatten(), minlength=len(self.counts)).cpu()
            values.update(vq=regulariser.loss.detach(), perplexity=regulariser.perplexity)
        else:
            logvar = self.logvar["logvar"]
            reconstruction_loss = (error / logvar.exp() + logvar).sum() / len(images)
            kl = regulariser.kl().mean()
            loss = reconstruction_loss + recipe.kl_weight * kl
            values.update(kl=kl.detach(), logvar=logvar.detach())
        if adversarial:
            loss, values["adaptive"] = self._add_adversarial(loss, reconstruction_loss, reconstruction)
        return loss, reconstruction, {"loss": loss.detach(), **values}

    def _noisy(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """z plus noise of `latent_noise` times its own deviation, through which the gradient flows, too: what counts is
        the ratio, so the encoder gains nothing by larger latents, only by spreading them over all channels."""
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

    def _add_adversarial(self, loss: Tensor, reconstruction_loss: Tensor, reconstruction: Tensor):
        self.discriminator.requires_grad_(False)
        with self._autocast():
            fake = self.discriminator(reconstruction)
        self.discriminator.requires_grad_(True)
        generator_loss = -fake.float().mean()
        weight = adaptive_weight(reconstruction_loss, generator_loss, self.model.decoder.conv_out.weight)
        return loss + self.recipe.disc_weight * weight * generator_loss, weight

    def _discriminator_loss(self, images: Tensor, reconstruction: Tensor):
        with self._autocast():
            real, fake = self.discriminator(images), self.discriminator(reconstruction)
        real, fake = real.float(), fake.float()
        loss = hinge_loss(real, fake)
        values = {"disc": loss.detach(), "disc_real": real.mean().detach(), "disc_fake": fake.mean().detach()}
        return loss, values

    # The codebook

    @torch.no_grad()
    def _latent_vectors(self, index: Tensor) -> Tensor:
        """The encoder's output on examples `index` as vectors (N, d), before quantization."""
        z = torch.cat([self._encode(self.data.batch(part)) for part in index.split(self.loop.batch_size)])
        return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])

    def _encode(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self.model.encode_latents(images.to(self.device)).float()

    def _init_codebook(self, generator: torch.Generator) -> None:
        side = self.data.images.shape[-1] // self.recipe.vq.downsampling_factor
        count = min(len(self.data), math.ceil(INIT_LATENTS / side**2))
        vectors = self._latent_vectors(torch.randperm(len(self.data), generator=generator)[:count])
        self.model.quantize.init_from_data(vectors, generator)
        self.ema.module.quantize.load_state_dict(self.model.quantize.state_dict())

    @torch.no_grad()
    def _revive(self, number: int, generator: torch.Generator) -> None:
        """Moves codes that nothing chose to latents of other examples, in the average too; their momenta start anew."""
        recipe = self.recipe
        due = self.quantizing and recipe.revive_every and (number + 1) % recipe.revive_every == 0
        if not due or (recipe.revive_until is not None and number >= recipe.revive_until):
            return
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

    # What one looks at

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Of the EMA weights: PSNR on held-out images, or on trained ones where nothing is held out (their mean, and of
        their pooled error), and codebook usage."""
        squares, values = [], {}
        index = torch.arange(min(len(self.held_out), EVALUATION_IMAGES))
        for part in index.split(self.loop.batch_size):
            images = self.held_out.batch(part)
            shown, _ = self._reconstruct(images)
            squares.append((shown - (images + 1) / 2).square().flatten(1).mean(1))
        squares = torch.cat(squares).double().clamp(min=1e-10)
        values["psnr"] = float((-10 * squares.log10()).mean())
        values["psnr_pooled"] = float(-10 * squares.mean().log10())
        if self.recipe.vq is not None:
            values.update(self._codebook_usage())
        return values

    def _codebook_usage(self) -> dict[str, float]:
        """The share of codes that a sample of the training images uses, and the perplexity of their use."""
        counts = torch.zeros(self.recipe.vq.num_vq_embeddings, dtype=torch.int64)
        index = torch.randperm(len(self.data), generator=seeded(self.seed, "usage"))[: 2 * EVALUATION_IMAGES]
        for part in index.split(self.loop.batch_size):
            _, indices = self._reconstruct(self.data.batch(part), decode=False)
            counts += torch.bincount(indices.flatten().cpu(), minlength=len(counts))
        share = counts.double() / counts.sum()
        perplexity = torch.special.entr(share).sum().exp()
        return {"codebook_usage": float((counts > 0).double().mean()), "codebook_perplexity": float(perplexity)}

    def _reconstruct(self, images: Tensor, decode: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """EMA reconstruction of (B, 3, H, W) in [0, 1], rounded to 256 levels, and the codes' indices."""
        model = self.ema.module
        if self.recipe.vq is None:
            sample, indices = model.decode(model.encode(images.to(self.device)).latent_dist.mode()).sample, None
        else:
            z = model.encode_latents(images.to(self.device))
            indices = model.quantize(z).indices
            sample = model.decode(z, force_not_quantize=not self.quantizing).sample if decode else None
        if sample is None:
            return None, indices
        return (((sample.float().cpu().clamp(-1, 1) + 1) * 127.5).round() / 255), indices

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """Rows of held-out images, each over its reconstruction."""
        index = torch.randperm(len(self.held_out), generator=generator)[:32]
        images = self.held_out.batch(index)
        shown = torch.cat([self._reconstruct(part)[0] for part in images.split(self.loop.batch_size)]) * 2 - 1
        rows = [to_uint8(torch.cat(pair)) for pair in zip(images.split(8), shown.split(8), strict=True)]
        return torch.cat([grid(row, columns=min(8, len(images)), gap=2, fill=200) for row in rows])


def _lpips(device: torch.device) -> nn.Module:
    try:
        import lpips
    except ImportError as error:
        raise DataError('lpips_weight needs the package lpips: pip install "ldm_fast[lpips]"') from error
    return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False).to(device)
