"""The two regularisations of a first stage's latent: a Gaussian (KL-reg) and a codebook (VQ-reg)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.samplers import noise_like


class DiagonalGaussian:
    """The encoder's distribution q(z | x) = N(mean, diag(exp(logvar)))."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)  # (B, C, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    @property
    def var(self) -> Tensor:
        return self.logvar.exp()

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """A random z. With one generator per sample, each depends on its own alone."""
        if generator is None:  # not randn_like: it fills channels_last memory in another order
            noise = torch.randn(self.mean.shape, device=self.mean.device, dtype=self.mean.dtype)
        else:
            noise = noise_like(self.mean, generator)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL(q(z | x) ‖ N(0, 1)) of each sample, (B,), in nats."""
        return 0.5 * (self.mean.square() + self.var - 1 - self.logvar).flatten(1).sum(1)

    def nll(self, z: Tensor) -> Tensor:
        """-log q(z | x) of each sample, (B,), in nats."""
        squares = (z - self.mean).square() * (-self.logvar).exp()
        return 0.5 * (math.log(2 * math.pi) + self.logvar + squares).flatten(1).sum(1)


@dataclass
class QuantizerOutput:
    z_q: Tensor  # (B, d, h, w): the codes, with the straight-through gradient
    indices: Tensor  # (B, h, w) int64
    loss: Tensor  # codebook + commitment loss
    perplexity: Tensor  # exp of the entropy of the codes in this batch: how many are in use


class VectorQuantizer(nn.Module):
    """Nearest of `codes` vectors of width `channels`, with the straight-through estimator
    (van den Oord et al., arXiv:1711.00937).

    `commitment_weight` is β of the loss; `legacy` puts it on the codebook term instead, as the published code does.
    """

    def __init__(self, codes: int, channels: int, commitment_weight: float = 0.25, legacy: bool = False):
        super().__init__()
        self.commitment_weight = commitment_weight
        self.legacy = legacy
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """z (B, d, h, w) → its codes, their indices and the loss."""
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

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Codes by their indices, in any shape. With `shape` (B, h, w, d) they come as a latent (B, d, h, w)."""
        codes = F.embedding(indices, self.embedding.weight)
        return codes if shape is None else codes.reshape(*shape).permute(0, 3, 1, 2).contiguous()

    def _perplexity(self, indices: Tensor) -> Tensor:
        ones = torch.ones_like(indices, dtype=torch.float32).flatten()
        counts = ones.new_zeros(self.embedding.num_embeddings).scatter_add_(0, indices.flatten(), ones)
        return torch.special.entr(counts / max(1, indices.numel())).sum().exp()

    @torch.no_grad()
    def init_from_data(self, z: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        """Set the codebook to k-means centres of the vectors z (N, d); codes left empty restart at random vectors."""
        codes = self.embedding.weight
        codes.copy_(_draw(z, len(codes), generator))
        for _ in range(iterations):
            _, counts, sums = ops.nearest_codebook_stats(z, codes.detach())
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
