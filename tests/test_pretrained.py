"""One model at a time: from_pretrained, from_config, from_diffusers, from_compvis, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import KL, UNET, VQ, compvis, same

from ldm_fast.files.tensors import CheckpointError, read_tensors
from ldm_fast.interop.diffusers import config_to_diffusers, spelt_out
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.unet import UNet


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
    model.conv_in.lora_A = torch.nn.Linear(2, 2)
    for layout in ("diffusers", "compvis"):
        with pytest.raises(ValueError, match="2 unexpected: conv_in.lora_A.weight, conv_in.lora_A.bias"):
            model.save_pretrained(tmp_path / "d", layout=layout)
        assert not (tmp_path / "d").exists()


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


SAVED = {
    "one file": ({}, ["diffusion_pytorch_model.safetensors"]),
    "a variant": ({"variant": "fp16"}, ["diffusion_pytorch_model.fp16.safetensors"]),
    "a pickle": ({"safe_serialization": False}, ["diffusion_pytorch_model.bin"]),
    "shards": (
        {"max_shard_size": "400KB"},
        [
            *(f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
            "diffusion_pytorch_model.safetensors.index.json",
        ],
    ),
    "shards of a variant": (
        {"max_shard_size": 600_000, "variant": "fp16", "safe_serialization": False},
        [
            *(f"diffusion_pytorch_model.fp16-0000{i}-of-00002.bin" for i in (1, 2)),
            "diffusion_pytorch_model.bin.index.fp16.json",
        ],
    ),
}


@pytest.mark.parametrize("before", SAVED)
@pytest.mark.parametrize("name", SAVED)
def test_saved_as_asked_for(name, before, tmp_path):
    """The files that diffusers writes, read as they were saved, whatever was saved there before."""
    model, (arguments, files) = AutoencoderKL(KL), SAVED[name]
    AutoencoderKL(KL).save_pretrained(tmp_path, **SAVED[before][0])
    model.save_pretrained(tmp_path, **arguments)
    variant = arguments.get("variant")
    assert same(AutoencoderKL.from_pretrained(tmp_path, variant=variant), model.state_dict())
    there = {path.name for path in tmp_path.iterdir()} - {"config.json"}
    assert set(files) <= there and (name != before or set(files) == there)
    if "one file" not in (name, before):
        diffusers = pytest.importorskip("diffusers")
        kind = {"use_safetensors": False} if "safe_serialization" in arguments else {}
        theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path, variant=variant, low_cpu_mem_usage=False, **kind)
        assert same(model, theirs.state_dict())
        if name == before:
            theirs.save_pretrained(tmp_path / "theirs", **arguments)
            assert {path.name for path in (tmp_path / "theirs").iterdir()} == {*files, "config.json"}


def test_arguments_of_saving_that_cannot_be_honoured(tmp_path):
    model = AutoencoderKL(KL)
    for arguments, message in (
        ({"push_to_hub": True}, "push_to_hub is not supported"),
        ({"layout": "compvis", "variant": "fp16"}, "takes neither a variant nor"),
        ({"layout": "compvis", "safe_serialization": False}, "takes neither a variant nor"),
        ({"max_shard_size": "5 apples"}, "max_shard_size must be a number of bytes or a string.*got '5 apples'"),
        ({"max_shard_size": 0}, "max_shard_size must be"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "x", **arguments)
    model.save_pretrained(tmp_path / "y", is_main_process=False)
    assert [path.name for path in (tmp_path / "y").iterdir()] == ["diffusion_pytorch_model.safetensors"]


def test_interrupted_shards_are_no_model(tmp_path, monkeypatch):
    model = AutoencoderKL(KL)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    written = []

    def fails(tensors, path, metadata):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr("ldm_fast.files.tensors.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        AutoencoderKL(KL).save_pretrained(tmp_path, max_shard_size="100KB")
    with pytest.raises(CheckpointError, match="holds no diffusion_pytorch_model.safetensors"):
        AutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"surprise": 3}, "UNet2DConditionModel: not supported: surprise=3"),
        ({"dual_cross_attention": True}, "dual_cross_attention must be False, got True"),
        ({"down_block_types": ["DownBlock2D", "DownBlock3D"]}, "down_block_types must be of .*, got 'DownBlock3D'"),
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
    assert UNet.from_config({**unconditional, "attention_head_dim": 24}).config.heads(1, "AttnUpBlock2D") == (2, 24)
    with pytest.raises(ValueError, match="attention_head_dim 80 is more than 64 channels"):
        UNet.from_config({**unconditional, "attention_head_dim": 80})
    averaged = {**unconditional, "decay": 0.999, "optimization_step": 7, "use_ema_warmup": False}
    assert UNet.from_config(averaged).config == config  # as EMAModel.save_pretrained writes it
    unequal = {"downsample_type": "resnet", "upsample_type": "resnet", "up_block_types": ["AttnUpBlock2D"] * 2}
    with pytest.raises(ValueError, match="downsample_type 'resnet' needs up_block_types that mirror"):
        UNet.from_config({**unconditional, **unequal})
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

    monkeypatch.setattr("ldm_fast.files.tensors.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        AutoencoderKL(KL).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert same(AutoencoderKL.from_pretrained(tmp_path), before)
    assert read_tensors(tmp_path / "diffusion_pytorch_model.safetensors").metadata == {"format": "pt"}
