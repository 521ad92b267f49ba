"""Pictures as uint8 tensors (B, H, W, 3): checks, and reading and writing files with Pillow."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm_fast.files.atomic import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image


def check_images(images: Tensor) -> Tensor:
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"images must be uint8 (B, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    return images


def as_images(pictures: Any) -> Tensor:
    """uint8 (B, H, W, 3) of a Pillow image, a tensor or an array (H, W, 3) or (B, H, W, 3), or a sequence of such."""
    images = _as_tensor(pictures, as_images, lambda picture: np.array(_on_white(picture)))
    return check_images(images if images.ndim == 4 else images[None])


def as_masks(masks: Any) -> Tensor:
    """(B, H, W), not 0 where it is masked, of a Pillow image (masked where it is lighter than mid-grey), a tensor or an
    array (H, W) or (B, H, W), or a sequence of such."""
    masks = _as_tensor(masks, as_masks, _lighter_than_mid_grey)
    return masks if masks.ndim == 3 else masks[None]


def _as_tensor(given: Any, of_one: Callable[[Any], Tensor], of_pillow: Callable[[Image], np.ndarray]) -> Tensor:
    from PIL import Image

    if isinstance(given, Image.Image):
        return torch.from_numpy(of_pillow(_eight_bits(given)))
    if isinstance(given, Tensor | np.ndarray):
        return torch.as_tensor(given)
    if not isinstance(given, list | tuple) or not given:
        raise TypeError(f"images and masks must be tensors, arrays or Pillow images, got {type(given).__name__}")
    parts = [of_one(one) for one in given]
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"images and masks of one size are needed, got {[tuple(part.shape[1:]) for part in parts]}")
    return torch.cat(parts)


def check_multiple(side: int, factor: int, what: str) -> None:
    if not isinstance(side, int) or side < 1 or side % factor:
        below = max(int(side) // factor, 1) * factor
        raise ValueError(f"{what} must be a multiple of {factor}, got {side}; nearest are {below} and {below + factor}")


def to_pil(images: Tensor) -> list[Image]:
    """uint8 (B, H, W, 3) -> Pillow images."""
    from PIL import Image

    return [Image.fromarray(np.asarray(image)) for image in check_images(images)]


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """The picture at `path` as uint8 (H, W, 3), transparency on white, turned as its EXIF says.

    size (height, width): scaled to cover it, then cut in the middle. Raises FileNotFoundError, or ValueError for a file
    that is no picture.
    """
    from PIL import Image, ImageOps

    picture = _on_white(_open(path))
    if size is not None:
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture))


def read_mask(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """The mask at `path` as bool (H, W), True where it is lighter than mid-grey; scaled as `read_image` scales."""
    from PIL import Image, ImageOps

    picture = _open(path).convert("L")
    if size is not None:
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy(_lighter_than_mid_grey(picture))


def _eight_bits(picture: Image) -> Image:
    """Greyscale of 16 bits by its upper ones, as Pillow reads colours of 16; its own conversion would clip, to white
    for the most part. ValueError for other numbers: no file says what is black and what is white."""
    from PIL import Image

    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("a picture of 32-bit numbers has no black and white of its own; make it one of 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _on_white(picture: Image) -> Image:
    from PIL import Image

    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _lighter_than_mid_grey(picture: Image) -> np.ndarray:
    return np.array(picture.convert("L")) > 127


def _open(path: str | Path) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return _eight_bits(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise FileNotFoundError(f"no such image file: {path}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def png_bytes(image: Tensor, text: dict[str, str]) -> bytes:
    """uint8 (H, W, 3) as a PNG file with text entries; the same input gives the same bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    buffer = io.BytesIO()
    to_pil(image[None])[0].save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_png(path: str | Path, image: Tensor, text: dict[str, str]) -> None:
    """Writes a PNG, whole or not at all. Raises OSError naming the path where it cannot be written."""
    write_atomically(path, png_bytes(image, text))


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1], what is beyond clipped -> uint8 (B, H, W, 3), contiguous, on the CPU."""
    images = ((images + 1) * 127.5).round().clamp(0, 255)
    return images.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def grid(images: Tensor, columns: int | None = None, gap: int = 0, fill: int = 255) -> Tensor:
    """uint8 (B, H, W, 3) -> one picture (H, W, 3) of rows and columns, as square as can be unless `columns` is given.

    gap: pixels between images and around them. fill: the grey of gaps and of places without an image.
    """
    images = check_images(images)
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = torch.full((gap + rows * (height + gap), gap + columns * (width + gap), 3), fill, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet
