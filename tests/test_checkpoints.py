"""Reading of others' checkpoints: every published model is recognised, and every key is accounted for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import save_file
from small_models import CLASSES, KL, UNET, VQ, compvis, same
from torch import Tensor

from ldm_fast.checkpoints import load as checkpoints
from ldm_fast.checkpoints import model_file
from ldm_fast.checkpoints.catalogue import layout
from ldm_fast.checkpoints.clip_skeleton import CLIPSkeleton
from ldm_fast.checkpoints.published import PUBLISHED, SD1, SD2, UPSCALER, XL, XL_REFINER
from ldm_fast.checkpoints.state_dicts import inspect_tensors
from ldm_fast.configs.diffusion import DiffusionConfig
from ldm_fast.configs.encoders import CLIPShape, SpatialRescalerConfig, TransformerConfig
from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.diffusion.schedule import NoiseSchedule, beta_schedule
from ldm_fast.files.tensors import CheckpointError, read_each, read_tensors, write_tensors
from ldm_fast.interop.compvis import (
    autoencoder_config_from_compvis,
    encoder_config_from_compvis,
    unet_config_from_compvis,
)
from ldm_fast.interop.diffusers import SCHEDULERS, schedule_from_diffusers, spelt_out
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.encoders import BertTextEncoder, ClassEmbedder
from ldm_fast.models.tokenizers import WordPieceTokenizer
from ldm_fast.models.unet import UNet
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red"]


@pytest.fixture
def whole() -> dict[str, Tensor]:
    """A small checkpoint as training leaves it: three models, moving averages, the schedule, the loss's weights."""
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


# Recognition


@pytest.mark.parametrize("path", golden.zoo())
def test_zoo_is_recognised(path):
    """For all 32, names and shapes suffice to find the configuration that the constructor's parameters give."""
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
    found = inspect_tensors(tensors, Path(path))
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
    found = inspect_tensors(tensors, Path(name))
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
    """Shapes tell all rows apart, some of them only by the number of input channels."""
    from ldm_fast.checkpoints import recognise
    from ldm_fast.checkpoints.published import find

    for row in PUBLISHED:
        shapes = {entry.theirs: entry.their_shape for entry in layout(row.unet)}
        assert find(recognise.unet_fields(shapes)).name == row.name
    other = find(recognise.unet_fields(shapes) | {"in_channels": 12})
    assert other.unet.in_channels == 12 and other.name == f"{PUBLISHED[-1].name}, with other input"


def test_step_and_marks_tell_the_parameterisation():
    tensors = compvis(SD2, "model.diffusion_model.", "meta")
    assert inspect_tensors(tensors, Path("x")).schedule.prediction_type == "v_prediction"
    found = inspect_tensors(tensors, Path("x"), others={"global_step": 875000})
    assert found.schedule.prediction_type == "epsilon"
    tensors = compvis(XL, "model.diffusion_model.", "meta")
    assert inspect_tensors(tensors, Path("x")).schedule == DiffusionConfig()
    marked = inspect_tensors(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, Path("x"))
    assert marked.schedule == DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True)


# Whole checkpoints


@pytest.mark.parametrize("kind", ["ckpt", "safetensors", "old ckpt"])
def test_whole_checkpoint(kind, whole, tmp_path):
    """Moving averages are preferred, ignored entries are named, and schedule and scaling factor come from the file."""
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
    assert not loaded.unet.training and LatentDiffusion.from_checkpoint(loaded).scaling_factor == 0.5
    images = LatentDiffusion.load(path, config={"unet": UNET}).generate([1, 4], steps=2)
    assert images.shape == (2, 16, 16, 3)

    raw = checkpoints.load(path, config={"unet": UNET}, ema=False, parts=["unet"])
    assert same(raw.unet, ours) and raw.first_stage is None
    with pytest.raises(ValueError, match="not a whole model: there is no first_stage"):
        LatentDiffusion.from_checkpoint(raw)
    with pytest.raises(ValueError, match="has no vae, only unet, first_stage, cond_stage"):
        checkpoints.load(path, config={"unet": UNET}, parts=["vae"])


@pytest.mark.parametrize(("latent", "pixels"), [(12, 24), ((8, 12), (16, 24)), (None, KL.sample_size)])
def test_first_stage_is_as_large_as_the_latents_say(whole, latent, pixels):
    found = inspect_tensors(whole, Path("x"), {"unet": replace(UNET, sample_size=latent)})
    assert found.parts["first_stage"].config.sample_size == pixels


def test_a_text_encoder_without_its_tokenizer(tmp_path):
    """The file has only the network, which cannot read words."""
    text = TransformerConfig(vocab_size=len(WORDS), width=8, depth=1, max_length=4)
    state = compvis(UNET, "model.diffusion_model.") | compvis(KL, "first_stage_model.")
    state |= compvis(text, "cond_stage_model.")
    save_file(state, tmp_path / "model.safetensors")
    config = {"unet": UNET, "cond_stage": text}
    with pytest.raises(ValueError, match=r"tokenizer; give cond_stage, ldm_fast\S+BertTextEncoder.from_transformer"):
        LatentDiffusion.load(tmp_path / "model.safetensors", config=config)
    loaded = checkpoints.load(tmp_path / "model.safetensors", config=config)
    encoder = BertTextEncoder.from_transformer(WordPieceTokenizer(WORDS, max_length=4), loaded.cond_stage)
    assert LatentDiffusion.from_checkpoint(loaded, encoder).generate("red", steps=1).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(("open_clip", "layers", "skip"), [(False, 12, 0), (True, 24, 1), (True, 23, 0)])
def test_how_a_clip_encoder_is_completed(open_clip, layers, skip, tmp_path):
    """Stable Diffusion 2.x was trained on the second-to-last layer, with which files of 23 layers end."""
    pytest.importorskip("transformers")
    state = compvis(UNET, "model.diffusion_model.") | compvis(KL, "first_stage_model.")
    state |= compvis(CLIPShape(20, 64, layers, 8, 7, 48 if open_clip else None, open_clip), "cond_stage_model.")
    save_file(state, tmp_path / "model.safetensors")
    how = r"ldm_fast.models.clip.CLIPTextEncoder\(checkpoint.cond_stage, tokenizer" + (r", skip=1\)" if skip else r"\)")
    with pytest.raises(ValueError, match=f"without its tokenizer; give cond_stage, {how}"):
        LatentDiffusion.from_checkpoint(checkpoints.load(tmp_path / "model.safetensors", config={"unet": UNET}))


def test_clip_without_text_model_in_its_names(tmp_path):
    pytest.importorskip("transformers")
    shape = CLIPShape(20, 64, 2, 96, 7, None, False)
    for prefix in ("cond_stage_model.", EMBEDDER.format(0)):
        full = compvis(shape, prefix)
        short = {name.replace(".text_model.", "."): tensor for name, tensor in full.items()}
        models = [inspect_tensors(state, tmp_path).parts["cond_stage"].load(None) for state in (full, short)]
        assert short.keys() != full.keys() and same(models[0], models[1].state_dict())


def test_incomplete_moving_averages(whole, tmp_path):
    del whole["model_ema.diffusion_modelout2weight"]
    whole["model_ema.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"(?s)averages.*1 missing: out.2.weight.*1 unexpected: extra"):
        inspect_tensors(whole, tmp_path, {"unet": UNET})


def test_keys_of_no_part(whole, tmp_path):
    whole["stranger.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="1 unexpected: stranger.weight"):
        inspect_tensors(whole, tmp_path, {"unet": UNET})
    del whole["model_ema.diffusion_modelout2weight"], whole["first_stage_model.quant_conv.bias"]
    with pytest.raises(CheckpointError, match="(?s)stranger.weight.*missing: out.2.weight.*missing: quant_conv.bias"):
        inspect_tensors(whole, tmp_path, {"unet": UNET})
    with pytest.raises(CheckpointError, match="there are no weights in it"):
        inspect_tensors({"betas": torch.zeros(3)}, tmp_path)


def test_a_file_of_only_averages_needs_a_configuration(whole, tmp_path):
    alone = {name: tensor for name, tensor in whole.items() if not name.startswith("model.")}
    with pytest.raises(CheckpointError, match="moving averages without the weights"):
        inspect_tensors(alone, tmp_path)
    assert inspect_tensors(alone, tmp_path, {"unet": UNET}).parts["unet"].tensors.keys() == compvis(UNET).keys()


def test_a_file_of_only_a_first_stage(tmp_path):
    """First stages are published without prefix, with the loss's weights, and with moving averages of everything."""
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
    found = inspect_tensors(state, tmp_path, {"unet": UNET})
    assert found.parts.keys() == {"unet", "first_stage"}
    assert len(found.ignored["the first stage once more, as encoder of the condition"]) == len(compvis(KL))


def test_map_encoder_takes_its_factor_from_the_first_stage(tmp_path):
    rescaler = SpatialRescalerConfig(in_channels=9, out_channels=3, n_stages=1)
    state = compvis(KL, "first_stage_model.") | compvis(rescaler, "cond_stage_model.")
    assert inspect_tensors(state, tmp_path).parts["cond_stage"].config == rescaler
    with pytest.raises(CheckpointError, match="do not tell by how much"):
        inspect_tensors(compvis(rescaler, "cond_stage_model."), tmp_path)


@pytest.mark.parametrize("open_clip", [False, True])
def test_clip_from_a_single_file(open_clip, tmp_path):
    """The text model computes the same as that of transformers, which is given the same weights by hand."""
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
    """diffusers' conversion of single files reads the OpenCLIP names that we write."""
    pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    shape = CLIPShape(20, 64, 2, 96, 7, 48, open_clip=True)
    state = compvis(shape, EMBEDDER.format(0))
    model = checkpoints.Part(CLIPSkeleton, shape, compvis(shape), "compvis", "here").load(None)
    assert isinstance(model, transformers.CLIPTextModelWithProjection)
    theirs = convert_open_clip_checkpoint(model, state, prefix=EMBEDDER.format(0) + "model.")
    ours = model.state_dict()
    found = {name: tensor for name, tensor in theirs.items() if "position_ids" not in name}
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)
    assert len(compvis(CLIP_L, "", "meta")) == 196


# Folders


def pipeline_folder(path, unet=UNET, first_stage=KL, **scheduler):
    """Write a pipeline as diffusers does, with random weights and no text encoder: (folder, unet, first stage)."""
    unet, first_stage = UNet(unet), AutoencoderKL(first_stage)
    unet.save_pretrained(path / "unet")
    first_stage.save_pretrained(path / "vae")
    (path / "scheduler").mkdir()
    scheduler = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", **scheduler}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "safety_checker": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path, unet, first_stage


def test_pipeline_folder(tmp_path):
    scaled = replace(KL, scaling_factor=0.7)
    path, unet, first_stage = pipeline_folder(tmp_path, first_stage=scaled, beta_start=0.001, beta_end=0.02)
    loaded = checkpoints.load(path)
    assert same(loaded.unet, unet.state_dict()) and same(loaded.first_stage, first_stage.state_dict())
    assert loaded.scaling_factor == 0.7 and loaded.conditioning_key == "crossattn"
    assert loaded.schedule.config == DiffusionConfig(beta_start=0.001, beta_end=0.02)
    assert list(loaded.found.ignored.values()) == [["text_encoder (CLIPTextModel)"]]


def test_a_part_that_is_not_asked_for_need_not_be_understood(tmp_path):
    path, unet, _ = pipeline_folder(tmp_path)
    config = json.loads((path / "vae" / "config.json").read_text())
    (path / "vae" / "config.json").write_text(json.dumps({**config, "act_fn": "mish"}))
    for parts in (None, {"first_stage"}, {"unet", "first_stage"}):
        with pytest.raises(CheckpointError, match="act_fn"):
            checkpoints.load(path, parts=parts)
    loaded = checkpoints.load(path, parts={"unet"})
    assert loaded.first_stage is None and same(loaded.unet, unet.state_dict())
    assert "act_fn" in loaded.found.ignored["the first_stage, which was not asked for"][0]
    shutil.rmtree(path / "vae")
    assert same(checkpoints.load(path, parts={"unet"}).unet, unet.state_dict())
    with pytest.raises(FileNotFoundError, match="vae"):
        checkpoints.load(path)

    stray = {"first_stage_model.decoder.stray.weight": torch.zeros(1)}
    whole = {**compvis(UNET, "model.diffusion_model."), **compvis(KL, "first_stage_model.")}
    save_file({**whole, **stray}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="stray"):
        checkpoints.load(tmp_path / "model.safetensors", config=UNET)
    loaded = checkpoints.load(tmp_path / "model.safetensors", config=UNET, parts=["unet"])
    assert loaded.first_stage is None and loaded.unet is not None
    save_file(stray, tmp_path / "stray.safetensors")
    with pytest.raises(CheckpointError, match=r"conv_in|stray"):  # it does not say that the file is empty
        checkpoints.load(tmp_path / "stray.safetensors", parts=["unet"])


# Pipelines that `generate` would sample wrongly: (arguments of pipeline_folder, what the error names)
OTHER_PIPELINES = {
    "flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEulerDiscreteScheduler"),
    "flow sigmas": ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
    "flow prediction": ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow_prediction"}, "flow_pred"),
    "continuous": ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type"),
    "EDM": ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDMDPMSolverMultistepScheduler"),
    "its own betas": ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
    "LCM": ({"_class_name": "LCMScheduler"}, "LCMScheduler"),
    "LCM UNet": ({"unet": replace(UNET, time_cond_proj_dim=8)}, "time_cond_proj_dim 8"),
    "shift": ({"first_stage": replace(KL, shift_factor=0.1)}, "shift_factor 0.1"),
    "mean": ({"first_stage": replace(KL, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)}, "latents_mean"),
}


@pytest.mark.parametrize(("arguments", "message"), OTHER_PIPELINES.values(), ids=OTHER_PIPELINES)
def test_what_would_be_sampled_wrongly_is_loaded_and_refused_as_a_whole(arguments, message, tmp_path):
    path, unet, _ = pipeline_folder(tmp_path, **arguments)
    loaded = checkpoints.load(path)
    assert same(loaded.unet, unet.state_dict())
    with pytest.raises(ValueError, match=message):
        LatentDiffusion.from_checkpoint(loaded, torch.nn.Identity())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # thousands, from NumPy
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_add_the_noise_that_diffusers_adds(name):
    """The noise is the same with the schedulers' defaults and with those of Stable Diffusion."""
    scheduler = getattr(pytest.importorskip("diffusers"), name)
    for config in ({}, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}):
        try:
            theirs = scheduler(**config).alphas_cumprod
        except ImportError as error:  # DPMSolverSDEScheduler takes its Brownian noise from another package
            pytest.skip(str(error))
        ours = NoiseSchedule(schedule_from_diffusers({"_class_name": name, **config})).alphas_cumprod
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-6)


def test_one_models_folder_and_its_file(tmp_path):
    model = VQModel(VQ)
    for layout_name, file in (("diffusers", "diffusion_pytorch_model.safetensors"), ("compvis", "model.safetensors")):
        model.save_pretrained(tmp_path, layout=layout_name)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", file]
        for path in (tmp_path, tmp_path / file):
            loaded = checkpoints.load(path)
            assert same(loaded.first_stage, model.state_dict()) and loaded.first_stage.config == VQ
    (tmp_path / "config.json").unlink()
    assert checkpoints.load(tmp_path / file).first_stage.config == VQ  # the shapes of a first stage tell everything
    with pytest.raises(CheckpointError, match="holds no config.json"):
        checkpoints.load(tmp_path)


def test_our_own_model_file(tmp_path):
    model = LatentDiffusion(UNet(UNET), AutoencoderKL(KL), ClassEmbedder(CLASSES), NoiseSchedule(), 0.3)
    model.save(tmp_path / "ours.safetensors")
    loaded = checkpoints.load(tmp_path / "ours.safetensors", torch_dtype=torch.bfloat16)
    assert loaded.scaling_factor == 0.3 and loaded.cond_stage.config == CLASSES
    assert loaded.unet.dtype == torch.bfloat16
    alone = checkpoints.load(tmp_path / "ours.safetensors", parts={"first_stage"})
    assert (alone.unet, alone.cond_stage) == (None, None) and same(alone.first_stage, model.first_stage.state_dict())
    for options, error, message in (
        ({"parts": {"vae"}}, ValueError, "has no vae, only unet, first_stage, cond_stage"),
        ({"parts": "unet"}, TypeError, r"parts must be a collection of names, \['unet'\] say, got 'unet'"),
        ({"config": UNET}, ValueError, "is a model of ldm_fast; leave config out"),
    ):
        with pytest.raises(error, match=message):
            checkpoints.load(tmp_path / "ours.safetensors", **options)
    with pytest.raises(ValueError, match=r"ours.safetensors is a model of ldm_fast; leave config out"):
        LatentDiffusion.load(tmp_path / "ours.safetensors", UNET)
    with pytest.raises(ValueError, match="emoji.safetensors is a model of ldm_fast; leave config out"):
        LatentDiffusion.load(config=UNET)
    model.cond_stage = None
    model.save(tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match="has no cond_stage, only unet, first_stage"):
        checkpoints.load(tmp_path / "ours.safetensors", parts=["cond_stage"])


@pytest.fixture
def ours(tmp_path) -> Path:
    """A model file of ours in float16."""
    path = tmp_path / "ours.safetensors"
    LatentDiffusion(UNet(UNET), VQModel(VQ), ClassEmbedder(CLASSES), NoiseSchedule()).save(path, torch.float16)
    return path


def test_our_model_file_is_read_once(ours, monkeypatch):
    opened, read = [], []
    monkeypatch.setattr(checkpoints, "read_tensors", lambda path: opened.append(path) or read_tensors(path))

    def reading(path, tensors):
        for name, tensor in read_each(path, tensors):
            read.append(name)
            yield name, tensor

    monkeypatch.setattr(model_file, "read_each", reading)
    LatentDiffusion.load(ours)
    assert opened == [ours] and read == sorted(read_tensors(ours).tensors)


def test_only_the_parts_asked_for_are_built(ours, monkeypatch):
    def fails(self, config):
        raise AssertionError(f"a {type(self).__name__} was built")

    for cls in (VQModel, ClassEmbedder):
        monkeypatch.setattr(cls, "__init__", fails)
    loaded = checkpoints.load(ours, parts=["unet"])
    assert loaded.unet.dtype == torch.float16 and loaded.first_stage is None and loaded.cond_stage is None
    with pytest.raises(AssertionError, match="a VQModel was built"):
        checkpoints.load(ours)


def test_damage_to_a_part_of_our_file_that_is_not_asked_for(ours):
    """The checksum covers all parts. `inspect` tells what is in a file without checking it."""
    first = min((t.data_ptr(), name) for name, t in read_tensors(ours).tensors.items())[1]
    content = bytearray(ours.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    ours.write_bytes(content)
    part = next(part for part in ("unet", "first_stage") if not first.startswith(part))
    with pytest.raises(CheckpointError, match="changed or damaged"):
        checkpoints.load(ours, parts=[part])
    found = checkpoints.inspect(ours)
    assert [type(found.parts[name].config) for name in found.parts] == [type(UNET), type(VQ), type(CLASSES)]
    assert re.search(r"unet: UNet \(unet\.\*\): \S+ M numbers, float16", str(found))


def test_an_unknown_part_is_named_with_the_known_ones(ours):
    ours.write_bytes(b"")  # the name is wrong whatever the file holds
    with pytest.raises(ValueError, match="has no unt, only unet, first_stage, cond_stage, cond_stage_2"):
        checkpoints.load(ours, parts=["unt"])


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


MEMORY = """if True:
    import sys
    def memory(what):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
"""
MEASURE = (
    MEMORY
    + """if True:
    import torch
    from ldm_fast import UNetConfig
    from ldm_fast.checkpoints import load as checkpoints
    checkpoints.load(sys.argv[2], config=UNetConfig(**WARM))
    before = memory("VmRSS")
    unet = checkpoints.load(sys.argv[1], config=UNetConfig(**LARGE)).unet
    total = sum(float(p.detach().sum()) for p in unet.parameters())  # touches every page
    assert total == total
    print((memory("VmHWM") - before) / sum(p.numel() * p.element_size() for p in unet.parameters()))
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_peak_memory(suffix, tmp_path):
    """Loading a UNet of 290 MB and reading all of it takes at most 1.15 times its size."""
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


MEASURE_SHIPPED = (
    MEMORY
    + """if True:
    from ldm_fast import LatentDiffusion
    LatentDiffusion.load(sys.argv[1])  # imports and sets up what only the first call needs
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    model = LatentDiffusion.load()
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    print((memory("VmHWM") - before) / weights)
"""
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_peak_memory_of_the_shipped_model(ours):
    """Loading it takes little more than its weights in float32: the file is not in memory at the same time."""
    done = subprocess.run([sys.executable, "-c", MEASURE_SHIPPED, str(ours)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) <= 1.2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_tensors_are_written_with_the_mode_of_any_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_while_writing(tmp_path):
    """A limit on file sizes stops the write half-way, as a full disk does."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"x\.safetensors: cannot write: .*File too large"):
            write_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


# Wrappers


PREFIXES = {
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "the other way round": lambda name: f"_orig_mod.module.{name}",
    "within": lambda name: name.replace("diffusion_model.", "diffusion_model._orig_mod."),
    "FSDP": lambda name: name.replace("input_blocks.1.", "input_blocks.1._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
@pytest.mark.parametrize("wrapper", PREFIXES)
def test_prefixes_of_wrappers(wrapper, kind, whole, tmp_path):
    """Wrapped names give the same models, and `found` says what was taken off."""
    wrapped = {PREFIXES[wrapper](name): tensor.contiguous() for name, tensor in whole.items()}
    path = tmp_path / f"model.{kind}"
    save_file(wrapped, path) if kind == "safetensors" else torch.save(wrapped, path)
    loaded = checkpoints.load(path, config={"unet": UNET})
    plain = inspect_tensors(whole, path, {"unet": UNET})
    assert loaded.schedule.config == plain.schedule and loaded.scaling_factor == 0.5
    for part in ("unet", "first_stage", "cond_stage"):
        assert same(getattr(loaded, part), plain.parts[part].load(None).state_dict())
    assert re.search(r"ignored, prefixes of wrappers, taken off the names: \w+\.", str(loaded.found))
    assert "taken off" not in str(plain)


@pytest.mark.parametrize(
    "keys", [("model",), ("module",), ("state_dict", "model"), ("model", "module"), ("model_state_dict",)], ids=str
)
def test_containers_around_a_state_dict(keys, whole, tmp_path):
    content = {f"module.{name}": tensor for name, tensor in whole.items()}
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "model.pt")
    found = checkpoints.inspect(tmp_path / "model.pt", config={"unet": UNET})
    assert found.parts.keys() == {"unet", "first_stage", "cond_stage"}
    assert found.ignored["beside the weights"] == ["epoch"]
    taken_off = ", ".join(key for key in keys if key != "state_dict")
    assert f"ignored, containers around the weights, taken off: {taken_off}\n" in str(found)


def test_weights_with_and_without_a_prefix(whole, tmp_path):
    torch.save(whole | {"module.betas": whole["betas"]}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"with and without the prefix of a wrapper: module\.betas"):
        checkpoints.inspect(tmp_path / "model.pt")


def test_a_folder_written_by_a_wrapped_model(tmp_path):
    """The weights are in one file, and then listed in an index."""
    model = UNet(UNET)
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in read_tensors(file).tensors.items()}
    save_file(wrapped, file)
    assert same(UNet.from_pretrained(tmp_path), model.state_dict()) and "unet" in checkpoints.inspect(tmp_path).parts
    file.rename(file.with_name("part.safetensors"))
    index = {"weight_map": dict.fromkeys(wrapped, "part.safetensors")}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    assert same(UNet.from_pretrained(tmp_path), model.state_dict())
