"""The noise schedule in the tables and marks of a checkpoint, in whatever dtype they are stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import KL, UNET, compvis

from ldm_fast.checkpoints import load as checkpoints
from ldm_fast.checkpoints.published import PUBLISHED, SD2
from ldm_fast.checkpoints.schedules import TABLES
from ldm_fast.checkpoints.state_dicts import inspect_tensors
from ldm_fast.configs.diffusion import DiffusionConfig
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SD = DiffusionConfig()
WITH_STEPS = [replace(config, num_train_timesteps=steps) for config in (SD,) for steps in (1, 2, 500, 1000, 4000)]
SCHEDULES = {
    **{f"{row.schedule.beta_start}-{row.schedule.beta_end}": row.schedule for row in PUBLISHED},
    **{f"{config.num_train_timesteps} steps": config for config in WITH_STEPS},
    "linear": DiffusionConfig("linear", 1000, 0.0001, 0.02),
    "cosine": DiffusionConfig("cosine", 200),
    "zero terminal SNR": DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True),
}


def found_with(tables, config=UNET, **others):
    """What is found in a checkpoint with a configuration given by hand and these tables."""
    return inspect_tensors(compvis(config, "model.diffusion_model.") | tables, Path("x"), {"unet": config}, **others)


def table(name, config, dtype=torch.float64):
    return TABLES[name].of(NoiseSchedule(config).alphas_cumprod).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_stored_schedules_are_recognised(name, dtype):
    """The schedule, and always the number of steps, whatever the table and its dtype. None is another one of these."""
    for label, config in SCHEDULES.items():
        stored = table(name, config, dtype)
        if config.zero_terminal_snr and name == "sqrt_one_minus_alphas_cumprod" and dtype == torch.bfloat16:
            continue  # it has eight bits, and the noise of both ends is 1 in them
        for again in (stored, stored.float()):  # half precision leaves its rounding behind
            found = found_with({name: again})
            what = f"{label}: {found.schedule} {found.ignored}"
            assert found.schedule is not None and found.schedule.num_train_timesteps == len(stored), what
            ours = NoiseSchedule(found.schedule).alphas_cumprod
            coarse = name != "betas" and dtype in DTYPES[2:]  # a small difference of large numbers, rounded
            tolerance = 0.02 if coarse and len(stored) < 3 else 1e-9
            torch.testing.assert_close(ours, NoiseSchedule(config).alphas_cumprod, rtol=tolerance, atol=tolerance)
            assert "noise schedule" not in found.assumed


def test_the_smallest_case():
    """Betas of LDM's schedule in half precision became those of Stable Diffusion."""
    for dtype in (torch.float16, torch.bfloat16):
        betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
        assert found_with({"betas": betas.to(dtype)}).schedule == DiffusionConfig(beta_start=0.0015, beta_end=0.0195)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 500, dtype=torch.float64) ** 2
        assert found_with({"betas": betas.to(dtype)}).schedule == DiffusionConfig(num_train_timesteps=500)


def test_ends_of_nobody_are_read():
    """Ends that no published model has come from the table."""
    config = DiffusionConfig("linear", 300, 0.0005, 0.03)
    for dtype in DTYPES:
        assert found_with({"betas": table("betas", config, dtype)}).schedule == config
        constant = found_with({"betas": torch.full((700,), 0.01, dtype=dtype)}).schedule
        torch.testing.assert_close(NoiseSchedule(constant).alphas_cumprod[-1].item(), 0.99**700)
    assert found_with({"alphas_cumprod": table("alphas_cumprod", config).float()}).schedule == config
    coarse = table("alphas_cumprod", DiffusionConfig("linear", 100, 0.001, 0.2), torch.float16)  # its ends are lost
    found = found_with({"alphas_cumprod": coarse})
    assert found.schedule is None and "alphas_cumprod, float16 (100,), belong to none" in str(found)


def test_sigmas_in_either_order():
    for name in ("denoiser.sigmas", "denoiser.log_sigmas"):
        assert found_with({name: table(name, SD).half().flip(0)}).schedule == SD


STRANGE = {
    "bent": torch.linspace(0.02, 0.1, 1000) ** 3,
    "bent in bfloat16": (torch.linspace(0.02, 0.1, 1000) ** 3).bfloat16(),
    "of two halves": table("betas", SD).half().roll(500),
    "empty": torch.zeros(0),
    "a number": torch.tensor(0.1),
    "a matrix": torch.zeros(10, 2),
    "not numbers": torch.full((1000,), float("nan")),
    "integers": torch.ones(1000, dtype=torch.int64),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_unknown_tables_are_refused(kind, tmp_path):
    """No other schedule takes its place; the models are there, and a whole model says what is missing."""
    state = compvis(UNET, "model.diffusion_model.") | compvis(KL, "first_stage_model.") | {"betas": STRANGE[kind]}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    loaded = checkpoints.load(tmp_path / "model.ckpt", config={"unet": UNET})
    assert loaded.schedule is None and loaded.unet is not None
    assert "schedule that we do not have: the file's betas" in str(loaded.found)
    with pytest.raises(
        ValueError, match=r"no schedule \(the file's betas, \w+ \(.*\), belong to none of scaled_linear"
    ):
        LatentDiffusion.from_checkpoint(loaded)


def test_tables_that_contradict_one_another():
    tables = {"betas": table("betas", SD).half(), "alphas_cumprod": table("alphas_cumprod", SD).half()}
    assert not any("contradict" in what for what in found_with(tables).assumed)
    tables["alphas_cumprod"] = tables["alphas_cumprod"].flip(0)
    found = found_with(tables)
    assert found.schedule == SD
    assert "noise schedule of the file's betas, which its alphas_cumprod contradict" in found.assumed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_factor_in_half_precision(dtype):
    for factor in (0.18215, 0.13025, 0.08333, 0.22765929, 1.0):
        found = found_with({"scale_factor": torch.tensor(factor, dtype=dtype)})
        assert found.scaling_factor == factor


# Marks


@pytest.mark.parametrize("tables", [(), ("betas",), ("alphas_cumprod", "denoiser.sigmas")], ids=str)
@pytest.mark.parametrize("unet", [UNET, SD2], ids=["given by hand", "Stable Diffusion 2.x"])
def test_marks_are_honoured_and_printed(unet, tables):
    """`ztsnr` alone says v-prediction, too: a network that predicts the noise makes nothing of pure noise."""
    state = compvis(unet, "model.diffusion_model.", "meta") | {name: table(name, SD).half() for name in tables}
    for marks, zero in ((["v_pred"], False), (["v_pred", "ztsnr"], True), (["ztsnr"], True)):
        marked = state | {mark: torch.zeros(0) for mark in marks}
        found = inspect_tensors(marked, Path("x"), {"unet": unet}, others={"global_step": 875000})
        assert found.schedule == DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=zero)
        end = ", zero terminal SNR" if zero else ""
        assert f"1000 steps, v_prediction{end} (marked {', '.join(marks)})" in str(found)
    assert "marked" not in str(inspect_tensors(state, Path("x"), {"unet": unet}))


def test_a_rescaled_table_with_its_mark_is_not_rescaled_twice():
    config = DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    for name in TABLES:
        assert found_with({name: table(name, config).half(), "ztsnr": torch.zeros(0)}).schedule == config
    found = found_with({"betas": table("betas", config)})
    assert found.schedule == config and any("prediction type v_prediction" in what for what in found.assumed)
