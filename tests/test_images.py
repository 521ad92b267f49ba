"""Reading and writing pictures and files."""

import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_fast.files.atomic import check_writable, write_atomically
from ldm_fast.files.images import as_images, as_masks, grid, png_bytes, read_image, read_mask, to_pil, to_uint8


def numbered(height, width):
    """Every pixel another colour."""
    n = torch.arange(height * width)
    return torch.stack([n % 256, n // 256 % 256, n * 7 % 256], -1).reshape(height, width, 3).to(torch.uint8)


def test_a_picture_survives_png(tmp_path):
    image = numbered(5, 7)
    (tmp_path / "x.png").write_bytes(png_bytes(image, {"prompt": "apple", "other": "яблоко"}))
    assert torch.equal(read_image(tmp_path / "x.png"), image)
    assert Image.open(tmp_path / "x.png").text == {"prompt": "apple", "other": "яблоко"}


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png") == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK", "I;16"])
def test_modes(tmp_path, mode):
    suffix = "tiff" if mode == "CMYK" else "png"
    Image.new("L", (3, 2), 255).convert(mode).save(tmp_path / f"x.{suffix}")
    assert read_image(tmp_path / f"x.{suffix}").shape == (2, 3, 3)


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    image = to_pil(numbered(4, 6)[None])[0]
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "x.png", exif=exif)
    assert read_image(tmp_path / "x.png").shape == (6, 4, 3)


def test_fitting_covers_the_size_and_cuts_the_middle(tmp_path):
    image = torch.zeros(8, 24, 3, dtype=torch.uint8)
    image[:, 8:16] = 255
    to_pil(image[None])[0].save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png", (8, 8)) == 255).all()
    assert read_mask(tmp_path / "x.png", (8, 8)).all()
    assert read_image(tmp_path / "x.png", (4, 12)).shape == (4, 12, 3)


def test_mask_is_true_where_it_is_light(tmp_path):
    Image.frombytes("L", (4, 1), bytes([0, 127, 128, 255])).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_not_clipped_to_white(tmp_path, suffix):
    values = np.array([[0, 255, 256, 32767, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    for found in (read_image(tmp_path / f"a.{suffix}"), as_images(Image.open(tmp_path / f"a.{suffix}"))[0]):
        assert found[0].tolist() == [[n] * 3 for n in (0, 0, 1, 127, 128, 255)]
    assert read_mask(tmp_path / f"a.{suffix}").tolist() == [[False] * 4 + [True] * 2]
    assert as_masks(Image.open(tmp_path / f"a.{suffix}")).tolist() == [[[False] * 4 + [True] * 2]]


@pytest.mark.parametrize("values", [np.float32([[0, 0.5]]), np.int32([[0, 65536]]), np.int32([[-1, 5]])])
def test_numbers_without_a_black_and_white_are_no_picture(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: a picture of 32-bit numbers"):
        read_image(tmp_path / "a.tif")


def test_grid_places_images_by_rows():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 2, 3, 3)
    sheet = grid(images)
    assert sheet.shape == (4, 9, 3)
    assert sheet[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 255]]
    assert grid(images, columns=1).shape == (10, 3, 3)
    sheet = grid(images, columns=4, gap=1, fill=9)
    assert sheet.shape == (7, 17, 3)
    assert sheet[1::3, 1::4, 0].tolist() == [[0, 1, 2, 3], [4, 9, 9, 9]]
    assert (sheet[::3] == 9).all() and (sheet[:, ::4] == 9).all()


def test_numbers_in_minus_one_to_one_become_bytes():
    x = torch.tensor([-9.0, -1.0, 0.0, 0.5, 1.0, 9.0]).reshape(1, 1, 2, 3).expand(1, 3, 2, 3)
    images = to_uint8(x)
    assert images.shape == (1, 2, 3, 3) and images.is_contiguous()
    assert images[..., 1].flatten().tolist() == [0, 0, 128, 191, 255, 255]


def test_write_replaces_a_file_whole(tmp_path):
    path = tmp_path / "x.bin"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and list(tmp_path.iterdir()) == [path]


def test_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    write_atomically(path, b"one")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write: No space left on device: .*x\.bin"):
        write_atomically(path, b"two")
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


def test_writers_at_the_same_time(tmp_path):
    """Whoever reads meets the whole of what one of them wrote."""
    path = tmp_path / "x.bin"
    contents = [bytes([i]) * 300_000 for i in range(4)]
    write_atomically(path, contents[0])
    with ThreadPoolExecutor(4) as threads:
        writing = [threads.submit(write_atomically, path, content) for content in contents * 8]
        while not all(write.done() for write in writing):
            assert path.read_bytes() in contents
    assert all(write.exception() is None for write in writing)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege there")
def test_a_symbolic_link_goes_on_pointing_to_the_file(tmp_path):
    path, link = tmp_path / "x.bin", tmp_path / "link"
    write_atomically(path, b"one")
    link.symlink_to(path)
    write_atomically(link, b"two")
    assert link.is_symlink() and path.read_bytes() == b"two"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_modes_of_written_files(tmp_path):
    path = tmp_path / "x.bin"
    before = os.umask(0o027)
    try:
        write_atomically(path, b"one")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o600)
    write_atomically(path, b"two")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_check_writable(tmp_path):
    check_writable(tmp_path / "new.png")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_writable(tmp_path / "no" / "x.png")
    assert list(tmp_path.iterdir()) == []
