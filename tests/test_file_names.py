"""Names of files that are not UTF-8, and names as long as a file system takes them."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_models import text_model

import ldm_fast
from ldm_fast.files.atomic import check_writable, remove_unfinished, write_atomically
from ldm_fast.files.file_names import fitting_name, printable
from ldm_fast.files.images import read_image, read_mask, write_png
from ldm_fast.files.tensors import CheckpointError, read_tensors, write_tensors
from ldm_fast.models.tokenizers import padded_ids, warn_of_cut_prompts
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion
from ldm_fast.training import load_recipe, train
from ldm_fast.training.data import DataConfig, load_data
from ldm_fast.training.folder import folder_images
from ldm_fast.training.image_set import DataError

CAFE = os.fsdecode(b"caf\xe9")
GREY = torch.full((8, 8, 3), 128, dtype=torch.uint8)


@pytest.fixture
def latin(tmp_path):
    """A folder with a name in Latin-1."""
    try:
        (tmp_path / CAFE).mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system takes only names in UTF-8")
    return tmp_path / CAFE


def test_printable():
    assert printable("café яблоко") == "café яблоко"
    assert printable(f"{CAFE}.png \ud800") == "caf\\xe9.png \\ud800"


def test_text_in_a_png_is_escaped(latin):
    text = {"prompt": f"{CAFE} яблоко", "source": f"{CAFE}.png"}
    write_png(latin / f"{CAFE}.png", GREY, text)
    assert Image.open(latin / f"{CAFE}.png").text == {"prompt": "caf\\xe9 яблоко", "source": "caf\\xe9.png"}
    assert torch.equal(read_image(latin / f"{CAFE}.png"), GREY) and read_mask(latin / f"{CAFE}.png").all()


@pytest.mark.parametrize("kind", ["safetensors", "pt", "old pt"])
def test_tensors(kind, latin):
    path, tensors = latin / f"{CAFE}.{kind[-2:]}", {"a": torch.arange(5.0)}
    if kind == "safetensors":
        write_tensors(path, tensors, {"name": "x"})
    else:
        with path.open("wb") as file:
            torch.save({"state_dict": tensors, "step": 3}, file, _use_new_zipfile_serialization=kind == "pt")
    read = read_tensors(path)
    assert torch.equal(read.tensors["a"], tensors["a"]) and read.path == path
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(CheckpointError) as caught:
        _ = read_tensors(path).tensors["a"].sum()
    assert str(path) in str(caught.value)


def test_a_whole_model(latin):
    model = text_model(card={"classes": [CAFE]})
    model.save(latin / f"{CAFE}.safetensors")
    again = LatentDiffusion.load(latin / f"{CAFE}.safetensors")
    assert again.card["classes"] == [CAFE] and CAFE in again.origin
    with pytest.warns(UserWarning, match="does not know 'caf'"):
        assert again.generate(CAFE, steps=1).shape == (1, 16, 16, 3)
    model.first_stage.save_pretrained(latin)
    assert ldm_fast.inspect(latin).parts.keys() == {"first_stage"}
    assert type(model.first_stage).from_pretrained(latin) is not None


@pytest.mark.parametrize("condition", ["captions", "classes"])
def test_training_data(condition, latin):
    """In names, in class names, in captions.jsonl; a share is held out by bytes."""
    for folder in (CAFE, "other"):
        (latin / folder).mkdir()
        Image.new("RGB", (8, 8)).save(latin / folder / f"{CAFE}.png")
        if condition == "captions":
            (latin / folder / f"{CAFE}.txt").write_text("a caption")
    data = load_data(DataConfig("folder", 8, path=str(latin), held_out=0.5))
    assert set(data.names) == {f"{CAFE}/{CAFE}.png", f"other/{CAFE}.png"}
    assert data.classes == ((CAFE, "other") if condition == "classes" else ())
    (latin / "captions.jsonl").write_text(
        f'{{"file": "{CAFE}/{CAFE}.png", "caption": "x"}}\n'.replace("\udce9", "\\udce9")
    )
    shutil.rmtree(latin / "other")
    assert folder_images(latin, 8).captions == ("x",)
    (latin / CAFE / f"{CAFE}.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        folder_images(latin, 8)
    assert f"{CAFE}.png" in str(caught.value)


def test_training_there(latin):
    recipe = load_recipe("tiny")
    config = replace(recipe.first_stage, loop=replace(recipe.first_stage.loop, steps=1))
    (latin / "data").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(latin / "data" / f"{CAFE}{i}.png")
    data = DataConfig("folder", recipe.data.size, path=str(latin / "data"))
    run = replace(recipe, data=data, first_stage=config)
    for _ in range(2):  # the second time it reads what the first has written
        train(run, latin / f"run {CAFE}", stage="first", progress=False)
    assert (latin / f"run {CAFE}" / "first_stage" / "metrics.jsonl").is_file()


def test_prompts_for_tokenizers_of_transformers():
    """These take only Unicode."""
    asked = []

    class Tokenizer:
        def __call__(self, prompts, **_):
            asked.extend(prompt.encode().decode() for prompt in prompts)
            return type("Made", (), {"input_ids": torch.zeros(len(prompts), 3, dtype=torch.int64)})

    assert padded_ids(Tokenizer(), [CAFE], 3).shape == (1, 3)
    warn_of_cut_prompts(Tokenizer(), [CAFE], 3)
    assert asked == ["caf\ufffd"] * 2


# Long names


LETTERS = {"one byte": "a", "two bytes": "é", "four bytes": "\U0001d518"}


@pytest.mark.parametrize("length", [242, 243, 250, 255])
@pytest.mark.parametrize("letter", LETTERS)
def test_long_names(letter, length, tmp_path):
    name = fitting_name(LETTERS[letter] * 300, ".png", length)
    assert length - 4 < len(os.fsencode(name)) <= length
    path = tmp_path / name
    check_writable(path)
    write_atomically(path, b"one")
    write_png(path, GREY, {})
    write_tensors(path, {"a": torch.zeros(2)})
    assert read_tensors(path).tensors["a"].tolist() == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is another one there")
def test_too_long_a_name_is_named_as_it_was_given(tmp_path):
    path = tmp_path / ("a" * 252 + ".png")
    for write in (lambda: write_atomically(path, b""), lambda: write_png(path, GREY, {}), lambda: check_writable(path)):
        with pytest.raises(OSError, match="name too long") as caught:
            write()
        assert str(path) in str(caught.value) and ".tmp" not in str(caught.value)
    with pytest.raises(OSError, match=r"a\.png"):
        write_tensors(path, {"a": torch.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_unfinished_is_removed(tmp_path):
    """Of this version and of those before."""
    for name in (".0123abcd.tmp", "model.safetensors.0123abcd.tmp", "mine.tmp", ".hidden.tmp"):
        (tmp_path / name).write_bytes(b"")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden.tmp", "mine.tmp"]


def test_names_are_cut_at_letters():
    assert fitting_name("ab", ".png") == "ab.png"
    assert fitting_name("é" * 10, ".png", 9) == "éé.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fitting_name(CAFE, "", 3) == "caf"
