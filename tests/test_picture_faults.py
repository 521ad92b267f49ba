"""Pictures that once failed: damaged metadata, rare modes, masks of every kind, arrays that PyTorch cannot share."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from ldm_fast.files.images import as_images, as_masks, check_images, read_image, read_mask
from ldm_fast.training.folder import folder_images
from ldm_fast.training.image_set import DataError

BLUE, RED = (30, 30, 200), (200, 30, 30)


def lying() -> Image.Image:
    """A picture 24 wide and 16 high whose left half, the upper one after orientation 6, is blue."""
    picture = Image.new("RGB", (24, 16), RED)
    picture.paste(BLUE, (0, 0, 12, 16))
    return picture


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """An EXIF block of orientation 6 and these entries: tag, type, count, value."""
    rows = sorted([*entries, (0x112, 3, 1, struct.pack(order + "HH", 6, 0))])
    position, directory, data = 8 + 2 + 12 * len(rows) + 4, b"", b""
    for tag, kind, count, value in rows:
        short = len(value) <= 4
        directory += struct.pack(order + "HHI", tag, kind, count)
        directory += value.ljust(4, b"\0") if short else struct.pack(order + "I", position + len(data))
        data += b"" if short else value
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return b"Exif\0\0" + start + struct.pack(order + "H", len(rows)) + directory + struct.pack(order + "I", 0) + data


def upright(image: torch.Tensor, tolerance: int = 12) -> bool:
    halves = [(image[row, 8].int() - torch.tensor(colour)).abs().max() for row, colour in ((3, BLUE), (20, RED))]
    return image.shape == (24, 16, 3) and max(int(difference) for difference in halves) <= tolerance


ODD_ENTRIES = {
    "resolution unit as text": (0x128, 2, 2, b"2\0"),
    "make as rational": (0x10F, 5, 1, struct.pack("<II", 1, 1)),
    "a type of nobody": (0x10F, 77, 1, b"\0"),
    "a value beyond the end": (0x10F, 2, 4000, struct.pack("<I", 60000)),
    "rational of zero": (0x11A, 5, 1, struct.pack("<II", 1, 0)),
    "camera data nowhere": (0x8769, 4, 1, struct.pack("<I", 99999)),
    "maker note of nothing": (0x927C, 7, 0, b""),
    "floats as date": (0x132, 12, 2, struct.pack("<dd", 1, 2)),
}


@pytest.mark.parametrize("order", ["<", ">"], ids=["little endian", "big endian"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("kind", ODD_ENTRIES)
def test_odd_entries_of_exif(kind, suffix, order, tmp_path):
    lying().save(tmp_path / f"x.{suffix}", exif=exif(ODD_ENTRIES[kind], order=order))
    assert upright(read_image(tmp_path / f"x.{suffix}"))


def of_every_format() -> dict[str, bytes]:
    """The picture with orientation, profile, XMP and comments in every format that has them."""
    camera = Image.Exif()
    camera[0x112], camera[0x10F], camera[0x11A], camera[0x128] = 6, "Maker", 72.0, 2
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF/></x:xmpmeta>"
    info = PngInfo()
    info.add_text("a", "b")
    info.add_itxt("c", "d")
    options = {
        "jpeg": dict(xmp=xmp, comment=b"hello", quality=95),
        "png": dict(pnginfo=info, dpi=(72, 72)),
        "webp": dict(xmp=xmp, lossless=True),
        "tiff": dict(compression="tiff_lzw"),
    }
    made = {}
    for kind, more in options.items():
        buffer = io.BytesIO()
        lying().save(buffer, kind, exif=camera, icc_profile=profile, **more)
        made[kind] = buffer.getvalue()
    return made


def metadata(kind: str, data: bytes) -> list[tuple[int, int]]:
    """Where there is no picture and no orientation in a file: from, to."""
    found, at = [], {"jpeg": 2, "png": 8, "webp": 12, "tiff": 0}[kind]
    while kind == "jpeg" and data[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, at + 2)
        if (0xE0 <= data[at + 1] <= 0xEF or data[at + 1] == 0xFE) and data[at + 4 : at + 8] != b"Exif":
            found.append((at + 4, at + 2 + length))
        at += 2 + length
    while kind == "png" and at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 5].islower() and data[at + 4 : at + 8] != b"eXIf":
            found.append((at + 8, at + 12 + length))  # the checksum, too
        at += 12 + length
    while kind == "webp" and at < len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        if data[at : at + 4] in (b"XMP ", b"ICCP"):
            found.append((at + 8, at + 8 + length))
        at += 8 + length + length % 2
    if kind == "tiff":
        (start,) = struct.unpack_from("<I", data, 4)
        entries = range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12)
        tags = (0x10F, 0x11A, 0x128, 34675)
        found += [(at + 2, at + 12) for at in entries if struct.unpack_from("<H", data, at)[0] in tags]
    return found


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_any_damage_to_metadata_leaves_the_picture(kind, tmp_path):
    """Two hundred times some bytes of a profile, of XMP, of comments or of tags are others."""
    whole, path, numbers = of_every_format()[kind], tmp_path / f"x.{kind}", random.Random(0)
    places = metadata(kind, whole)
    assert len(places) > 1
    for _ in range(200):
        data = bytearray(whole)
        start, end = numbers.choice(places)
        for _ in range(numbers.choice([1, 2, 8])):
            data[numbers.randrange(start, end)] = numbers.choice([0, 1, 2, 5, 12, 255, numbers.randrange(256)])
        path.write_bytes(data)
        assert upright(read_image(path))


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_every_orientation(number, suffix, tmp_path):
    """As Pillow turns it."""
    from PIL import ImageOps

    camera = Image.Exif()
    camera[0x112] = number
    picture = lying()
    picture.paste((0, 255, 0), (2, 2, 6, 6))
    picture.save(tmp_path / f"x.{suffix}", exif=camera, **({"lossless": True} if suffix == "webp" else {}))
    wanted = ImageOps.exif_transpose(Image.open(tmp_path / f"x.{suffix}"))
    assert np.array_equal(read_image(tmp_path / f"x.{suffix}"), np.asarray(wanted.convert("RGB")))


def test_orientation_of_xmp_and_of_imagemagick(tmp_path):
    lying().save(tmp_path / "x.jpg", xmp=b'<rdf:Description tiff:Orientation="6"/>')
    info = PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n    {len(exif())}\n{exif().hex()}\n", zip=True)
    lying().save(tmp_path / "x.png", pnginfo=info)
    assert upright(read_image(tmp_path / "x.jpg")) and upright(read_image(tmp_path / "x.png"))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_what_cannot_be_decoded_is_named(kind, tmp_path):
    """In training, too."""
    data = of_every_format()[kind]
    (tmp_path / f"broken.{kind}").write_bytes(data[:60] + bytes(400))
    with pytest.raises(ValueError, match=rf"broken\.{kind}"):
        read_image(tmp_path / f"broken.{kind}")
    with pytest.raises(DataError, match=rf"broken\.{kind}"):
        folder_images(tmp_path, 8)


# Modes


def test_transparency_of_sixteen_bits(tmp_path):
    values = np.array([[0, 1000, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    chunk = b"tRNS" + struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = buffer.getvalue()
    (tmp_path / "x.png").write_bytes(data[:33] + chunk + data[33:])
    for image in (read_image(tmp_path / "x.png"), as_images(Image.open(tmp_path / "x.png"))[0]):
        assert image[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]
    assert read_mask(tmp_path / "x.png").tolist() == [[False, False, True]]


GREY = Image.frombytes("L", (3, 1), bytes([0, 128, 255]))
ALPHA = Image.frombytes("L", (3, 1), bytes([255, 255, 0]))


def with_alpha(mode: str) -> Image.Image:
    picture = GREY.convert("LA")
    picture.putalpha(ALPHA)
    return picture.convert("RGBA").convert(mode) if mode.startswith("RGB") else picture.convert(mode)


MODES = {
    **{mode: GREY.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "RGBA", "LA")},
    **{f"{mode} with alpha": with_alpha(mode) for mode in ("LA", "La", "RGBA", "RGBa")},
    "I;16": Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint16) * 257),
    "I;16B": Image.frombytes("I;16B", (3, 1), (np.array([0, 128, 255]) * 257).astype(">u2").tobytes()),
    "I": Image.fromarray((np.array([[0, 128, 255]]) * 257).astype(np.int32)),
    "LAB": Image.frombytes("LAB", (3, 1), bytes([0, 0, 0, 137, 0, 0, 255, 0, 0])),
}


@pytest.mark.parametrize("kind", MODES)
def test_every_mode_is_a_picture(kind):
    image = as_images(MODES[kind])
    assert image.shape == (1, 1, 3, 3)
    middle = 0 if kind == "1" else 128  # it is dithered
    assert (image[0, 0].float().mean(1) - torch.tensor([0.0, middle, 255.0])).abs().max() <= 2


def test_palettes_with_transparency(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, 10, 200, 10])
    picture.putpixel((1, 0), 1)
    for transparency in (0, b"\0\xff"):
        picture.save(tmp_path / "x.png", transparency=transparency)
        for image in (read_image(tmp_path / "x.png"), as_images(Image.open(tmp_path / "x.png"))[0]):
            assert image[0].tolist() == [[255] * 3, [10, 200, 10]]


def test_numbers_without_black_and_white_say_so():
    for picture in (Image.new("F", (2, 2), 0.5), Image.new("I", (2, 2), -1)):
        with pytest.raises(ValueError, match="32-bit numbers has no black and white"):
            as_images(picture)
    with pytest.raises(ValueError, match="uint8"):
        as_images(Image.new("I", (0, 0)))


# Masks


def strokes(colour: tuple[int, ...], ground: tuple[int, ...]) -> Image.Image:
    picture = Image.new("RGBA", (4, 1), ground)
    picture.putpixel((1, 0), colour)
    return picture


HALF = [[False, True, False, True]]
MASKS = {
    "strokes on transparent white": (strokes((255, 255, 255, 255), (255, 255, 255, 0)), [[False, True, False, False]]),
    "strokes on transparent black": (strokes((255, 255, 255, 255), (0, 0, 0, 0)), [[False, True, False, False]]),
    "nothing but transparent white": (Image.new("RGBA", (4, 1), (255, 255, 255, 0)), [[False] * 4]),
    "black": (Image.new("L", (4, 1)), [[False] * 4]),
    **{
        f"{np.dtype(dtype).name} of {largest}": (
            Image.fromarray(np.array([[0, 1, 0, 1]], dtype) * dtype(largest)),
            HALF,
        )
        for dtype, largest in (
            (np.uint8, 1),
            (np.uint8, 255),
            (np.uint16, 255),
            (np.uint16, 65535),
            (np.int32, 1),
            (np.int32, 255),
            (np.int32, 100_000),
            (np.float32, 1),
            (np.float32, 255),
        )
    },
    "1": (Image.fromarray(np.array([[0, 1, 0, 1]], np.uint8) * 255).convert("1"), HALF),
    "P": (Image.fromarray(np.array([[0, 1, 0, 1]], np.uint8) * 255).convert("P"), HALF),
    "La": (Image.merge("LA", [Image.new("L", (3, 1), 255), ALPHA]).convert("La"), [[True, True, False]]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, tmp_path):
    """The largest value is white; what is transparent is not painted."""
    picture, wanted = MASKS[kind]
    assert as_masks(picture).tolist() == [wanted] and as_masks([picture, picture]).tolist() == [wanted] * 2
    if kind != "La":
        picture.save(tmp_path / "m.tif")
        assert read_mask(tmp_path / "m.tif").tolist() == wanted
        assert read_mask(tmp_path / "m.tif", (1, 8)).tolist() == [[value for value in wanted[0] for _ in range(2)]]


def test_masks_of_no_numbers(tmp_path):
    Image.fromarray(np.float32([[0, np.nan]])).save(tmp_path / "m.tif")
    with pytest.raises(ValueError, match=r"m\.tif: a mask must hold finite numbers"):
        read_mask(tmp_path / "m.tif")


# Arrays


def test_arrays_that_pytorch_cannot_share():
    array = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    frozen = array.copy()
    frozen.flags.writeable = False
    for strange in (array[::-1], array[:, ::-1], array[:, :, ::-2], array[..., ::-1], frozen, np.asfortranarray(array)):
        wanted = torch.from_numpy(strange.copy())
        assert torch.equal(as_images(strange), wanted) and torch.equal(check_images(strange), wanted)
        assert torch.equal(as_images([strange[0], strange[1]]), wanted)
        assert torch.equal(as_masks(strange[..., 0]), wanted[..., 0])
    assert as_masks(np.array([[0, 300]], dtype=">u2")).tolist() == [[[0, 300]]]
    for useless in (np.array([["a"]]), np.array([[None]])):
        with pytest.raises(TypeError, match="must hold numbers, got an array of"):
            as_masks(useless)
