"""Images with captions or classes, held in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


class DataError(ValueError):
    """The training data cannot be used. The message names the folder, file or image at fault."""


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 3, H, W), uint8 (or floating point in [-1, 1]), and what goes with each of them.

    Args:
        names: what an error calls each image.
        captions: N strings, or None.
        labels: N class numbers into `classes`, or None.
        held_out: (N,) bool, True if neither stage may train on the image; default: none is held out.
        left_out: captions that have no picture, and files that could not be used.
    """

    images: Tensor
    names: tuple[str, ...]
    captions: tuple[str, ...] | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    held_out: Tensor = field(default=None)  # type: ignore[assignment]  # set below: it depends on N
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3 or len(self.names) != len(self.images):
            raise DataError(f"images must be (N, 3, H, W) with N names, got {tuple(self.images.shape)}")
        if self.held_out is None:
            object.__setattr__(self, "held_out", torch.zeros(len(self.images), dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: Tensor) -> ImageSet:
        """Return the images that `rows`, a bool mask or indices, selects, in that order."""
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        chosen = index.tolist()
        return ImageSet(
            images=self.images[index],
            names=tuple(self.names[i] for i in chosen),
            captions=None if self.captions is None else tuple(self.captions[i] for i in chosen),
            labels=None if self.labels is None else self.labels[index],
            classes=self.classes,
            held_out=self.held_out[index],
            left_out=self.left_out,
        )

    def training(self) -> ImageSet:
        """Return everything a stage may train on."""
        return self.select(~self.held_out)

    def evaluation(self) -> ImageSet:
        """Return everything held out of training."""
        return self.select(self.held_out)

    def measured(self) -> ImageSet:
        """Return what metrics are measured on: the held-out images or, if there are none, those trained on."""
        return self.evaluation() if bool(self.held_out.any()) else self.training()

    def batch(self, index: Tensor, shift: Tensor | None = None, flip: Tensor | None = None) -> Tensor:
        """Return the images at `index` (B,) as float32 (B, 3, H, W) in [-1, 1].

        shift: (B, 2) whole pixels down and right, the uncovered rim repeating the border; flip: (B,) bool, mirrored.
        DataError with the image's name if a value is NaN or infinite.
        """
        images = self.images[index]
        batch = images.float() / 127.5 - 1.0 if images.dtype == torch.uint8 else images.float()
        finite = batch.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            at = int(index[(~finite).nonzero()[0, 0]])
            raise DataError(f"image {at} ({self.names[at]}) of the training data holds NaN or infinite values")
        if flip is not None:
            batch = torch.where(flip[:, None, None, None], batch.flip(-1), batch)
        if shift is not None:
            batch = shifted(batch, shift)
        return batch


def shifted(images: Tensor, shift: Tensor) -> Tensor:
    """Move each image (B, C, H, W) by its own shift (B, 2), rows down and columns right; the border is repeated."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height) - shift[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) - shift[:, 1:]).clamp(0, width - 1)  # (B, W)
    image = torch.arange(len(images))[:, None, None]
    return images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
