"""The first stage: encoder E, decoder D and the regularisation of the latent between them (arXiv:2112.10752, 3.1).

`AutoencoderKL` regularises by a KL term towards the standard normal, `VQModel` by a vector-quantization layer absorbed
into the decoder. Both compress by f = 2^m, m being the number of levels less one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.layers import Downsample, GroupNorm, ResBlock, SelfAttention2d, Upsample

EPS = 1e-6  # of every group norm in the first stage


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of a first stage. The defaults are Stable Diffusion's kl-f8.

    `latent_channels` is the width of z (embed_dim in LDM), `z_channels` that of the encoder's last convolution, the
    same unless given. `attention_levels` are the levels (0 = full resolution) with attention after every block.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    z_channels: int | None = None
    attention_levels: tuple[int, ...] = ()
    mid_block_add_attention: bool = True
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"{type(self).__name__}: norm_num_groups {self.norm_num_groups} must divide {channels} channels"
                )
        for level in self.attention_levels:
            if not 0 <= level < len(self.block_out_channels):
                raise ValueError(f"{type(self).__name__}: attention_levels has no level {level}")

    @property
    def downsampling_factor(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def encoder_channels(self) -> int:
        return self.latent_channels if self.z_channels is None else self.z_channels


@dataclass(frozen=True)
class VQConfig(AutoencoderConfig):
    """First stage with a codebook of `num_vq_embeddings` codes. The defaults are LDM's vq-f4.

    `commitment_weight` is β of the VQ loss; `legacy` puts it on the codebook term instead, as the published code does.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512)
    latent_channels: int = 3
    num_vq_embeddings: int = 8192
    commitment_weight: float = 0.25
    legacy: bool = False


@dataclass
class DecoderOutput:
    sample: Tensor  # (B, out_channels, H, W)


@dataclass
class AutoencoderKLOutput:
    latent_dist: DiagonalGaussian


@dataclass
class VQEncoderOutput:
    latents: Tensor  # (B, latent_channels, H/f, W/f), not yet quantized


@dataclass
class QuantizerOutput:
    z_q: Tensor  # (B, d, h, w): the codes, with the straight-through gradient
    indices: Tensor  # (B, h, w) int64
    loss: Tensor  # codebook + commitment loss
    perplexity: Tensor  # exp of the entropy of the codes in this batch: how many are in use


class Encoder(nn.Module):
    """Image (B, in, H, W) → features (B, outputs, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig, outputs: int):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(EncoderBlock(config, level) for level in range(len(channels)))
        self.mid_block = MidBlock(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, C, H, W)
        for block in self.down_blocks:
            h = block(h)  # (B, C', H/2, W/2)
        h = self.mid_block(h)
        return self.conv_out(self.conv_norm_out(h, "silu"))  # (B, outputs, H/f, W/f)


class Decoder(nn.Module):
    """Latent (B, z, H/f, W/f) → image (B, out, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.encoder_channels, channels[-1], 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(DecoderBlock(config, level) for level in reversed(range(len(channels))))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], EPS)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))  # (B, C, H/f, W/f)
        for block in self.up_blocks:
            h = block(h)  # (B, C', 2H, 2W)
        return self.conv_out(self.conv_norm_out(h, "silu"))  # (B, out, H, W)


def _res_blocks(config: AutoencoderConfig, inputs: int, outputs: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResBlock(inputs if i == 0 else outputs, outputs, groups=config.norm_num_groups, eps=EPS) for i in range(count)
    )


def _self_attention(config: AutoencoderConfig, channels: int) -> SelfAttention2d:
    return SelfAttention2d(channels, heads=1, head_dim=channels, groups=config.norm_num_groups, eps=EPS)


def _attentions(config: AutoencoderConfig, level: int, count: int) -> nn.ModuleList | None:
    if level not in config.attention_levels:
        return None
    return nn.ModuleList(_self_attention(config, config.block_out_channels[level]) for _ in range(count))


class EncoderBlock(nn.Module):
    def __init__(self, config: AutoencoderConfig, level: int):
        super().__init__()
        channels, count = config.block_out_channels, config.layers_per_block
        self.resnets = _res_blocks(config, channels[max(level - 1, 0)], channels[level], count)
        self.attentions = _attentions(config, level, count)
        last = level == len(channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample(channels[level], asymmetric=True)])

    def forward(self, h: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h)
            if self.attentions is not None:
                h = self.attentions[i](h)
        return h if self.downsamplers is None else self.downsamplers[0](h)


class DecoderBlock(nn.Module):
    def __init__(self, config: AutoencoderConfig, level: int):
        super().__init__()
        channels, count = config.block_out_channels, config.layers_per_block + 1
        self.resnets = _res_blocks(config, channels[min(level + 1, len(channels) - 1)], channels[level], count)
        self.attentions = _attentions(config, level, count)
        self.upsamplers = None if level == 0 else nn.ModuleList([Upsample(channels[level])])

    def forward(self, h: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h)
            if self.attentions is not None:
                h = self.attentions[i](h)
        return h if self.upsamplers is None else self.upsamplers[0](h)


class MidBlock(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = _res_blocks(config, channels, channels, 2)
        attention = config.mid_block_add_attention
        self.attentions = nn.ModuleList([_self_attention(config, channels)]) if attention else None

    def forward(self, h: Tensor) -> Tensor:
        h = self.resnets[0](h)
        if self.attentions is not None:
            h = self.attentions[0](h)
        return self.resnets[1](h)


class DiagonalGaussian:
    """The encoder's distribution q(z | x) = N(mean, diag(exp(logvar)))."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)  # (B, C, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL(q(z | x) ‖ N(0, 1)) of each sample, (B,), in nats."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)

    def nll(self, z: Tensor) -> Tensor:
        """-log q(z | x) of each sample, (B,), in nats."""
        squares = (z - self.mean).square() * (-self.logvar).exp()
        return 0.5 * (math.log(2 * math.pi) + self.logvar + squares).flatten(1).sum(1)


class _FirstStage(nn.Module):
    """What the two first stages share: E, D and the 1×1 convolutions on either side of the latent."""

    def __init__(self, config: AutoencoderConfig, moments: int):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, moments * config.encoder_channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments * config.encoder_channels, moments * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.encoder_channels, 1)

    @torch.no_grad()
    def open_latent_convs(self) -> None:
        """Sets the 1×1 convolutions around the latent to the identity: how training is to start.

        With the convolution on either side of them they are four linear layers in a row, and gradient descent on such a
        chain from random weights finds maps of low rank: latents that lie in a plane, whatever their channels.
        """
        for conv in (self.quant_conv, self.post_quant_conv):
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    def _encode(self, x: Tensor) -> Tensor:
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ValueError(f"{type(self).__name__}: x must be (B, {config.in_channels}, H, W), got {tuple(x.shape)}")
        return self.quant_conv(self.encoder(x))

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def _check_latent(self, z: Tensor) -> None:
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"{type(self).__name__}: z must be (B, {self.config.latent_channels}, h, w), got {tuple(z.shape)}"
            )


class AutoencoderKL(_FirstStage):
    """First stage with a KL-regularised latent. Images and reconstructions lie in [-1, 1]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config, moments=2)

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """x (B, in_channels, H, W) → `.latent_dist` over z (B, latent_channels, H/f, W/f)."""
        return AutoencoderKLOutput(DiagonalGaussian(self._encode(x)))

    def encode_latents(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latent that the second stage learns: a sample of q(z | x)."""
        return self.encode(x).latent_dist.sample(generator)

    def decode(self, z: Tensor) -> DecoderOutput:
        """z (B, latent_channels, h, w) → `.sample` (B, out_channels, f·h, f·w)."""
        self._check_latent(z)
        return DecoderOutput(self._decode(z))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        posterior = self.encode(x).latent_dist
        return self.decode(posterior.sample(generator)).sample, posterior


class VQModel(_FirstStage):
    """First stage with a vector-quantized latent. Images and reconstructions lie in [-1, 1]."""

    def __init__(self, config: VQConfig):
        super().__init__(config, moments=1)
        self.quantize = VectorQuantizer(config)

    def encode(self, x: Tensor) -> VQEncoderOutput:
        """x (B, in_channels, H, W) → `.latents` (B, latent_channels, H/f, W/f), not yet quantized."""
        return VQEncoderOutput(self._encode(x))

    def encode_latents(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latent that the second stage learns: the one before quantization (decoding quantizes)."""
        return self._encode(x)

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> DecoderOutput:
        """z (B, latent_channels, h, w), quantized here unless told not to → `.sample` (B, out_channels, f·h, f·w)."""
        self._check_latent(z)
        return DecoderOutput(self._decode(z if force_not_quantize else self.quantize(z).z_q))

    def forward(self, x: Tensor) -> tuple[Tensor, QuantizerOutput]:
        quantized = self.quantize(self._encode(x))
        return self._decode(quantized.z_q), quantized


class VectorQuantizer(nn.Module):
    """Nearest codes with the straight-through estimator (van den Oord et al., arXiv:1711.00937)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.commitment_weight = config.commitment_weight
        self.legacy = config.legacy
        self.embedding = nn.Embedding(config.num_vq_embeddings, config.latent_channels)
        nn.init.uniform_(self.embedding.weight, -1 / config.num_vq_embeddings, 1 / config.num_vq_embeddings)

    def forward(self, z: Tensor) -> QuantizerOutput:
        codebook = self.embedding.weight  # (K, d)
        z = z.to(codebook.dtype)
        indices = ops.nearest_codebook(z, codebook)  # (B, h, w)
        codes = F.embedding(indices, codebook).permute(0, 3, 1, 2)  # (B, d, h, w)
        codebook_loss = F.mse_loss(codes, z.detach())
        commitment_loss = F.mse_loss(z, codes.detach())
        if self.legacy:
            loss = commitment_loss + self.commitment_weight * codebook_loss
        else:
            loss = codebook_loss + self.commitment_weight * commitment_loss
        return QuantizerOutput(z + (codes - z).detach(), indices, loss, self._perplexity(indices))

    def _perplexity(self, indices: Tensor) -> Tensor:
        p = torch.bincount(indices.flatten(), minlength=self.embedding.num_embeddings) / max(1, indices.numel())
        return torch.special.entr(p).sum().exp()

    @torch.no_grad()
    def init_from_data(self, z: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        """Set the codebook to k-means centres of the vectors z (N, d); codes left empty restart at random vectors."""
        codes = self.embedding.weight
        codes.copy_(_draw(z, len(codes), generator))
        for _ in range(iterations):
            indices = ops.nearest_codebook(z, codes.detach())
            counts = torch.bincount(indices, minlength=len(codes))
            sums = torch.zeros_like(codes).index_add_(0, indices, z.to(codes.dtype))
            codes.copy_(torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes))
            self.revive_dead_codes(z, counts, generator)

    @torch.no_grad()
    def revive_dead_codes(self, z: Tensor, counts: Tensor, generator: torch.Generator) -> int:
        """Move every code with a count of 0 to a random one of the vectors z (N, d). Returns how many there were."""
        dead = counts == 0
        count = int(dead.sum())
        if count:
            self.embedding.weight[dead] = _draw(z, count, generator).to(self.embedding.weight.dtype)
        return count


def _draw(z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different rows of z at random, some of them again only where there are too few."""
    z = z.unique(dim=0)
    if count <= z.shape[0]:
        rows = torch.randperm(z.shape[0], generator=generator, device=generator.device)[:count]
    else:
        rows = torch.randint(z.shape[0], (count,), generator=generator, device=generator.device)
    return z[rows.to(z.device)]
