"""A data set from a folder of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_fast.files.images import read_image
from ldm_fast.training.image_set import DataError, ImageSet

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def folder_images(path: str | Path, size: int) -> ImageSet:
    """Read all pictures below `path`, scaled so that the short side is `size`, and cropped to a square in the middle.

    Hidden files and folders (._1.png, .ipynb_checkpoints/) are left out. Transparency becomes white. Captions come from
    `captions.jsonl`, with one {"file": ..., "caption": ...} a line, or from NAME.txt beside NAME.png. Without either,
    the names of sub-folders are class labels; without those, too, the pictures are unconditional.

    DataError if there are no pictures, one cannot be read, or some have a caption or a class and others have not.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not files:
        raise DataError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {root}")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, file in enumerate(tqdm(files, desc="reading images", unit="image", leave=False, delay=2)):
        images[i] = _read_image(file, size)
    names = tuple(file.relative_to(root).as_posix() for file in files)
    captions = _captions(root, files, names)
    labels, classes = (None, ()) if captions is not None else _labels(names)
    return ImageSet(images, names=names, captions=captions, labels=labels, classes=classes)


def _read_image(file: Path, size: int) -> Tensor:
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
    """Read UTF-8, with or without the byte order mark that some editors write. DataError names the file."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _labels(names: tuple[str, ...]) -> tuple[Tensor | None, tuple[str, ...]]:
    folders = [name.split("/")[0] if "/" in name else None for name in names]
    if all(folder is None for folder in folders):
        return None, ()
    if None in folders:
        stray = names[folders.index(None)]
        raise DataError(f"the image {stray} lies in no sub-folder while others do, so its class is not known")
    classes = tuple(sorted({folder for folder in folders if folder is not None}))
    return torch.tensor([classes.index(folder) for folder in folders]), classes
