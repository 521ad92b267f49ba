"""Train a VQ-VAE of your own whose codebook follows moving averages: one call gives indices, counts and sums.

python examples/vq_vae_with_ema_codebook.py --steps 300

The update is that of van den Oord et al., arXiv:1711.00937, appendix A.1. `ldm_fast.VQModel` has it built in
(`VQConfig.codebook_ema_decay`); this is for a model that you wrote yourself.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--codes", type=int, default=64)
args = parser.parse_args()


class Codebook(nn.Module):
    """Replaces each vector of a map by the nearest of K codes, with the straight-through gradient."""

    def __init__(self, codes: int, width: int, decay: float = 0.99):
        super().__init__()
        self.decay, self.started = decay, False
        self.register_buffer("codes", torch.randn(codes, width))  # (K, d)
        self.register_buffer("counts", torch.ones(codes))  # (K,), how many vectors choose a code
        self.register_buffer("sums", self.codes.clone())  # (K, d), the sum of those vectors

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map z (B, d, h, w) to the nearest codes, (B, d, h, w), and their indices, (B, h, w)."""
        if self.training and not self.started:  # codes far from the latents would never be chosen
            vectors = z.detach().permute(0, 2, 3, 1).flatten(0, 2)
            self.codes.copy_(vectors[torch.randperm(len(vectors))[: len(self.codes)]])
            self.sums.copy_(self.codes)
            self.started = True
        indices, counts, sums = ops.nearest_codebook_stats(z, self.codes)
        quantized = F.embedding(indices, self.codes).permute(0, 3, 1, 2)
        if self.training:
            self.counts.lerp_(counts.float(), 1 - self.decay)
            self.sums.lerp_(sums, 1 - self.decay)
            self.codes.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])
        return z + (quantized - z).detach(), indices


class VQVAE(nn.Module):
    """Two convolutions on either side of the codebook: 16 × 16 pixels become 4 × 4 codes."""

    def __init__(self, codes: int, width: int = 8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, width, 4, 2, 1))
        self.codebook = Codebook(codes, width)
        up = nn.ConvTranspose2d(width, 32, 4, 2, 1), nn.ConvTranspose2d(32, 3, 4, 2, 1)
        self.decoder = nn.Sequential(up[0], nn.SiLU(), up[1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x)
        quantized, indices = self.codebook(z)
        commitment = F.mse_loss(z, quantized.detach())  # the codebook itself needs no loss
        return self.decoder(quantized), indices, commitment


def squares(count: int, generator: torch.Generator) -> Tensor:
    """Draw a coloured square somewhere on a coloured ground: (count, 3, 16, 16) in [-1, 1]."""
    ground, colour = torch.rand(2, count, 3, 1, 1, generator=generator) * 2 - 1
    row, column = torch.randint(12, (2, count, 1, 1, 1), generator=generator)
    y, x = torch.arange(16)[:, None], torch.arange(16)
    inside = (y >= row) & (y < row + 5) & (x >= column) & (x < column + 5)
    return torch.where(inside, colour, ground)


torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
model = VQVAE(args.codes)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(1, args.steps + 1):
    x = squares(64, generator)
    reconstruction, indices, commitment = model(x)
    error = F.mse_loss(reconstruction, x)
    optimizer.zero_grad()
    (error + 0.25 * commitment).backward()
    optimizer.step()
    if step % max(1, args.steps // 10) == 0:
        used = len(indices.unique())
        print(f"step {step:4d}  error {error:.4f}  {used} of {args.codes} codes used in this batch")
