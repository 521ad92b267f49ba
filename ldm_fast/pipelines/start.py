"""What sampling starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_fast.configs.checks import check_number, whole_number
from ldm_fast.files.images import as_images, as_masks, check_multiple


@dataclass(frozen=True)
class _Start:
    """What sampling starts from: nothing but a size, or latents z (B, C, h, w) of which `keep` (B, 1, h, w) stays."""

    latent_size: tuple[int, int]
    strength: float = 1.0
    z: Tensor | None = None
    keep: Tensor | None = None

    def rows(self, rows: slice) -> _Start:
        pick = [t if t is None else t[rows] for t in (self.z, self.keep)]
        return _Start(self.latent_size, self.strength, *pick)

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
        native_size: tuple[int, int],
        encode: Callable[[Tensor, torch.Generator], Tensor],
    ) -> _Start:
        """What `generate` starts from, its arguments checked. factor, native_size, encode: those of its model."""
        if init is None:
            if mask is not None or strength is not None:
                raise ValueError(f"generate: {'mask' if mask is not None else 'strength'} needs an init image")
            height, width = native_size if size is None else _height_and_width(size)
            for side in (height, width):
                check_multiple(side, factor, "size")
            return cls((height // factor, width // factor))
        strength = (0.75 if mask is None else 1.0) if strength is None else strength
        check_number("strength", strength)
        if not 0 < strength <= 1:
            raise ValueError(f"generate: strength must be above 0 and at most 1, got {strength}")
        images = as_images(init)
        given = tuple(images.shape[1:3])
        if len(images) not in (1, count):
            raise ValueError(f"generate: {len(images)} init images for {count} images; give one, or one per image")
        if size is not None and given != _height_and_width(size):
            raise ValueError(f"generate: init is {given[0]}x{given[1]}, but size {size} is asked for")
        # One by one: a KL-reg first stage draws noise, and that must not depend on the batch.
        z = torch.cat([encode(image[None], torch.Generator().manual_seed(0)) for image in images])
        keep = None if mask is None else _keep_in_latent(mask, given, factor, count).to(z.device)
        return cls(tuple(z.shape[2:]), float(strength), z.expand(count, -1, -1, -1), keep)


def _keep_in_latent(mask: Any, size: tuple[int, int], factor: int, count: int) -> Tensor:
    """mask (H, W) or (B, H, W), True = repaint -> (count, 1, H/f, W/f), True = keep: no masked pixel there."""
    mask = as_masks(mask)
    if tuple(mask.shape[1:]) != size or len(mask) not in (1, count):
        raise ValueError(
            f"generate: mask has shape {tuple(mask.shape)}; init needs (1 or {count}, {size[0]}, {size[1]})"
        )
    touched = nn.functional.max_pool2d((mask != 0).float()[:, None], factor) > 0
    return ~touched.expand(count, -1, -1, -1)


def _height_and_width(size: Any) -> tuple[int, int]:
    sides = (size, size) if np.ndim(size) == 0 else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"size must be one number or (height, width), got {size!r}")
    return whole_number("size", sides[0]), whole_number("size", sides[1])
