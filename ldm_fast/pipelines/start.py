"""What sampling starts from: nothing but a size, or an image to change, or parts of one to keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_fast.configs.checks import check_number, whole_number
from ldm_fast.diffusion.samplers import Step
from ldm_fast.files.images import as_images, as_masks, check_multiple


@dataclass(frozen=True)
class Start:
    """What sampling starts from: a size (h, w) in the latent, and perhaps latents z (B, C, h, w) of an image.

    strength: the share of the steps that are run. keep: (B, 1, h, w), True where z is to stay as it is.
    """

    latent_size: tuple[int, int]
    strength: float = 1.0
    z: Tensor | None = None
    keep: Tensor | None = None

    @classmethod
    def prepare(
        cls,
        count: int,
        size: Any,
        init: Any,
        strength: float | None,
        mask: Any,
        *,
        factor: int,
        encode: Callable[[Tensor, torch.Generator], Tensor],
    ) -> Start:
        """Check the arguments of `generate` for `count` images. factor, encode: those of the model."""
        if init is None:
            if mask is not None or strength is not None:
                raise ValueError(f"generate: {'mask' if mask is not None else 'strength'} needs an init image")
            height, width = _height_and_width(size)
            for side in (height, width):
                check_multiple(side, factor, "size")
            return cls((height // factor, width // factor))
        strength = (0.75 if mask is None else 1.0) if strength is None else strength
        check_number("strength", strength)
        if not 0 < strength <= 1:
            raise ValueError(f"generate: strength must be above 0 and at most 1, got {strength}")
        images = as_images(init)
        count_given, height, width, _ = images.shape
        if count_given not in (1, count):
            raise ValueError(f"generate: {count_given} init images for {count} images; give one, or one per image")
        if size is not None and (height, width) != _height_and_width(size):
            raise ValueError(f"generate: init is {height}x{width}, but size {size} is asked for")
        # One by one: a KL-reg first stage draws noise, and that must not depend on the batch.
        z = torch.cat([encode(image[None], torch.Generator().manual_seed(0)) for image in images])
        keep = None if mask is None else _keep_in_latent(mask, (height, width), factor, count).to(z.device)
        return cls((z.shape[2], z.shape[3]), float(strength), z.expand(count, -1, -1, -1), keep)

    def rows(self, rows: slice) -> Start:
        """Return the start of some of the images."""
        z, keep = (None if tensor is None else tensor[rows] for tensor in (self.z, self.keep))
        return Start(self.latent_size, self.strength, z, keep)

    def first(self, noise: Tensor, alpha: float) -> Tensor:
        """Return the latent that sampling begins with at the noise level `alpha` (ᾱ_t)."""
        if self.z is None:
            return noise
        noised = _noised(self.z, noise, alpha)
        if self.strength < 1:
            return noised
        return noise if self.keep is None else torch.where(self.keep, noised, noise)

    def with_what_is_kept(self, step: Step, noise: Tensor) -> Tensor | None:
        """Return the latent after a step with z pasted in, as noisy as the rest is then; None if nothing is kept."""
        if self.z is None or self.keep is None:
            return None
        last = step.index == step.total - 1
        return torch.where(self.keep, self.z if last else _noised(self.z, noise, step.alpha), step.z)


def _noised(z: Tensor, noise: Tensor, alpha: float) -> Tensor:
    return math.sqrt(alpha) * z + math.sqrt(1 - alpha) * noise


def _keep_in_latent(mask: Any, size: tuple[int, int], factor: int, count: int) -> Tensor:
    """mask (H, W) or (B, H, W), True = repaint -> (count, 1, H/f, W/f), True = keep: no masked pixel there."""
    masks = as_masks(mask)
    if tuple(masks.shape[1:]) != size or len(masks) not in (1, count):
        raise ValueError(
            f"generate: mask has shape {tuple(masks.shape)}; init needs (1 or {count}, {size[0]}, {size[1]})"
        )
    touched = nn.functional.max_pool2d((masks != 0).float()[:, None], factor) > 0
    return ~touched.expand(count, -1, -1, -1)


def _height_and_width(size: Any) -> tuple[int, int]:
    sides = (size, size) if np.ndim(size) == 0 else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"size must be one number or (height, width), got {size!r}")
    return whole_number("size", sides[0]), whole_number("size", sides[1])
