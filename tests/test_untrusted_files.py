"""No code in a file is run, and the error about a damaged file says what is wrong with it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import KL, UNET, VQ, compvis, same

from ldm_fast.checkpoints import load as checkpoints
from ldm_fast.checkpoints.published import SD1
from ldm_fast.checkpoints.state_dicts import inspect_tensors
from ldm_fast.files.tensors import CheckpointError, read_tensors
from ldm_fast.models.autoencoder import AutoencoderKL

# Pickles


class Evil:
    """Pickles as a call of os.system, like an attacker's object."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(zipped, tmp_path):
    witness, path = tmp_path / "was_run", tmp_path / "model.ckpt"
    torch.save({"state_dict": compvis(KL), "x": Evil(witness)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="nothing in it was run.*system") as error:
        checkpoints.load(path)
    assert str(path) in str(error.value) and not witness.exists()
    torch.load(path, weights_only=False)  # what would have happened
    assert witness.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_ways_to_name_code(tmp_path):
    """A newer pickle protocol takes the name of a function from the stack. This is not understood, so it is not run."""
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": compvis(KL), "x": Evil(tmp_path / "was_run")}, path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        checkpoints.load(path)
    assert not (tmp_path / "was_run").exists()


def test_code_behind_a_harmless_name_is_not_run(tmp_path):
    """The permitted names are not looked up: a module of that name on the path is not imported."""
    package = tmp_path / "omegaconf"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Thing:\n    pass\n")
    torch.save({"state_dict": compvis(KL), "hyper_parameters": 0}, tmp_path / "model.ckpt")
    rename_global(tmp_path / "model.ckpt", "omegaconf", "Thing")
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from ldm_fast.checkpoints import load as checkpoints
        print(checkpoints.load({str(tmp_path / "model.ckpt")!r}).first_stage.config.z_channels)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "4", done.stderr
    assert not (tmp_path / "was_run").exists()


def rename_global(path: Path, module: str, name: str) -> None:
    """Replace a number 0 in the file by an object of class module.name that is built and given a state."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    (pkl,) = (record for record in records if record.endswith("data.pkl"))
    built = b"c" + f"{module}\n{name}\n".encode() + b")\x81}X\x01\x00\x00\x00aK\x01sb"
    assert records[pkl].count(b"K\x00s") + records[pkl].count(b"K\x00u") >= 1
    records[pkl] = records[pkl].replace(b"K\x00u", built + b"u", 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for record, content in records.items():
            archive.writestr(record, content)


class ModelCheckpoint:
    """Stands for an object that a trainer leaves in a file. While it is pickled, it has the name of the real class."""

    def __setstate__(self, state):
        raise AssertionError("the object itself was unpickled")


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


def test_what_a_trainer_leaves_is_harmless(monkeypatch, tmp_path):
    """Callbacks and NumPy's numbers are read without the trainer's package, and left out."""
    import types

    import numpy as np

    module = types.ModuleType(ModelCheckpoint.__module__)
    module.ModelCheckpoint = ModelCheckpoint
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("pytorch_lightning.callbacks"))
    monkeypatch.setitem(sys.modules, ModelCheckpoint.__module__, module)
    callback = ModelCheckpoint()
    callback.best = np.float64(0.5)
    content = {"callbacks": {ModelCheckpoint: callback}, "epoch": 3, "loss": np.float32(1), "state_dict": compvis(KL)}
    torch.save(content, tmp_path / "model.ckpt")
    monkeypatch.undo()
    loaded = checkpoints.load(tmp_path / "model.ckpt")
    assert same(loaded.first_stage, AutoencoderKL.from_compvis(KL, compvis(KL)).state_dict())
    assert loaded.found.ignored["beside the weights"] == ["callbacks", "epoch", "loss"]


# Damage


def damaged(kind: str, path: Path) -> Path:
    state = compvis(VQ)
    file = path / "model.safetensors"
    save_file(state, file)
    whole = file.read_bytes()
    if kind.startswith(("ckpt", "pickle")):
        file = path / "model.ckpt"
        torch.save(state, file)
        whole = file.read_bytes()
    if "truncated" in kind:
        file.write_bytes(whole[: len(whole) // 2])
    contents = {
        "empty": b"",
        "text": b"hello, this is no checkpoint",
        "a web page": b"<!DOCTYPE html><html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "header": b"\xff\x00\x00\x00\x00\x00\x00\x00{" + b"x" * 50,
        "pickle of a list": pickle.dumps([1, 2], protocol=2),
        "pickle's first byte and garbage": b"\x80\x02" + bytes(range(40, 90)),
    }
    if kind in contents:
        file.write_bytes(contents[kind])
    if kind == "other things":
        save_file({"a.weight": torch.zeros(2), "b": torch.zeros(1)}, file)
    if kind == "another name":
        torch.save(state, file)
    if kind == "pickle without tensors":
        torch.save({"state_dict": {"encoder.conv_in.weight": [1, 2]}}, file)
    return file


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "not a whole safetensors file"),
        ("ckpt truncated", "not a whole PyTorch checkpoint"),
        ("empty", "it is empty"),
        ("text", "neither safetensors nor a pickle"),
        ("a web page", "it is a web page"),
        ("pointer", "pointer of Git LFS"),
        ("header", "not a whole safetensors file"),
        ("pickle of a list", "model.ckpt (holds no state dict|cannot be read)"),
        ("pickle's first byte and garbage", "cannot be read as tensors"),
        ("other things", "names of no model known here: a.weight, b"),
        ("another name", "not what its name says but a pickle of PyTorch"),
        ("pickle without tensors", "1 entries of its state dict are not dense tensors: encoder.conv_in.weight"),
    ],
)
def test_damaged_files(kind, message, tmp_path):
    path = damaged(kind, tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoints.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_safetensors_are_known_by_any_first_byte(tmp_path):
    """The first byte belongs to a length, and may be the byte that pickles begin with."""
    first = set()
    for i in range(32):
        save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", {"x": "y" * 8 * i})
        assert read_tensors(tmp_path / "model.safetensors").tensors["a"] == 1
        first.add((tmp_path / "model.safetensors").read_bytes()[0])
    assert 0x80 in first


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoints.load(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_wrong_keys_are_all_named(prefix, tmp_path):
    state = compvis(VQ, prefix)
    state[prefix + "encoder.renamed.weight"] = state.pop(prefix + "encoder.mid.block_1.conv1.weight")
    state[prefix + "decoder.mid.block_2.norm1.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(tmp_path / "model.safetensors")
    text = str(error.value)
    assert "1 missing: encoder.mid.block_1.conv1.weight" in text and "1 unexpected: encoder.renamed.weight" in text
    assert "1 wrong shape: decoder.mid.block_2.norm1.bias is (3,) instead of (32,)" in text


def test_published_unet_with_wrong_keys(tmp_path):
    """If the shapes fit no architecture, the error compares with the nearest published one."""
    state = compvis(SD1, "model.diffusion_model.", "meta")
    renamed = state.pop("model.diffusion_model.out.2.weight")
    wrong = torch.empty(321, 320, 3, 3, device="meta")
    state |= {
        "model.diffusion_model.out.3.weight": renamed,
        "model.diffusion_model.input_blocks.1.0.out_layers.3.weight": wrong,
    }
    with pytest.raises(CheckpointError) as error:
        inspect_tensors(state, tmp_path)
    text = str(error.value)
    assert "1 missing: out.2.weight" in text and "1 unexpected: out.3.weight" in text
    assert "input_blocks.1.0.out_layers.3.weight is (321, 320, 3, 3) instead of (320, 320, 3, 3)" in text


def test_unknown_unet_asks_for_its_heads(tmp_path):
    with pytest.raises(CheckpointError, match=r"no published model has its UNet \(in_channels 4.*give config="):
        inspect_tensors(compvis(UNET), tmp_path)


@pytest.mark.parametrize(
    "dtype, message",
    [
        (
            torch.float16,
            "different dtypes: [0-9]+ torch.float32 .*, 1 torch.float16 .decoder.conv_in.bias.*torch_dtype",
        ),
        (torch.int64, "must be floating point numbers, but .* is torch.int64"),
    ],
)
def test_mixed_dtypes(dtype, message, tmp_path):
    state = compvis(VQ)
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"].to(dtype)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(tmp_path / "model.safetensors")
    if dtype.is_floating_point:
        loaded = checkpoints.load(tmp_path / "model.safetensors", torch_dtype=torch.bfloat16)
        assert {p.dtype for p in loaded.first_stage.parameters()} == {torch.bfloat16}


def test_a_dtype_that_cannot_be_computed_in(tmp_path):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in compvis(VQ).items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="float8_e4m3fn; choose by torch_dtype"):
        checkpoints.load(tmp_path / "model.safetensors")
    assert (
        checkpoints.load(tmp_path / "model.safetensors", torch_dtype=torch.float16).first_stage.dtype == torch.float16
    )


def test_nan_is_accepted_as_a_weight(tmp_path):
    state = compvis(VQ)
    state["decoder.conv_in.bias"][0] = torch.nan
    save_file(state, tmp_path / "model.safetensors")
    assert checkpoints.load(tmp_path / "model.safetensors").first_stage.decoder.conv_in.bias[0].isnan()
