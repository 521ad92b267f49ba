"""Noise schedules, the forward process and the parameterisations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ldm_fast.configs.diffusion import PREDICTION_TYPES, SCHEDULES, DiffusionConfig
from ldm_fast.diffusion.schedule import NoiseSchedule, beta_schedule


def make(prediction_type: str = "epsilon", **fields) -> NoiseSchedule:
    return NoiseSchedule(DiffusionConfig(prediction_type=prediction_type, **fields))


def latents(t: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(len(t), 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_are_probabilities(name, steps):
    betas = beta_schedule(name, steps, 0.001, 0.02)
    assert betas.shape == (steps,) and betas.dtype == torch.float64
    assert (betas > 0).all() and (betas < 1).all()
    assert (betas.diff() >= 0).all()


@pytest.mark.parametrize("name", ["scaled_linear", "linear"])
def test_start_and_end(name):
    betas = beta_schedule(name, 10, 0.001, 0.02)
    torch.testing.assert_close(betas[[0, -1]], torch.tensor([0.001, 0.02], dtype=torch.float64))


def test_shape_between_start_and_end():
    for name, straight in (("linear", lambda b: b), ("scaled_linear", Tensor.sqrt), ("sqrt", Tensor.square)):
        differences = straight(beta_schedule(name, 100, 0.001, 0.02)).diff()
        torch.testing.assert_close(differences, differences[:1].expand(99))


def test_cosine_is_that_of_its_paper():
    """alphas_cumprod is cos² divided by its value at 0 (Nichol & Dhariwal, eq. 17), until β is clipped near the end."""
    got = make(schedule="cosine").alphas_cumprod[:990]
    t = torch.arange(1, 991, dtype=torch.float64) / 1000
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(got, f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_alphas_cumprod_is_the_product(name):
    schedule = make(schedule=name, num_train_timesteps=50)
    betas = beta_schedule(name, 50)
    assert schedule.num_train_timesteps == 50 and schedule.prediction_type == "epsilon"
    assert schedule.alphas_cumprod.dtype == torch.float64
    for t in (0, 1, 17, 49):
        assert float(schedule.alphas_cumprod[t]) == pytest.approx(math.prod(1 - float(b) for b in betas[: t + 1]))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_signal_and_noise_are_a_point_on_the_circle(prediction_type):
    t = torch.tensor([0, 3, 500, 999])
    signal, sigma = make(prediction_type).signal_and_noise(t, torch.zeros(4, 3, 8, 8, dtype=torch.float64))
    assert signal.shape == sigma.shape == (4, 1, 1, 1)
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones_like(signal))


def test_add_noise_has_the_right_moments():
    schedule, t = make(), torch.full((4000,), 300)
    z_t = schedule.add_noise(torch.full((4000, 8), 2.0), torch.randn(4000, 8, generator=torch.manual_seed(0)), t)
    alpha = float(schedule.alphas_cumprod[300])
    assert float(z_t.mean()) == pytest.approx(2 * math.sqrt(alpha), abs=0.03)
    assert float(z_t.var()) == pytest.approx(1 - alpha, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_shape_of_the_latent_stay(dtype):
    for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5)):
        z, noise = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        assert make().add_noise(z, noise, torch.tensor([0, 999])).dtype == dtype


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_perfect_prediction_gives_back_latent_and_noise(prediction_type):
    schedule, t = make(prediction_type), torch.tensor([0, 1, 250, 998, 999])
    z_0, noise = latents(t)
    z_t, target = schedule.add_noise(z_0, noise, t), schedule.target(z_0, noise, t)
    torch.testing.assert_close(schedule.to_x0(target, z_t, t), z_0)
    torch.testing.assert_close(schedule.to_eps(target, z_t, t), noise)


@pytest.mark.parametrize("one, other", list(itertools.permutations(PREDICTION_TYPES, 2)))
def test_any_prediction_means_the_same_in_another_parameterisation(one, other):
    """The prediction need not be perfect: the x0 and eps that it implies are a target of the other parameterisation."""
    t = torch.tensor([0, 250, 999])
    prediction, z_t = latents(t)
    first, second = make(one), make(other)
    x0, eps = first.to_x0(prediction, z_t, t), first.to_eps(prediction, z_t, t)
    torch.testing.assert_close(first.add_noise(x0, eps, t), z_t)
    converted = second.target(x0, eps, t)
    torch.testing.assert_close(second.to_x0(converted, z_t, t), x0)
    torch.testing.assert_close(second.to_eps(converted, z_t, t), eps)


def test_velocity_is_the_derivative_by_the_angle():
    """v = dz/dφ for z = cos φ z_0 + sin φ ε (Salimans & Ho, appendix D)."""
    schedule, t = make("v_prediction"), torch.tensor([400])
    z_0, noise = latents(t)
    angle, h = math.acos(math.sqrt(float(schedule.alphas_cumprod[400]))), 1e-6
    at = [math.cos(a) * z_0 + math.sin(a) * noise for a in (angle - h, angle + h)]
    torch.testing.assert_close(schedule.target(z_0, noise, t), (at[1] - at[0]) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction_type):
    plain, zero = make(prediction_type), make(prediction_type, zero_terminal_snr=True)
    assert float(zero.alphas_cumprod[-1]) == 0
    assert float(zero.alphas_cumprod[0]) == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-12)
    assert (zero.alphas_cumprod.diff() < 0).all()
    t = torch.tensor([999])
    z_0, noise = latents(t)
    torch.testing.assert_close(zero.add_noise(z_0, noise, t), noise)
    target = zero.target(z_0, noise, t)
    torch.testing.assert_close(zero.to_x0(target, noise, t), z_0)
    torch.testing.assert_close(zero.to_eps(target, noise, t), noise)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weight_is_the_clipped_snr_on_the_error_of_z_0(prediction_type):
    """weight · |error of the prediction|² = min(SNR, γ) · |error of z_0|², whatever is predicted."""
    schedule, t, gamma = make(prediction_type), torch.tensor([0, 10, 200, 600, 999]), 5.0
    z_0, noise = latents(t)
    z_t, target = schedule.add_noise(z_0, noise, t), schedule.target(z_0, noise, t)
    wrong = target + 0.1 * torch.ones_like(target)
    errors = (wrong - target).square().flatten(1).sum(1)
    errors_of_z_0 = (schedule.to_x0(wrong, z_t, t) - z_0).square().flatten(1).sum(1)
    alphas = schedule.alphas_cumprod[t]
    clipped = (alphas / (1 - alphas)).clamp(max=gamma)
    weight = schedule.min_snr_weight(t, gamma)
    assert weight.dtype == torch.float32 and weight.shape == (5,)
    torch.testing.assert_close(weight.double() * errors, clipped * errors_of_z_0, rtol=1e-5, atol=0)


def test_min_snr_weight_at_zero_snr_is_finite():
    weights = make("v_prediction", zero_terminal_snr=True).min_snr_weight(torch.tensor([0, 999]), 5.0)
    assert weights.isfinite().all() and float(weights[1]) == 0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"schedule": "sqrt_linear"}, "schedule must be one of scaled_linear, linear, cosine, sqrt, got 'sqrt_linear'"),
        ({"prediction_type": "eps"}, "prediction_type must be one of epsilon, sample, v_prediction, got 'eps'"),
        ({"beta_end": 2.0}, "beta_end must be between 0 and 1, got 2.0"),
        ({"beta_start": -0.1}, "beta_start must be between 0 and 1, got -0.1"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr needs prediction_type v_prediction or sample"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**fields)


@pytest.mark.parametrize("name, steps, message", [("exp", 10, "got 'exp'"), ("linear", 0, "at least 1, got 0")])
def test_beta_schedule_errors(name, steps, message):
    with pytest.raises(ValueError, match=message):
        beta_schedule(name, steps)


@pytest.mark.parametrize("t", [[-1], [0, 1000]])
def test_timestep_out_of_range(t):
    """A timestep out of range is refused: a negative index would silently read the schedule from its end."""
    t = torch.tensor(t)
    z = torch.zeros(len(t), 3, 4, 4)
    for call in (
        lambda: make().add_noise(z, z, t),
        lambda: make().to_x0(z, z, t),
        lambda: make().min_snr_weight(t, 5.0),
    ):
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1000\)"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_timesteps_are_integers(dtype):
    """Floats are refused: they would silently be rounded down to the timestep below."""
    z = torch.zeros(2, 3, 4, 4)
    for call in (make().add_noise, make("sample").to_eps):
        with pytest.raises(TypeError, match=f"t must hold integers, got {dtype}"):
            call(z, z, torch.tensor([0.9, 0.9]).to(dtype))
    for integer in (torch.int32, torch.uint8):
        t = torch.tensor([0, 200])
        assert torch.equal(make().add_noise(z + 1, z, t.to(integer)), make().add_noise(z + 1, z, t))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_compiles_into_one_graph(prediction_type):
    schedule, t = make(prediction_type), torch.tensor([0, 400, 999])
    z_0, noise = latents(t)

    def everything(z_0, noise, t):
        z_t, target = schedule.add_noise(z_0, noise, t), schedule.target(z_0, noise, t)
        implied = schedule.to_x0(target, z_t, t), schedule.to_eps(target, z_t, t)
        return z_t, target, *implied, schedule.min_snr_weight(t, 5.0)

    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    for got, wanted in zip(compiled(z_0, noise, t), everything(z_0, noise, t), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_timesteps_on_a_gpu_are_not_waited_for():
    t = torch.tensor([0, 400, 999])
    z_0, noise = latents(t)
    wanted = make("v_prediction").target(z_0, noise, t)
    on_gpu = [tensor.cuda() for tensor in (z_0, noise, t)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = make("v_prediction").target(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), wanted)


def test_tables_are_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        schedule = make()
    assert torch.equal(schedule.alphas_cumprod, make().alphas_cumprod)
    assert schedule == make() and repr(schedule) == f"NoiseSchedule(config={schedule.config!r})"
