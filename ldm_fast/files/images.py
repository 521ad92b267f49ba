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
from ldm_fast.files.file_names import printable
from ldm_fast.files.metadata import orientation, unturned, without_metadata

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, np.dtype[Any]]
# How to turn a picture of each EXIF orientation.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def check_images(images: Any) -> Tensor:
    """Return images as a tensor. ValueError unless they are uint8 (B, H, W, 3) and not empty."""
    tensor: Tensor = _from_array(images) if isinstance(images, np.ndarray) else torch.as_tensor(images)
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[3] != 3 or 0 in tensor.shape:
        raise ValueError(f"images must be uint8 (B, H, W, 3), got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor


def as_images(pictures: Any) -> Tensor:
    """Return uint8 (B, H, W, 3) of a Pillow image, a tensor or array (H, W, 3) or (B, H, W, 3), or a list of these."""
    images = _as_tensor(pictures, as_images, lambda picture: np.array(_on_white(picture)))
    return check_images(images if images.ndim == 4 else images[None])


def as_masks(masks: Any) -> Tensor:
    """Return masks as (B, H, W), not 0 where a picture is masked.

    masks: a Pillow image, a tensor or array (H, W) or (B, H, W), or a list of these. A Pillow image is masked where it
    is lighter than half its largest value, and not where it is transparent.
    """
    tensor = _as_tensor(masks, as_masks, _lighter_than_mid_grey)
    return tensor if tensor.ndim == 3 else tensor[None]


def _as_tensor(given: Any, of_one: Callable[[Any], Tensor], of_pillow: Callable[[Image], Array]) -> Tensor:
    from PIL import Image

    if isinstance(given, Image.Image):
        return torch.from_numpy(of_pillow(given))
    if isinstance(given, Tensor):
        return given
    if isinstance(given, np.ndarray):
        return _from_array(given)
    if not isinstance(given, list | tuple) or not given:
        raise TypeError(f"images and masks must be tensors, arrays or Pillow images, got {type(given).__name__}")
    parts = [of_one(one) for one in given]
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"images and masks of one size are needed, got {[tuple(part.shape[1:]) for part in parts]}")
    return torch.cat(parts)


def _from_array(array: Array) -> Tensor:
    """Return an array as a tensor: a copy if PyTorch cannot share its memory (strides below 0, read-only)."""
    if array.dtype.kind not in "biuf":
        raise TypeError(f"images and masks must hold numbers, got an array of {array.dtype}")
    if not array.dtype.isnative or not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)


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

    picture = _named(path, _on_white)
    if size is not None:
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture))


def read_mask(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read a mask as bool (H, W), True where it is lighter than half its largest value, and not transparent.

    `size` and errors as for `read_image`.
    """
    from PIL import Image, ImageOps

    picture = _named(path, _as_grey)
    if size is not None:
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(picture) > 127)


def _eight_bits(picture: Image) -> Image:
    """Return the upper eight bits of 16-bit greyscale, as Pillow does for 16-bit colours.

    Its own conversion would clip most values to white. ValueError for other numbers: the file does not say which of
    them are black and white.
    """
    from PIL import Image

    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture)
    if picture.mode == "F" or (values.size and (values.min() < 0 or values.max() > 65535)):
        raise ValueError("a picture of 32-bit numbers has no black and white of its own; make it one of 8 or 16 bits")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * 255))
    return grey


def _has_alpha(picture: Image) -> bool:
    return picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info


def _as_rgb(picture: Image) -> Image:
    """Return a picture of any mode as RGBA if parts of it may be transparent, or else as RGB."""
    picture = _eight_bits(picture)
    if picture.mode == "LAB":  # Pillow converts it only through profiles
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(picture)
    if picture.mode == "La":
        picture = picture.convert("LA")
    return picture.convert("RGBA" if _has_alpha(picture) else "RGB")


def _on_white(picture: Image) -> Image:
    from PIL import Image

    picture = _as_rgb(picture).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _as_grey(picture: Image) -> Image:
    """Return a mask's grey (mode L): its largest value is white, and what is transparent is black."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("a mask must hold finite numbers")
        transparent = picture.info.get("transparency")
        values = np.where(values == transparent, 0, values) if isinstance(transparent, int) else values
    else:
        colours = _as_rgb(picture)
        values = np.asarray(colours.convert("L")).astype(np.float64)
        values = values * np.asarray(colours.getchannel("A")) / 255 if colours.mode == "RGBA" else values
    largest = values.max(initial=0)
    values = values.clip(0) * (255 / largest if largest else 1)
    return Image.fromarray(values.round().astype(np.uint8))


def _lighter_than_mid_grey(picture: Image) -> Array:
    return np.asarray(_as_grey(picture)) > 127


def _open(path: str | Path) -> Image:
    """Decode a picture, turned as its metadata says. Nothing else in the metadata can make this fail."""
    from PIL import Image, UnidentifiedImageError

    try:
        data = Path(path).read_bytes()
        try:
            picture = _decode(unturned(data))
        except Exception:  # whatever Pillow raises: its readers of metadata are many
            bare = without_metadata(unturned(data))
            if bare == data:
                raise
            picture = _decode(bare)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such image file: {path}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read") from None
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
    turn = TURNS.get(orientation(data, picture.info))
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


def _named(path: str | Path, convert: Callable[[Image], Image]) -> Image:
    """Return the converted picture of a file, which errors name."""
    picture = _open(path)
    try:
        return convert(picture)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def _decode(data: bytes) -> Image:
    from PIL import Image

    picture: Image.Image = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def png_bytes(image: Tensor, text: dict[str, str]) -> bytes:
    """Return uint8 (H, W, 3) as a PNG file with text entries, `printable`. The same input gives the same bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, given in text.items():
        value = printable(given)
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
