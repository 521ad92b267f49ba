"""Reading what others wrote: every published model is recognised, every key accounted for, nothing in a file is run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_fast import checkpoints
from ldm_fast.autoencoder import AutoencoderConfig, AutoencoderKL, VQConfig, VQModel
from ldm_fast.clip_weights import CLIPShape
from ldm_fast.conditioning import ClassEmbedder, ClassEmbedderConfig, SpatialRescalerConfig
from ldm_fast.configs import (
    autoencoder_config_from_compvis,
    config_to_diffusers,
    encoder_config_from_compvis,
    unet_config_from_compvis,
)
from ldm_fast.configs.diffusers import spelt_out
from ldm_fast.diffusion import DiffusionConfig, NoiseSchedule, beta_schedule
from ldm_fast.files import CheckpointError
from ldm_fast.pipeline import LatentDiffusion
from ldm_fast.published import PUBLISHED, SD1, SD2, UPSCALER, XL, XL_REFINER
from ldm_fast.state_dicts import identify
from ldm_fast.tensor_files import read_tensors
from ldm_fast.unet import UNet, UNetConfig
from ldm_fast.weights import layout

UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    cross_attention_dim=8,
    num_attention_heads=2,
    layers_per_block=1,
)
KL = AutoencoderConfig(block_out_channels=(32, 32), layers_per_block=1, z_channels=4)
VQ = VQConfig(
    block_out_channels=(32, 32),
    layers_per_block=1,
    z_channels=3,
    num_vq_embeddings=7,
    attention_levels=(1,),
    legacy=True,
)
CLASSES = ClassEmbedderConfig(num_classes=5, width=8)


def compvis(config, prefix: str = "", device: str = "cpu") -> dict[str, Tensor]:
    """Random numbers under the original's names; none at all on the meta device."""
    generator = torch.Generator().manual_seed(0)
    if device == "meta":
        return {prefix + e.theirs: torch.empty(e.their_shape, device=device) for e in layout(config)}
    return {prefix + e.theirs: torch.randn(e.their_shape, generator=generator) for e in layout(config)}


def same(model: torch.nn.Module, tensors: dict[str, Tensor]) -> bool:
    ours = model.state_dict()
    return ours.keys() == tensors.keys() and all(torch.equal(ours[name], tensors[name]) for name in ours)


@pytest.fixture
def whole() -> dict[str, Tensor]:
    """A small checkpoint as training leaves it: three models, moving averages, schedule, the loss's weights."""
    state = compvis(UNET, "model.diffusion_model.") | compvis(KL, "first_stage_model.")
    state |= compvis(CLASSES, "cond_stage_model.")
    for name in [name for name in state if name.startswith("model.")]:
        state["model_ema." + name.removeprefix("model.").replace(".", "")] = state[name] + 1
    state["model_ema.decay"], state["model_ema.num_updates"] = torch.tensor(0.9999), torch.tensor(3)
    state["betas"] = beta_schedule("scaled_linear", 1000, 0.0015, 0.0205).float()
    state["alphas_cumprod"] = torch.zeros(1000)
    state["scale_factor"] = torch.tensor(0.5)
    state["first_stage_model.loss.logvar"] = torch.zeros(())
    state["first_stage_model.loss.discriminator.main.0.weight"] = torch.zeros(3)
    return state


# What it is


@pytest.mark.parametrize("path", golden.zoo())
def test_zoo_is_recognised(path):
    """All 32: from names and shapes alone the configuration that the constructor's parameters give."""
    entry = golden.zoo()[path]
    parts = {"first_stage": {"prefix": "", **entry}}
    if "unet_config" in entry:
        parts = {kind: entry[f"{kind}_config"] for kind in ("unet", "first_stage", "cond_stage")}
    parts = {kind: part for kind, part in parts.items() if isinstance(part, dict) and part.get("state_dict")}
    tensors = {
        part["prefix"] + key: torch.empty(shape, device="meta")
        for part in parts.values()
        for key, shape in part["state_dict"].items()
    }
    found = identify(tensors, Path(path))
    assert found.parts.keys() == parts.keys() and not found.ignored
    for kind, part in parts.items():
        config = found.parts[kind].config
        if kind == "unet":
            wanted = replace(unet_config_from_compvis(part["params"]), sample_size=config.sample_size)
            assert spelt_out(config) == spelt_out(wanted)
            ddpm = entry["ddpm"]
            assert found.schedule.beta_end == ddpm["linear_end"] and found.schedule.beta_start == ddpm["linear_start"]
            assert found.scaling_factor == ddpm.get("scale_factor", 1.0)
        elif kind == "first_stage":
            wanted = autoencoder_config_from_compvis(part["params"])
            assert replace(config, sample_size=0, scaling_factor=1.0) == replace(
                wanted, sample_size=0, scaling_factor=1.0
            )
        else:
            assert config == encoder_config_from_compvis(part["class"], part["params"])


CLIP_L = CLIPShape(49408, 768, 12, 3072, 77, None, open_clip=False)
CLIP_H = CLIPShape(49408, 1024, 24, 4096, 77, 1024, open_clip=True)
CLIP_G = CLIPShape(49408, 1280, 32, 5120, 77, 1280, open_clip=True)
KL_F8, KL_F4 = AutoencoderConfig(), AutoencoderConfig(block_out_channels=(128, 256, 512))
EMBEDDER = "conditioner.embedders.{}."
STABLE_DIFFUSION = {
    "Stable Diffusion 1.x": (SD1, KL_F8, {"cond_stage_model.": CLIP_L}),
    "Stable Diffusion 1.x, inpainting": (replace(SD1, in_channels=9), KL_F8, {"cond_stage_model.": CLIP_L}),
    "Stable Diffusion 2.x": (SD2, KL_F8, {"cond_stage_model.": CLIP_H}),
    "Stable Diffusion x4 upscaler": (UPSCALER, KL_F4, {"cond_stage_model.": CLIP_H}),
    "Stable Diffusion XL, base": (XL, KL_F8, {EMBEDDER.format(0): CLIP_L, EMBEDDER.format(1): CLIP_G}),
    "Stable Diffusion XL, refiner": (XL_REFINER, KL_F8, {EMBEDDER.format(0): CLIP_G}),
}


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_stable_diffusion_is_recognised(name):
    unet, first_stage, encoders = STABLE_DIFFUSION[name]
    tensors = compvis(unet, "model.diffusion_model.", "meta") | compvis(first_stage, "first_stage_model.", "meta")
    for prefix, encoder in encoders.items():
        tensors |= compvis(encoder, prefix, "meta")
        tensors[f"{prefix}model.logit_scale"] = torch.zeros(())
    found = identify(tensors, Path(name))
    assert found.model == name
    assert found.parts["unet"].config == unet
    size = unet.sample_size * first_stage.downsampling_factor
    wanted = replace(first_stage, z_channels=4, sample_size=size, scaling_factor=found.scaling_factor)
    assert found.parts["first_stage"].config == wanted
    kept = [e if "XL" in name else replace(e, projection=None) for e in encoders.values()]
    assert [found.parts[part].config for part in ("cond_stage", "cond_stage_2") if part in found.parts] == kept
    dropped = [key for keys in found.ignored.values() for key in keys if "text_projection" in key]
    assert dropped == (
        ["model.text_projection"] if "XL" not in name and encoders["cond_stage_model."].projection else []
    )


def test_published_models_differ():
    """No two rows are the same for shapes but those that the number of input channels tells apart."""
    from ldm_fast import recognise
    from ldm_fast.published import find

    for row in PUBLISHED:
        shapes = {entry.theirs: entry.their_shape for entry in layout(row.unet)}
        assert find(recognise.unet_fields(shapes)).name == row.name
    other = find(recognise.unet_fields(shapes) | {"in_channels": 12})
    assert other.unet.in_channels == 12 and other.name == f"{PUBLISHED[-1].name}, with other input"


def test_step_and_marks_tell_the_parameterisation():
    tensors = compvis(SD2, "model.diffusion_model.", "meta")
    assert identify(tensors, Path("x")).schedule.prediction_type == "v_prediction"
    found = identify(tensors, Path("x"), others={"global_step": 875000})
    assert found.schedule.prediction_type == "epsilon"
    tensors = compvis(XL, "model.diffusion_model.", "meta")
    assert identify(tensors, Path("x")).schedule == DiffusionConfig()
    marked = identify(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, Path("x"))
    assert marked.schedule == DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True)


# Whole checkpoints


@pytest.mark.parametrize("kind", ["ckpt", "safetensors", "old ckpt"])
def test_whole_checkpoint(kind, whole, tmp_path):
    """Moving averages are preferred, what is no weight is named, the file tells its schedule and scaling factor."""
    path = tmp_path / f"model.{kind[-4:]}"
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, path)
    else:
        content = {"state_dict": OrderedDict(whole), "global_step": 7, "optimizer_states": [{"step": 1}]}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "ckpt")
    loaded = checkpoints.load(path, config={"unet": UNET})
    ours = UNet.from_compvis(UNET, compvis(UNET)).state_dict()
    assert same(loaded.unet, {name: tensor + 1 for name, tensor in ours.items()})
    assert same(loaded.first_stage, AutoencoderKL.from_compvis(KL, compvis(KL)).state_dict())
    assert isinstance(loaded.cond_stage, ClassEmbedder) and loaded.cond_stage.config == CLASSES
    assert loaded.schedule.config == DiffusionConfig(beta_start=0.0015, beta_end=0.0205)
    assert loaded.scaling_factor == 0.5 and loaded.conditioning_key == "crossattn"
    ignored = {name for names in loaded.found.ignored.values() for name in names}
    assert {"betas", "alphas_cumprod", "model_ema.decay", "model_ema.num_updates"} <= ignored
    assert {"first_stage_model.loss.logvar", "first_stage_model.loss.discriminator.main.0.weight"} <= ignored
    if kind != "safetensors":
        assert {"global_step", "optimizer_states"} <= ignored
    assert "ignored, the training loss: first_stage_model.loss" in str(loaded.found)
    assert not loaded.unet.training and loaded.pipeline().scaling_factor == 0.5
    images = LatentDiffusion.load(path, config={"unet": UNET}).generate([1, 4], steps=2)
    assert images.shape == (2, 16, 16, 3)

    raw = checkpoints.load(path, config={"unet": UNET}, ema=False, parts=["unet"])
    assert same(raw.unet, ours) and raw.first_stage is None
    with pytest.raises(ValueError, match="no whole model: there is no first_stage"):
        raw.pipeline()
    with pytest.raises(ValueError, match="has no vae, only unet, first_stage, cond_stage"):
        checkpoints.load(path, config={"unet": UNET}, parts=["vae"])


def test_incomplete_moving_averages(whole, tmp_path):
    del whole["model_ema.diffusion_modelout2weight"]
    whole["model_ema.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"(?s)averages.*1 missing: out.2.weight.*1 unexpected: extra"):
        identify(whole, tmp_path, {"unet": UNET})


def test_averages_alone_need_a_configuration(whole, tmp_path):
    alone = {name: tensor for name, tensor in whole.items() if not name.startswith("model.")}
    with pytest.raises(CheckpointError, match="moving averages without the weights"):
        identify(alone, tmp_path)
    assert identify(alone, tmp_path, {"unet": UNET}).parts["unet"].tensors.keys() == compvis(UNET).keys()


def test_first_stage_alone(tmp_path):
    """As first stages are published: without prefix, with the loss's weights and moving averages of all."""
    state = compvis(VQ) | {"loss.discriminator.main.0.weight": torch.zeros(3)}
    state |= {"model_ema." + name.replace(".", ""): tensor * 2 for name, tensor in state.items()}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    loaded = checkpoints.load(tmp_path / "model.ckpt")
    assert isinstance(loaded.first_stage, VQModel) and loaded.first_stage.config == VQ
    assert same(loaded.first_stage, VQModel.from_compvis(VQ, {k: v * 2 for k, v in compvis(VQ).items()}).state_dict())


def test_first_stage_as_encoder_of_the_condition(tmp_path):
    """LDM's inpainting model stores its first stage twice."""
    state = (
        compvis(UNET, "model.diffusion_model.") | compvis(KL, "first_stage_model.") | compvis(KL, "cond_stage_model.")
    )
    found = identify(state, tmp_path, {"unet": UNET})
    assert found.parts.keys() == {"unet", "first_stage"}
    assert len(found.ignored["the first stage once more, as encoder of the condition"]) == len(compvis(KL))


def test_map_encoder_takes_its_factor_from_the_first_stage(tmp_path):
    rescaler = SpatialRescalerConfig(in_channels=9, out_channels=3, n_stages=1)
    state = compvis(KL, "first_stage_model.") | compvis(rescaler, "cond_stage_model.")
    assert identify(state, tmp_path).parts["cond_stage"].config == rescaler
    with pytest.raises(CheckpointError, match="do not tell by how much"):
        identify(compvis(rescaler, "cond_stage_model."), tmp_path)


@pytest.mark.parametrize("open_clip", [False, True])
def test_clip_from_a_single_file(open_clip, tmp_path):
    """The text model computes what transformers' does, which is given the same weights by hand."""
    transformers = pytest.importorskip("transformers")
    shape = CLIPShape(20, 64, 2, 96, 7, 48 if open_clip else None, open_clip)
    state = compvis(shape, EMBEDDER.format(0))
    state[EMBEDDER.format(0) + "x.position_ids"] = torch.arange(7)
    save_file(state, tmp_path / "model.safetensors")
    model = checkpoints.load(tmp_path / "model.safetensors").cond_stage
    build = transformers.CLIPTextModelWithProjection if open_clip else transformers.CLIPTextModel
    assert isinstance(model, build)
    theirs = build(model.config).eval()
    tensors = {}
    if open_clip:
        state = {name.removeprefix(EMBEDDER.format(0) + "model."): tensor for name, tensor in state.items()}
        name = "transformer.resblocks.1.attn.in_proj_weight"
        assert torch.equal(
            state[name][64:128], model.state_dict()["text_model.encoder.layers.1.self_attn.k_proj.weight"]
        )
        assert torch.equal(state["text_projection"].T, model.text_projection.weight)
        tensors = model.state_dict()
    else:
        inside = "text_model." if any(name.startswith("text_model.") for name in theirs.state_dict()) else ""
        for name, tensor in state.items():
            if "position_ids" not in name:
                tensors[inside + name.removeprefix(EMBEDDER.format(0) + "transformer.text_model.")] = tensor
    theirs.load_state_dict(tensors)
    tokens = torch.tensor([[0, 5, 9, 19, 1, 1, 1]])
    with torch.no_grad():
        got, wanted = (m(tokens, output_hidden_states=True) for m in (model, theirs))
    assert torch.equal(got.hidden_states[-1], wanted.hidden_states[-1])


def test_clip_has_the_names_of_diffusers():
    """OpenCLIP's names, from the other side: diffusers' conversion of single files reads ours."""
    pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    shape = CLIPShape(20, 64, 2, 96, 7, 48, open_clip=True)
    state = compvis(shape, EMBEDDER.format(0))
    model = checkpoints.Part(shape, compvis(shape), "compvis", "here").load(None)
    assert isinstance(model, transformers.CLIPTextModelWithProjection)
    theirs = convert_open_clip_checkpoint(model, state, prefix=EMBEDDER.format(0) + "model.")
    ours = model.state_dict()
    found = {name: tensor for name, tensor in theirs.items() if "position_ids" not in name}
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)
    assert len(compvis(CLIP_L, "", "meta")) == 196


# Folders


def test_pipeline_folder(tmp_path):
    unet, first_stage = UNet.from_config(config_to_diffusers(UNET)), AutoencoderKL(replace(KL, scaling_factor=0.7))
    unet.save_pretrained(tmp_path / "unet")
    first_stage.save_pretrained(tmp_path / "vae")
    (tmp_path / "scheduler").mkdir()
    schedule = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.02}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = checkpoints.load(tmp_path)
    assert same(loaded.unet, unet.state_dict()) and same(loaded.first_stage, first_stage.state_dict())
    assert loaded.scaling_factor == 0.7 and loaded.conditioning_key == "crossattn"
    assert loaded.schedule.config == DiffusionConfig(beta_start=0.001, beta_end=0.02)
    assert list(loaded.found.ignored.values()) == [["text_encoder (CLIPTextModel)"]]


def test_one_models_folder_and_its_file(tmp_path):
    model = VQModel(VQ)
    for layout_name, file in (("diffusers", "diffusion_pytorch_model.safetensors"), ("compvis", "model.safetensors")):
        model.save_pretrained(tmp_path, layout=layout_name)
        assert sorted(os.listdir(tmp_path)) == ["config.json", file]
        for path in (tmp_path, tmp_path / file):
            loaded = checkpoints.load(path)
            assert same(loaded.first_stage, model.state_dict()) and loaded.first_stage.config == VQ
    (tmp_path / "config.json").unlink()
    assert checkpoints.load(tmp_path / file).first_stage.config == VQ  # a first stage's shapes tell all
    with pytest.raises(CheckpointError, match="holds no config.json"):
        checkpoints.load(tmp_path)


def test_our_own_model_file(tmp_path):
    model = LatentDiffusion(UNet(UNET), AutoencoderKL(KL), ClassEmbedder(CLASSES), NoiseSchedule(), 0.3)
    model.save(tmp_path / "ours.safetensors")
    loaded = checkpoints.load(tmp_path / "ours.safetensors", torch_dtype=torch.bfloat16)
    assert loaded.scaling_factor == 0.3 and loaded.cond_stage.config == CLASSES
    assert loaded.unet.dtype == torch.bfloat16


# Pickles


class Evil:
    """What an attacker's pickle holds: a call."""

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
    """A newer pickle protocol names what it calls from the stack; that is not understood, and so not run."""
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": compvis(KL), "x": Evil(tmp_path / "was_run")}, path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        checkpoints.load(path)
    assert not (tmp_path / "was_run").exists()


def test_code_behind_a_harmless_name_is_not_run(tmp_path):
    """The names on the list are not looked up: a module of that name on the path stays untouched."""
    package = tmp_path / "omegaconf"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Thing:\n    pass\n")
    torch.save({"state_dict": compvis(KL), "hyper_parameters": 0}, tmp_path / "model.ckpt")
    rename_global(tmp_path / "model.ckpt", "omegaconf", "Thing")
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from ldm_fast import checkpoints
        print(checkpoints.load({str(tmp_path / "model.ckpt")!r}).first_stage.config.z_channels)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "4", done.stderr
    assert not (tmp_path / "was_run").exists()


def rename_global(path: Path, module: str, name: str) -> None:
    """Puts an object of module.name, built and given a state, where the file has the number 0."""
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
    """Stands for what a trainer leaves in a file; its name is made that of the real one while it is pickled."""

    def __setstate__(self, state):
        raise AssertionError("the object itself was unpickled")


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


def test_what_a_trainer_leaves_is_harmless(monkeypatch, tmp_path):
    """Callbacks as dictionary keys and objects, NumPy's numbers: read without the trainer's package, and left out."""
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
    """The first byte is that of a length, and may be the one that pickles begin with."""
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
    """Where shapes do not even tell the architecture, the nearest published one says what is wrong."""
    state = compvis(SD1, "model.diffusion_model.", "meta")
    renamed = state.pop("model.diffusion_model.out.2.weight")
    wrong = torch.empty(321, 320, 3, 3, device="meta")
    state |= {
        "model.diffusion_model.out.3.weight": renamed,
        "model.diffusion_model.input_blocks.1.0.out_layers.3.weight": wrong,
    }
    with pytest.raises(CheckpointError) as error:
        identify(state, tmp_path)
    text = str(error.value)
    assert "1 missing: out.2.weight" in text and "1 unexpected: out.3.weight" in text
    assert "input_blocks.1.0.out_layers.3.weight is (321, 320, 3, 3) instead of (320, 320, 3, 3)" in text


def test_keys_of_no_part(whole, tmp_path):
    whole["stranger.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="1 unexpected: stranger.weight"):
        identify(whole, tmp_path, {"unet": UNET})
    del whole["model_ema.diffusion_modelout2weight"], whole["first_stage_model.quant_conv.bias"]
    with pytest.raises(CheckpointError, match="(?s)stranger.weight.*missing: out.2.weight.*missing: quant_conv.bias"):
        identify(whole, tmp_path, {"unet": UNET})
    with pytest.raises(CheckpointError, match="there are no weights in it"):
        identify({"betas": torch.zeros(3)}, tmp_path)


def test_unknown_unet_asks_for_its_heads(tmp_path):
    with pytest.raises(CheckpointError, match=r"no published model has its UNet \(in_channels 4.*give config="):
        identify(compvis(UNET), tmp_path)


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


def test_what_cannot_be_computed_in(tmp_path):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in compvis(VQ).items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="float8_e4m3fn; say by torch_dtype"):
        checkpoints.load(tmp_path / "model.safetensors")
    assert (
        checkpoints.load(tmp_path / "model.safetensors", torch_dtype=torch.float16).first_stage.dtype == torch.float16
    )


def test_not_a_number_is_a_weight(tmp_path):
    state = compvis(VQ)
    state["decoder.conv_in.bias"][0] = torch.nan
    save_file(state, tmp_path / "model.safetensors")
    assert checkpoints.load(tmp_path / "model.safetensors").first_stage.decoder.conv_in.bias[0].isnan()


# Memory


def test_writing_to_loaded_weights_leaves_the_file_alone(tmp_path):
    for name, save in (("model.safetensors", save_file), ("model.ckpt", torch.save)):
        save(compvis(VQ), tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with torch.no_grad():
            checkpoints.load(tmp_path / name).first_stage.decoder.conv_in.weight.zero_()
        assert (tmp_path / name).read_bytes() == before


def test_loading_draws_no_initial_weights(whole, tmp_path):
    save_file(whole, tmp_path / "model.safetensors")
    before = torch.get_rng_state()
    checkpoints.load(tmp_path / "model.safetensors", config={"unet": UNET})
    assert torch.equal(torch.get_rng_state(), before)


MEASURE = """if True:
    import sys
    def memory(what):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
    import torch
    from ldm_fast import UNetConfig, checkpoints
    checkpoints.load(sys.argv[2], config=UNetConfig(**WARM))
    before = memory("VmRSS")
    unet = checkpoints.load(sys.argv[1], config=UNetConfig(**LARGE)).unet
    total = sum(float(p.detach().sum()) for p in unet.parameters())  # every page is looked at
    assert total == total
    print((memory("VmHWM") - before) / sum(p.numel() * p.element_size() for p in unet.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_peak_memory(suffix, tmp_path):
    """Loading a UNet of 290 MB and looking at all of it takes at most 1.15 times its size."""
    small = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "num_attention_heads": 1}
    large = {"block_out_channels": (192, 384, 768, 768), "cross_attention_dim": 512}
    paths = []
    for name, values in (("large", large), ("small", small)):
        state = {k: torch.full(t.shape, 0.5) for k, t in compvis(UNetConfig(**values), "", "meta").items()}
        paths.append(tmp_path / f"{name}.{suffix}")
        (save_file if suffix == "safetensors" else torch.save)(state, paths[-1])
    assert paths[0].stat().st_size > 250e6
    code = MEASURE.replace("WARM", repr(small)).replace("LARGE", repr(large))
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) <= 1.15


# One model at a time


def test_from_pretrained_and_back(tmp_path):
    model = UNet(UNET)
    model.save_pretrained(tmp_path / "a" / "unet")
    again = UNet.from_pretrained(tmp_path / "a", subfolder="unet")
    assert spelt_out(again.config) == spelt_out(UNET) and same(again, model.state_dict()) and not again.training
    assert UNet.from_pretrained(tmp_path / "a/unet", torch_dtype=torch.float16).dtype == torch.float16
    saved = load_file(tmp_path / "a/unet/diffusion_pytorch_model.safetensors")
    assert same(model, saved)
    model.save_pretrained(tmp_path / "b", layout="compvis")
    theirs = load_file(tmp_path / "b/model.safetensors")
    assert theirs.keys() == compvis(UNET, "model.diffusion_model.").keys()
    assert same(UNet.from_pretrained(tmp_path / "b"), model.state_dict())
    assert same(UNet.from_compvis(UNET, model.to_compvis()), model.state_dict())
    with pytest.raises(ValueError, match="layout must be one of diffusers, compvis, got 'webui'"):
        model.save_pretrained(tmp_path / "c", layout="webui")


def test_used_models_are_saved(tmp_path):
    """What a forward pass may do to the weights' memory is no matter."""
    for kept in ("diffusers", "compvis"):
        model = UNet(UNET).eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            model(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 3, 8))
        model.save_pretrained(tmp_path, layout=kept)
        assert same(UNet.from_pretrained(tmp_path), before)


def test_variants_and_shards(tmp_path):
    model = AutoencoderKL(KL)
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert same(AutoencoderKL.from_pretrained(tmp_path, variant="fp16"), model.state_dict())
    with pytest.raises(CheckpointError, match="weights there: diffusion_pytorch_model.fp16.safetensors"):
        AutoencoderKL.from_pretrained(tmp_path)

    names = list(model.state_dict())
    where = {name: f"diffusion_pytorch_model-0000{1 + (i > 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({n: t for n, t in model.state_dict().items() if where[n] == shard}, tmp_path / shard)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert same(AutoencoderKL.from_pretrained(tmp_path), model.state_dict())
    index.write_text(json.dumps({"weight_map": {**where, "stranger": where[names[0]]}}))
    with pytest.raises(CheckpointError, match="do not hold the same names: stranger"):
        AutoencoderKL.from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {names[0]: "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="no weight_map of names to files beside it"):
        AutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"surprise": 3}, "UNet2DConditionModel: not supported: surprise=3"),
        ({"act_fn": "gelu"}, "act_fn must be 'silu', got 'gelu'"),
        ({"dual_cross_attention": True}, "dual_cross_attention must be False, got True"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "up_block_types must mirror"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type must be UNetMidBlock2DCrossAttn"),
        ({"layers_per_block": [1, 2]}, "layers_per_block must be the same at all levels"),
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ({"_class_name": "Transformer2DModel"}, "_class_name must be one of UNet2DConditionModel, "),
    ],
)
def test_configs_we_cannot_honour(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        UNet.from_config({**config_to_diffusers(UNET), **change})


def test_from_config_ignores_private_keys_and_knows_both_unets():
    written = config_to_diffusers(UNET)
    written |= {"_diffusers_version": "0.1", "_name_or_path": "x"}
    assert spelt_out(UNet.from_config(written).config) == spelt_out(UNET)
    del written["_class_name"]
    assert spelt_out(UNet.from_config(written).config) == spelt_out(UNET)
    unconditional = {"sample_size": 8, "block_out_channels": [32, 64], "layers_per_block": 1, "attention_head_dim": 16}
    unconditional |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}
    unconditional |= {"up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    config = UNet.from_config(unconditional).config
    assert config.heads(1) == (4, 16) and config.cross_attention_dim is None and config.in_channels == 3
    with pytest.raises(ValueError, match="attention_head_dim 24 does not divide 64"):
        UNet.from_config({**unconditional, "attention_head_dim": 24})
    with pytest.raises(ValueError, match="attn_norm_num_groups must be norm_num_groups"):
        UNet.from_config({**unconditional, "resnet_time_scale_shift": "scale_shift"})
    with pytest.raises(ValueError, match="'resnet' needs AttnDownBlock2D at every level"):
        UNet.from_config({**unconditional, "downsample_type": "resnet", "upsample_type": "resnet"})
    with pytest.raises(TypeError, match="config must be a dictionary"):
        UNet.from_config(UNET)


def test_first_stages_from_config():
    kl = replace(KL, attention_levels=(1,), scaling_factor=0.3, sample_size=64)
    assert spelt_out(AutoencoderKL.from_config(config_to_diffusers(kl)).config) == spelt_out(kl)
    for vq in (VQ, replace(VQ, legacy=False, commitment_weight=0.5), replace(VQ, z_channels=5)):
        written = config_to_diffusers(vq)
        assert written["vq_embed_dim"] == 3 and written["latent_channels"] == vq.z_channels
        assert spelt_out(VQModel.from_config(written).config) == spelt_out(vq)
    with pytest.raises(ValueError, match="VQModel: the configuration is that of another model, AutoencoderConfig"):
        VQModel.from_config(config_to_diffusers(KL))


@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_saved_without_what_only_training_needs(tmp_path, layout):
    """Other programs have no place for the moving counts of a codebook that is still being trained."""
    model = VQModel(replace(VQ, codebook_ema_decay=0.99))
    assert "quantize.ema_counts" in model.state_dict()
    model.save_pretrained(tmp_path, layout=layout)
    read = VQModel.from_pretrained(tmp_path)
    assert read.config.codebook_ema_decay is None and "codebook_ema_decay" not in (tmp_path / "config.json").read_text()
    assert read.state_dict().keys() == model.state_dict().keys() - {"quantize.ema_counts"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.state_dict().items())


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "UNet2DModel", "AutoencoderKL", "VQModel"])
def test_from_diffusers_shares_the_weights(kind):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"block_out_channels": (32, 32), "layers_per_block": 1}
    configs = {
        "UNet2DConditionModel": config_to_diffusers(UNET),
        "UNet2DModel": {**blocks, "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        "AutoencoderKL": config_to_diffusers(KL),
        "VQModel": config_to_diffusers(VQ),
    }
    theirs = getattr(diffusers, kind).from_config(configs[kind]).half()
    next(theirs.parameters()).requires_grad_(False)
    ours = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}.get(kind, UNet).from_diffusers(theirs)
    wanted = dict(theirs.named_parameters())
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.data_ptr() == wanted[name].data_ptr() and parameter.dtype == torch.float16
        assert parameter.requires_grad == wanted[name].requires_grad
    ours.float()
    assert {p.dtype for p in theirs.parameters()} == {torch.float16}
    with pytest.raises(TypeError, match="must be a .*, got Linear"):
        UNet.from_diffusers(torch.nn.Linear(1, 1))


def test_from_diffusers_refuses_wrapped_weights():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel.from_config(config_to_diffusers(UNET))
    theirs.conv_in = torch.nn.Sequential(theirs.conv_in)
    with pytest.raises(ValueError, match=r"(?s)2 missing: conv_in.weight.*2 unexpected: conv_in.0.weight"):
        UNet.from_diffusers(theirs)


def test_diffusers_reads_what_we_write(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    for ours, theirs in (
        (UNet(UNET), diffusers.UNet2DConditionModel),
        (AutoencoderKL(KL), diffusers.AutoencoderKL),
        (VQModel(VQ), diffusers.VQModel),
    ):
        ours.save_pretrained(tmp_path)
        assert same(ours, theirs.from_pretrained(tmp_path, low_cpu_mem_usage=False).state_dict())
        theirs.from_pretrained(tmp_path, low_cpu_mem_usage=False).save_pretrained(tmp_path / "theirs")
        assert same(type(ours).from_pretrained(tmp_path / "theirs"), ours.state_dict())


def test_a_failed_write_leaves_the_old_model(tmp_path, monkeypatch):
    model = AutoencoderKL(KL)
    model.save_pretrained(tmp_path)
    before = model.state_dict()

    def fails(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        AutoencoderKL(KL).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert same(AutoencoderKL.from_pretrained(tmp_path), before)
    assert read_tensors(tmp_path / "diffusion_pytorch_model.safetensors").metadata == {"format": "pt"}
