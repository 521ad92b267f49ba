"""The patch discriminator of the first stage's adversarial loss (Isola et al., arXiv:1611.07004)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) -> logits (B, 1, h, w), one for each patch; positive means "real".

    Each of `layers` strided convolutions doubles the channels, up to eight times the first's. With three of them a
    patch is 70 × 70 pixels.
    """

    def __init__(self, channels: int = 64, layers: int = 3, in_channels: int = 3):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = channels
        for i in range(1, layers + 1):
            width = channels * min(2**i, 8)
            stride = 2 if i < layers else 1
            blocks += [nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width)]
            blocks += [nn.LeakyReLU(0.2)]
            before = width
        blocks.append(nn.Conv2d(before, 1, 4, padding=1))
        self.layers = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    @staticmethod
    def least_side(layers: int) -> int:
        """Return the smallest side of an image with a patch: `layers` convolutions halve it, two more take 1 each."""
        return 3 << layers

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss from its logits on real and on reconstructed images (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Return |∇ L_rec| / (|∇ L_GAN| + 1e-4) at the decoder's last layer, at most 1e4 (Esser et al. 2021, eq. 7)."""
    (by_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (by_generator,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    ratio: Tensor = by_reconstruction.norm() / (by_generator.norm() + 1e-4)
    return ratio.clamp(0, 1e4).detach()
