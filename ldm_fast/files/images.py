"""Pictures as uint8 tensors (B, H, W, 3): checks, conversions, and files, which Pillow reads and writes."""

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

Array = np.ndarray[Any, np.dtype[Any]]


def check_images(images: Any) -> Tensor:
    """Return images as a tensor. ValueError unless they are uint8 (B, H, W, 3) and not empty."""
    tensor: Tensor = torch.as_tensor(images)
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[3] != 3 or 0 in tensor.shape:
        raise ValueError(f"images must be uint8 (B, H, W, 3), got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor


def as_images(pictures: Any) -> Tensor:
    """Return uint8 (B, H, W, 3) of a Pillow image, a tensor or array (H, W, 3) or (B, H, W, 3), or a list of these."""
    images = _as_tensor(pictures, as_images, lambda picture: np.array(_on_white(picture)))
    return check_images(images if images.ndim == 4 else images[None])


def as_masks(masks: Any) -> Tensor:
    """Return masks as (B, H, W), not 0 where a picture is masked.

    masks: a Pillow image (masked where it is lighter than mid-grey), a tensor or array (H, W) or (B, H, W), or a list
    of these.
    """
    tensor = _as_tensor(masks, as_masks, _lighter_than_mid_grey)
    return tensor if tensor.ndim == 3 else tensor[None]


def _as_tensor(given: Any, of_one: Callable[[Any], Tensor], of_pillow: Callable[[Image], Array]) -> Tensor:
    from PIL import Image

    if isinstance(given, Image.Image):
        return torch.from_numpy(of_pillow(_eight_bits(given)))
    if isinstance(given, Tensor):
        return given
    if isinstance(given, np.ndarray):
        return torch.from_numpy(given)
    if not isinstance(given, list | tuple) or not given:
        raise TypeError(f"images and masks must be tensors, arrays or Pillow images, got {type(given).__name__}")
    parts = [of_one(one) for one in given]
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"images and masks of one size are needed, got {[tuple(part.shape[1:]) for part in parts]}")
    return torch.cat(parts)


def check_multiple(side: int, factor: int, what: str) -> None:
    """Raise ValueError, with the nearest multiples, unless `side` is a multiple of `factor` above 0."""
    if not isinstance(side, int) or side < 1 or side % factor:
        below = max(int(side) // factor, 1) * factor
        raise ValueError(f"{what} must be a multiple of {factor}, got {side}; nearest are {below} and {below + factor}")


def to_pil(images: Tensor) -> list[Image]:
    """Return the images, uint8 (B, H, W, 3), as Pillow images."""
    from PIL import Image

    return [Image.fromarray(np.asarray(image)) for image in check_images(images)]


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read a picture as uint8 (H, W, 3): transparent parts on white, turned as its EXIF data says.

    size: (height, width) to scale it to cover, and then to crop it to in the middle.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a picture.
    """
    from PIL import Image, ImageOps

    picture = _on_white(_open(path))
    if size is not None:
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture))


def read_mask(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read a mask as bool (H, W), True where it is lighter than mid-grey. `size` and errors as for `read_image`."""
    from PIL import Image, ImageOps

    picture = _open(path).convert("L")
    if size is not None:
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy(_lighter_than_mid_grey(picture))


def _eight_bits(picture: Image) -> Image:
    """Return the upper eight bits of 16-bit greyscale, as Pillow does for 16-bit colours.

    Its own conversion would clip most values to white. ValueError for other numbers: the file does not say which of
    them are black and white.
    """
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


def _lighter_than_mid_grey(picture: Image) -> Array:
    return np.asarray(picture.convert("L")) > 127


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
    """Return uint8 (H, W, 3) as a PNG file with text entries. The same input gives the same bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    buffer = io.BytesIO()
    to_pil(image[None])[0].save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_png(path: str | Path, image: Tensor, text: dict[str, str]) -> None:
    """Write a PNG, whole or not at all. Raises OSError that names the path if it cannot be written."""
    write_atomically(path, png_bytes(image, text))


def to_uint8(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] as contiguous uint8 (B, H, W, 3) on the CPU; other values are clipped."""
    images = ((images + 1) * 127.5).round().clamp(0, 255)
    return images.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def grid(images: Tensor, columns: int | None = None, gap: int = 0, fill: int = 255) -> Tensor:
    """Return images, uint8 (B, H, W, 3), side by side as one picture (H, W, 3).

    columns: default, as many as there are rows, or one more. gap: pixels between images and around them.
    fill: the grey of gaps and of places without an image.
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
