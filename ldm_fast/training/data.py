"""Training data: every data set becomes one `ImageSet`, uint8 images with what conditions them.

    emoji      the OpenMoji colour font, every fully-qualified emoji with its English name as the caption
    folder     pictures in a folder, captions from text files or class labels from the sub-folders' names
    synthetic  coloured shapes named in words, for tests: needs no font, no file and no second

Images stay uint8 (N, 3, H, W) in memory; a batch becomes float in [-1, 1] only when a step asks for it.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from ldm_fast.configs.from_dict import free
from ldm_fast.training.emoji import emoji_images
from ldm_fast.training.folder import folder_images
from ldm_fast.training.image_set import DataError, ImageSet


@dataclass(frozen=True)
class DataConfig:
    """Which pictures to train on.

    Args:
        kind: see above.
        size: the side of the square that every picture is scaled and cropped to.
        path: the folder, for kind "folder".
        limit: keeps only the first so many pictures.
        held_out: for kind "folder", the share of pictures that metrics are measured on and that are not trained on,
            chosen by their names alone. The other kinds hold out a set of their own.
    """

    kind: Literal["emoji", "folder", "synthetic"]
    size: int
    path: str | None = free(None)  # a folder may be moved between two parts of a run
    limit: int | None = None
    held_out: float = 0.0


def load_data(config: DataConfig) -> ImageSet:
    """Load the data set that a recipe asks for. DataError if that is not possible."""
    if config.size < 1:
        raise DataError(f"data.size must be at least 1, got {config.size}")
    if not 0 <= config.held_out < 1 or (config.held_out and config.kind != "folder"):
        raise DataError(f'data.held_out is in [0, 1), and for data.kind "folder" alone, got {config.held_out}')
    data = _load_whole(config)
    if config.limit is not None:
        if config.limit < 1:
            raise DataError(f"data.limit must be at least 1, got {config.limit}")
        data = data.select(torch.arange(min(config.limit, len(data))))
    if bool(data.held_out.all()):
        raise DataError(f"all {len(data)} images are held out and none is left to train on; give more images")
    return data


def _load_whole(config: DataConfig) -> ImageSet:
    if config.kind == "emoji":
        return emoji_images(config.size)
    if config.kind == "synthetic":
        return synthetic_images(config.size)
    if config.path is None:
        raise DataError('data.path is needed when data.kind is "folder"')
    data = folder_images(config.path, config.size)
    held_out = [zlib.crc32(os.fsencode(name)) < config.held_out * 2**32 for name in data.names]
    return replace(data, held_out=torch.tensor(held_out))


# Shapes for tests

COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 200, 30)}
SHAPES = ("square", "disc", "cross", "ring")


def synthetic_images(size: int) -> ImageSet:
    """Draw sixteen pictures, "red square" to "yellow ring"; "yellow ring" is held out."""
    rows, columns = np.mgrid[0:size, 0:size] / max(size - 1, 1) * 2 - 1
    radius = np.hypot(rows, columns)
    inside = {
        "square": np.maximum(abs(rows), abs(columns)) < 0.6,
        "disc": radius < 0.7,
        "cross": np.minimum(abs(rows), abs(columns)) < 0.25,
        "ring": (radius < 0.8) & (radius > 0.45),
    }
    images, names = [], []
    for colour, value in COLOURS.items():
        for shape in SHAPES:
            picture = np.full((size, size, 3), 255, dtype=np.uint8)
            picture[inside[shape]] = value
            images.append(torch.from_numpy(picture).permute(2, 0, 1))
            names.append(f"{colour} {shape}")
    held = torch.tensor([name == "yellow ring" for name in names])
    return ImageSet(torch.stack(images), names=tuple(names), captions=tuple(names), held_out=held)
