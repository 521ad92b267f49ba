"""The two regularisations of a first stage's latent: a Gaussian (KL-reg) and a codebook (VQ-reg)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.diffusion.schedule import noise_like


class DiagonalGaussian:
    """The encoder's distribution q(z | x) = N(mean, diag(exp(logvar))), from `parameters` (B, 2 C, h, w)."""

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)  # (B, C, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    @property
    def var(self) -> Tensor:
        return self.logvar.exp()

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Return a random z. With one generator for each sample, a sample depends on its own alone."""
        if generator is None:  # not randn_like: it fills channels_last memory in another order
            noise = torch.randn(self.mean.shape, device=self.mean.device, dtype=self.mean.dtype)
        else:
            noise = noise_like(self.mean, generator)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """Return the most likely z."""
        return self.mean

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """Return KL(q(z | x) ‖ other) of each sample, (B,), in nats. `other` is N(0, 1) by default."""
        if other is None:
            return 0.5 * (self.mean.square() + self.var - 1 - self.logvar).flatten(1).sum(1)
        squares = ((self.mean - other.mean).square() + self.var) * (-other.logvar).exp()
        return 0.5 * (squares - 1 - self.logvar + other.logvar).flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Return -log q(z | x) of a z, summed over `dims`: by default of each sample, (B,), in nats."""
        squares = (sample - self.mean).square() * (-self.logvar).exp()
        return 0.5 * (math.log(2 * math.pi) + self.logvar + squares).sum(tuple(dims))


@dataclass
class QuantizerOutput:
    """The codes of a latent, and what trains them."""

    z_q: Tensor  # (B, d, h, w): the codes, with the straight-through gradient
    indices: Tensor  # (B, h, w) int64
    loss: Tensor  # trains the encoder and, by gradient, the codebook
    codes: int  # K, the size of the codebook

    @property
    def counts(self) -> Tensor:
        """How often each code was chosen in this batch, (K,) float32."""
        ones = torch.ones_like(self.indices, dtype=torch.float32).flatten()
        return ones.new_zeros(self.codes).scatter_add_(0, self.indices.flatten(), ones)

    @property
    def usage(self) -> Tensor:
        """The share of codes that were chosen at all in this batch."""
        return torch.mean((self.counts > 0).float())

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the codes in this batch: K if all are chosen equally often, 1 if only one is chosen."""
        return torch.exp(torch.special.entr(self.counts / max(1, self.indices.numel())).sum())


class VectorQuantizer(nn.Module):
    """Nearest of `codes` vectors of width `channels`, with the straight-through estimator (arXiv:1711.00937).

    The codebook learns by gradient from ‖sg[z] - e‖², unless `ema_decay` γ is given. Then every forward pass in
    training mode moves it to exponential moving averages of the vectors that chose each code (appendix A.1 there):

        N_k <- γ N_k + (1 - γ) n_k        n_k vectors chose code k, s_k is their sum
        e_k <- e_k + (1 - γ) (s_k - n_k e_k) / N_k

    This is m_k / N_k with m_k <- γ m_k + (1 - γ) s_k, but only N (`ema_counts`) needs to be kept, and a code that
    nothing chooses stays where it is, bit for bit. Every code starts as if one vector had chosen it. If
    torch.distributed is initialised, n and s are summed over all processes. Keep the codebook in float32: its steps are
    small.

    `commitment_weight` is β of the loss; `legacy` puts it on the codebook term instead, as the published code does.

    Raises ValueError for an `ema_decay` outside [0, 1).
    """

    def __init__(
        self,
        codes: int,
        channels: int,
        commitment_weight: float = 0.25,
        legacy: bool = False,
        ema_decay: float | None = None,
    ):
        super().__init__()
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"VectorQuantizer: ema_decay must be in [0, 1), got {ema_decay}")
        self.commitment_weight = commitment_weight
        self.legacy = legacy
        self.ema_decay = ema_decay
        self.ema_counts: Tensor  # (K,), if `ema_decay` is given
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)
        if ema_decay is not None:
            self.embedding.requires_grad_(False)
            self.register_buffer("ema_counts", torch.ones(codes))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Return the codes of z (B, d, h, w), their indices and the loss."""
        codebook = self.embedding.weight  # (K, d)
        z = z.to(codebook)  # in its dtype; inside `Float32Arithmetic` both become float32
        codebook = codebook.to(z)
        follow = self.ema_decay is not None and self.training
        if follow:
            indices, counts, sums = ops.nearest_codebook_stats(z, codebook)
        else:
            indices = ops.nearest_codebook(z, codebook)  # (B, h, w)
        codes = F.embedding(indices, codebook).permute(0, 3, 1, 2)  # (B, d, h, w)
        if follow:
            self._follow(counts, sums)
        commitment_loss = F.mse_loss(z, codes.detach())
        loss = commitment_loss if self.legacy else self.commitment_weight * commitment_loss
        if self.ema_decay is None:
            codebook_loss = F.mse_loss(codes, z.detach())
            loss = loss + (self.commitment_weight * codebook_loss if self.legacy else codebook_loss)
        return QuantizerOutput(z + (codes - z).detach(), indices, loss, len(codebook))

    @torch.no_grad()
    def _follow(self, counts: Tensor, sums: Tensor) -> None:
        """Take a step of the moving averages, from how often each code was chosen (K,) and the sums (K, d)."""
        assert self.ema_decay is not None, "VectorQuantizer: there are no moving averages"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        codebook, step = self.embedding.weight, 1 - self.ema_decay
        counts = counts.to(self.ema_counts)
        self.ema_counts.lerp_(counts, step)
        chosen = (counts > 0)[:, None]
        move = step * (sums - counts[:, None] * codebook) / self.ema_counts[:, None]
        codebook.add_(torch.where(chosen, move, 0).to(codebook.dtype))

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return codes by their indices, in any shape. With `shape` (B, h, w, d), return a latent (B, d, h, w)."""
        codes = F.embedding(indices, self.embedding.weight)
        return codes if shape is None else codes.reshape(*shape).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def init_from_data(self, z: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        """Set the codebook to k-means centres of the vectors z (N, d); codes left empty restart at random vectors."""
        codes = self.embedding.weight
        codes.copy_(_draw(z, len(codes), generator))
        for _ in range(iterations):
            _, counts, sums = ops.nearest_codebook_stats(z, codes.detach())
            codes.copy_(torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes))
            self.revive_dead_codes(z, counts, generator)
        if self.ema_decay is not None:
            self.ema_counts.fill_(1)

    @torch.no_grad()
    def revive_dead_codes(self, z: Tensor, counts: Tensor, generator: torch.Generator) -> int:
        """Move every code with a count of 0 to a random one of the vectors z (N, d). Return how many there were."""
        dead = counts == 0
        count = int(dead.sum())
        if count:
            self.embedding.weight[dead] = _draw(z, count, generator).to(self.embedding.weight.dtype)
            if self.ema_decay is not None:
                self.ema_counts[dead] = 1
        return count


def _draw(z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` rows of z at random, different ones unless there are too few."""
    z = z.unique(dim=0)
    if count <= z.shape[0]:
        rows = torch.randperm(z.shape[0], generator=generator, device=generator.device)[:count]
    else:
        rows = torch.randint(z.shape[0], (count,), generator=generator, device=generator.device)
    return z[rows.to(z.device)]
