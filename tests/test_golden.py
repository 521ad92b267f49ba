"""Parity with the published architecture: every golden case, with the best implementations and with the reference."""

from __future__ import annotations

import golden
import pytest
import torch
from small_models import compvis_to_ours
from torch import Tensor

import ldm_fast
from ldm_fast.configs.diffusion import DiffusionConfig
from ldm_fast.diffusion.condition import classifier_free_guidance
from ldm_fast.diffusion.samplers import SAMPLERS, spaced_timesteps
from ldm_fast.diffusion.schedule import NoiseSchedule, beta_schedule
from ldm_fast.interop.compvis import (
    autoencoder_config_from_compvis,
    encoder_config_from_compvis,
    unet_config_from_compvis,
)
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.encoders import ClassEmbedder, SpatialRescaler, TransformerEmbedder
from ldm_fast.models.unet import UNet

TOLERANCE = 1e-5

UNETS = (
    "unet_unconditional_vqf4",
    "unet_class_crossattn_cin",
    "unet_text_crossattn_sd1",
    "unet_scale_shift_resblock_updown_churches",
    "unet_concat_inpainting",
)
VQ_MODELS = ("vq_f4", "vq_f4_noattn", "vq_f8_attn")
ENCODERS = {
    "cond_class_embedder": ClassEmbedder,
    "cond_spatial_rescaler": SpatialRescaler,
    "cond_transformer_embedder": TransformerEmbedder,
}
SAMPLER_CASES = ("sampler_ddim_cfg", "sampler_plms_cfg")
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine", "sqrt": "sqrt"}  # theirs, ours


@pytest.fixture(params=[None, "reference"], ids=["best", "reference"])
def impl(request):
    with torch.no_grad(), ldm_fast.use_impl(request.param):
        yield request.param


def load(build, config, weights: dict[str, Tensor]):
    model = build(config)
    model.load_state_dict(compvis_to_ours(weights, config))
    return model.eval()


def assert_close(got: Tensor, wanted: Tensor, what: str = "output") -> None:
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
    assert error <= TOLERANCE, f"{what}: relative L2 error {error:.2e}"


@pytest.mark.parametrize("name", UNETS)
def test_unet(name, impl):
    unet = load(UNet, unet_config_from_compvis(golden.config(name)["params"]), golden.state_dict(name))
    case = golden.arrays(name)
    assert_close(unet(case["x"], case["t"], case.get("context")).sample, case["out"])


@pytest.mark.parametrize("name", VQ_MODELS)
def test_vq_model(name, impl):
    model = load(VQModel, autoencoder_config_from_compvis(golden.config(name)["params"]), golden.state_dict(name))
    case = golden.arrays(name)
    latent = model.encode(case["x"]).latents
    assert_close(latent, case["latent"], "latent")
    quantized = model.quantize(latent)
    assert torch.equal(quantized.indices.flatten(), case["indices"])
    assert_close(quantized.z_q, case["quantized"], "quantized")
    assert model.config.legacy
    assert_close(quantized.loss, case["codebook_loss_legacy"], "codebook loss")
    assert_close(model.decode(latent).sample, case["decoded"], "decoded")
    assert_close(model.decode(latent, force_not_quantize=True).sample, case["decoded_not_quantized"], "not quantized")


def test_kl_model(impl):
    config = autoencoder_config_from_compvis(golden.config("kl_f8")["params"])
    model, case = load(AutoencoderKL, config, golden.state_dict("kl_f8")), golden.arrays("kl_f8")
    posterior = model.encode(case["x"]).latent_dist
    for what, got in (
        ("mean", posterior.mean),
        ("logvar", posterior.logvar),
        ("kl", posterior.kl()),
        ("nll", posterior.nll(posterior.mode())),
        ("decoded", model.decode(posterior.mode()).sample),
    ):
        assert_close(got, case[what], what)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name, impl):
    theirs, case = golden.config(name), golden.arrays(name)
    config = encoder_config_from_compvis(theirs["class"].split()[0], theirs["params"])
    model = load(ENCODERS[name], config, golden.state_dict(name))
    assert_close(model(case["input"]), case["out"])


@pytest.mark.parametrize("name", SAMPLER_CASES)
def test_sampler(name, impl):
    theirs, case, weights = golden.config(name), golden.arrays(name), golden.state_dict(name)
    for key in ("out.2.weight", "out.2.bias"):
        weights[key] *= 0.1
    unet = load(UNet, unet_config_from_compvis(theirs["unet"]), weights)
    schedule = NoiseSchedule(DiffusionConfig("scaled_linear", 1000, theirs["linear_start"], theirs["linear_end"]))
    assert_close(schedule.alphas_cumprod, case["alphas_cumprod"], "schedule")
    timesteps = spaced_timesteps(1000, theirs["steps"])
    assert timesteps[::-1] == case["timesteps"].tolist()

    denoise = classifier_free_guidance(
        lambda z, t, context: unet(z, t, context).sample, case["c"], case["uc"], theirs["guidance_scale"]
    )
    assert_close(SAMPLERS[theirs["sampler"]](denoise, case["xT"], schedule, timesteps), case["out"])


@pytest.mark.parametrize("theirs", SCHEDULES)
def test_beta_schedule(theirs):
    wanted = golden.arrays("beta_schedules")[theirs]
    got = beta_schedule(SCHEDULES[theirs], 1000, 0.0015, 0.0195)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0)
