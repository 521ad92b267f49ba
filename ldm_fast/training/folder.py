"""A data set from a folder of pictures."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_fast.files.atomic import reason
from ldm_fast.files.images import read_image
from ldm_fast.training.image_set import DataError, ImageSet

LISTING = "captions.jsonl"
IMAGE_SUFFIXES = (
    *(".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
MOST_NAMES = 5  # for each reason, in the warning of what is left out

LeftOut = dict[str, list[str]]  # names by the reason


def folder_images(path: str | Path, size: int) -> ImageSet:
    """Read all pictures below `path`, scaled so that the short side is `size`, and cropped to a square in the middle.

    Symbolic links are followed. Transparency becomes white. Captions come from `captions.jsonl`, with one
    {"file": ..., "caption": ...} a line, or from NAME.txt beside NAME.png. Without either, the names of sub-folders are
    class labels; without those, too, the pictures are unconditional. Suffixes may be in any case.

    Whatever is left out (hidden pictures, files of other kinds, captions without a picture, …) is counted and named in
    one warning, and in `left_out`.

    DataError if there are no pictures, one cannot be read, links form a loop, or some pictures have a caption or a
    class and others have not.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    left_out: LeftOut = defaultdict(list)
    found = sorted(_files(root, root, (), left_out))
    files = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        left_out["files of other kinds"] += [file.relative_to(root).as_posix() for file in found]
        raise DataError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {root}; {_summary(left_out)}")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, file in enumerate(tqdm(files, desc="reading images", unit="image", leave=False, delay=2)):
        images[i] = _read_image(file, size)
    names = tuple(file.relative_to(root).as_posix() for file in files)
    captions = _captions(root, names, sorted(set(found) - set(files)), left_out)
    labels, classes = (None, ()) if captions is not None else _labels(names)
    if left_out:
        warnings.warn(f"{root}: {_summary(left_out)}", stacklevel=2)
    missing = tuple(name for names in left_out.values() for name in names)
    return ImageSet(images, names=names, captions=captions, labels=labels, classes=classes, left_out=missing)


def _files(root: Path, folder: Path, above: tuple[str, ...], left_out: LeftOut) -> Iterator[Path]:
    """Yield the files in a folder and below. above: the real paths of the folders that it lies in."""
    here = os.path.realpath(folder)
    if here in above:
        raise DataError(f"{folder} is a link back to a folder that it lies in: {here}")
    try:
        entries = sorted(folder.iterdir())
        if not entries:
            left_out["empty folders"].append(folder.relative_to(root).as_posix())
        for entry in entries:
            name = entry.relative_to(root).as_posix()
            if entry.name.startswith("."):
                inside = entry.rglob("*") if entry.is_dir() else (entry,)
                for file in inside:
                    if file.suffix.lower() in IMAGE_SUFFIXES:
                        left_out["hidden pictures"].append(file.relative_to(root).as_posix())
            elif entry.is_dir():
                yield from _files(root, entry, (*above, here), left_out)
            elif entry.is_file():
                yield entry
            else:
                left_out[_why_no_file(entry)].append(name)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {reason(error)}") from error


def _why_no_file(entry: Path) -> str:
    """Return the reason why an entry is neither a file nor a folder. DataError for links in a circle."""
    try:
        entry.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{entry} is a link in a circle of links") from error
        return "links that lead nowhere"
    return "neither files nor folders"


def _summary(left_out: LeftOut) -> str:
    """Return how many of each kind are left out, with the names of the first."""
    kinds = []
    for kind, names in left_out.items():
        shown = names[:MOST_NAMES] + ["…"] * (len(names) > MOST_NAMES)
        kinds.append(f"{len(names)} {kind} ({', '.join(shown)})")
    return f"left out: {'; '.join(kinds) or 'nothing'}"


def _read_image(file: Path, size: int) -> Tensor:
    try:
        return read_image(file, (size, size)).permute(2, 0, 1)
    except ValueError as error:
        raise DataError(str(error)) from error


def _captions(root: Path, names: tuple[str, ...], others: list[Path], left_out: LeftOut) -> tuple[str, ...] | None:
    """Return a caption for each picture, None if there are no captions. others: the files that are no pictures."""
    listings = sorted((file for file in others if file.parent == root and file.name.lower() == LISTING), reverse=True)
    if listings:
        given, used = _read_listing(listings[0], root, set(names), left_out), {listings[0]}
        where = f"no caption in {listings[0]}"
    else:
        given, used = _read_texts(root, names, others)
        where = "no .txt file with a caption beside it"
    unused = [file.relative_to(root).as_posix() for file in others if file not in used]
    if unused:
        left_out["files of other kinds, or texts that are no caption"] += unused
    if not given and not listings:
        return None
    for name in names:
        if name not in given:
            raise DataError(f"the image {name} has {where}")
    return tuple(given[name] for name in names)


def _read_texts(root: Path, names: tuple[str, ...], others: list[Path]) -> tuple[dict[str, str], set[Path]]:
    """Return the captions in texts beside pictures, by the pictures' names, and the texts that were used."""
    texts = {file.with_suffix(""): file for file in others if file.suffix.lower() == ".txt"}  # .txt comes after .TXT
    beside = {name: texts[stem] for name in names if (stem := (root / name).with_suffix("")) in texts}
    return {name: _read_text(file).strip() for name, file in beside.items()}, set(beside.values())


def _read_listing(listing: Path, root: Path, names: set[str], left_out: LeftOut) -> dict[str, str]:
    given: dict[str, str] = {}
    for number, line in enumerate(_read_text(listing).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = Path(os.path.relpath(root / entry["file"], root)).as_posix(), entry["caption"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{listing}, line {number}: need {{"file": ..., "caption": ...}}') from error
        if not isinstance(caption, str):
            raise DataError(f"{listing}, line {number}: the caption must be a string, got {caption!r}")
        if name not in names and (slashes := name.replace("\\", "/")) in names:
            name = slashes
        if name not in names:
            left_out[f"captions in {listing.name} without a picture"].append(name)
        elif given.get(name, caption) != caption:
            left_out[f"captions in {listing.name} that a later line replaces"].append(name)
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
