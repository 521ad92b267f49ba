"""Samplers on Gaussian data, for which exact solutions are known.

The best possible network is known in closed form, and so are the solution of the probability flow ODE and the
marginals. Parity with the original samplers is in the golden tests.
"""

import math
from itertools import pairwise

import pytest
import torch

from ldm_fast.configs.diffusion import PREDICTION_TYPES, DiffusionConfig
from ldm_fast.diffusion.condition import Condition, classifier_free_guidance
from ldm_fast.diffusion.samplers import SAMPLERS, ddim, plms, spaced_timesteps
from ldm_fast.diffusion.schedule import NoiseSchedule, noise_like

MEAN, STD = 0.7, 0.4
DETERMINISTIC = ("ddim", "plms", "dpm_solver_pp_2m")


def schedule_of(prediction_type="epsilon", **more):
    return NoiseSchedule(DiffusionConfig(prediction_type=prediction_type, **more))


def gaussian_denoise(schedule, mean=MEAN, std=STD):
    """Return the best network for z_0 ~ N(mean, std^2): E[x0 | z_t], in the schedule's parameterisation."""

    def denoise(z, t):
        alpha = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1).to(z.dtype)
        x0 = mean + alpha.sqrt() * std**2 / (alpha * std**2 + 1 - alpha) * (z - alpha.sqrt() * mean)
        noise = (z - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return {
            "sample": x0,
            "epsilon": noise,
            "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * x0,
        }[schedule.prediction_type]

    return denoise


def exact_flow(schedule, z, t, alpha_end, mean=MEAN, std=STD):
    """Solve the probability flow ODE from z at timestep t: the standardised latent stays the same."""
    now, end = schedule.alphas_cumprod[t].item(), alpha_end

    def spread(a):
        return math.sqrt(a * std**2 + 1 - a)

    return math.sqrt(end) * mean + spread(end) / spread(now) * (z - math.sqrt(now) * mean)


def latent(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("total", [1, 2, 7, 100, 1000])
def test_timesteps_are_as_many_as_asked_for_and_valid(spacing, total):
    for steps in range(1, total + 1):
        timesteps = spaced_timesteps(total, steps, spacing)
        assert len(timesteps) == steps
        assert all(a > b for a, b in pairwise(timesteps))
        assert timesteps[-1] >= 0 and timesteps[0] < total


def test_spacings():
    assert spaced_timesteps(1000, 4, "leading") == [751, 501, 251, 1]
    assert spaced_timesteps(1000, 4, "trailing") == [999, 749, 499, 249]
    assert spaced_timesteps(1000, 4, "linspace") == [999, 666, 333, 0]
    assert spaced_timesteps(1000, 1, "linspace") == [999]


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (0, ValueError, "between 1 and 1000, got 0"),
        (-3, ValueError, "got -3"),
        (1001, ValueError, "got 1001"),
        (2.5, TypeError, "whole number, got 2.5"),
        (True, TypeError, "whole number"),
    ],
)
def test_bad_steps(steps, error, message):
    with pytest.raises(error, match=message):
        spaced_timesteps(1000, steps)


def test_unknown_spacing():
    with pytest.raises(ValueError, match="unknown timestep spacing 'log'"):
        spaced_timesteps(1000, 10, "log")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_solve_the_flow(name, prediction_type):
    schedule = schedule_of(prediction_type)
    z = latent(2, 3, 4, 4)
    timesteps = spaced_timesteps(1000, 200, "leading")
    out = SAMPLERS[name](gaussian_denoise(schedule), z, schedule, timesteps)
    assert out.dtype == z.dtype
    error = (out - exact_flow(schedule, z, timesteps[0], schedule.alphas_cumprod[0].item())).abs().max()
    assert error < {"ddim": 3e-2, "plms": 2e-3, "dpm_solver_pp_2m": 1e-2}[name]


@pytest.mark.parametrize(("name", "factor"), [("ddim", 1.9), ("plms", 3.5), ("dpm_solver_pp_2m", 3.5)])
def test_order_of_convergence(name, factor):
    """Twice as many steps give half the error with the first-order method, and a quarter with the others.

    Steps are spread evenly in lambda, on an interval without either end, since the order refers to such steps.
    """
    schedule = schedule_of("sample", num_train_timesteps=20_000, beta_start=0.00085 / 20, beta_end=0.012 / 20)
    log_snr = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).log()
    errors = []
    for steps in (80, 160):
        goals = torch.linspace(-4, 4, steps + 1, dtype=torch.float64)
        *timesteps, last = [int((log_snr - goal).abs().argmin()) for goal in goals]
        end = schedule.alphas_cumprod[last].item()
        z = latent(1, 1, 4, 4)
        out = SAMPLERS[name](gaussian_denoise(schedule), z, schedule, timesteps, alpha_end=end)
        errors.append((out - exact_flow(schedule, z, timesteps[0], end)).abs().max().item())
    assert errors[0] / errors[1] > factor


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_the_datas_distribution(name):
    schedule = schedule_of("v_prediction")
    z = latent(1, 1, 200, 200)
    timesteps = spaced_timesteps(1000, 250, "trailing")
    out = SAMPLERS[name](
        gaussian_denoise(schedule), z, schedule, timesteps, generator=torch.Generator().manual_seed(1), alpha_end=1.0
    )
    assert out.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert out.std().item() == pytest.approx(STD, rel=0.04)


def test_ddim_with_eta_one_is_ddpm():
    """The same posterior, written in two ways (Song et al. 2021, section 4.1)."""
    schedule = schedule_of()
    z, timesteps = latent(2, 3, 4, 4), spaced_timesteps(1000, 10)
    outs = [
        SAMPLERS[name](
            gaussian_denoise(schedule), z, schedule, timesteps, generator=torch.Generator().manual_seed(3), **extra
        )
        for name, extra in (("ddim", {"eta": 1.0}), ("ddpm", {}))
    ]
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
    deterministic = ddim(gaussian_denoise(schedule), z, schedule, timesteps)
    assert not torch.allclose(outs[0], deterministic, atol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_last_of_few_steps_gives_x0(name, steps):
    schedule = schedule_of("sample")
    seen = []
    out = SAMPLERS[name](
        gaussian_denoise(schedule),
        latent(2, 1, 3, 5),
        schedule,
        spaced_timesteps(1000, steps, "trailing"),
        on_step=seen.append,
        alpha_end=1.0,
    )
    assert [step.index for step in seen] == list(range(steps)) and {step.total for step in seen} == {steps}
    assert seen[-1].alpha == 1.0
    torch.testing.assert_close(out, seen[-1].x0)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "plms"])
def test_zero_terminal_snr(name):
    schedule = schedule_of("v_prediction", zero_terminal_snr=True)
    timesteps = spaced_timesteps(1000, 100, "trailing")
    generator = torch.Generator().manual_seed(0)
    z = latent(1, 1, 100, 100)
    out = SAMPLERS[name](gaussian_denoise(schedule), z, schedule, timesteps, generator=generator, alpha_end=1.0)
    assert out.isfinite().all()
    assert out.mean().item() == pytest.approx(MEAN, abs=0.05)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_one_or_two_steps_of_plms(spacing, prediction_type):
    """One step, and the first of two, is that of DDIM: the prediction for a latent without noise changes nothing."""
    schedule = schedule_of(prediction_type)
    network, z, asked = gaussian_denoise(schedule), latent(1, 1, 4, 4), []

    def denoise(z, t):
        asked.append(int(t))
        return network(z, t)

    one = spaced_timesteps(1000, 1, spacing)
    for alpha_end in (None, 1.0):
        outputs = [sampler(network, z, schedule, one, alpha_end=alpha_end) for sampler in (plms, ddim)]
        torch.testing.assert_close(*outputs)
    two = spaced_timesteps(1000, 2, spacing)
    for steps in (one, two):
        asked.clear()
        seen, seen_by_ddim = [], []
        plms(denoise, z, schedule, steps, on_step=seen.append)
        assert asked == steps
        ddim(network, z, schedule, steps, on_step=seen_by_ddim.append)
        torch.testing.assert_close(seen[0].z, seen_by_ddim[0].z)


def test_plms_says_why_it_cannot_start_from_pure_noise():
    schedule = schedule_of("v_prediction", zero_terminal_snr=True)
    with pytest.raises(ValueError, match="no signal at its first timestep"):
        plms(gaussian_denoise(schedule), latent(1, 1, 2, 2), schedule, [999, 500])


@pytest.mark.parametrize("name", SAMPLERS)
def test_on_step_replaces_the_latent(name):
    schedule = schedule_of()
    z = latent(1, 1, 2, 2)
    out = SAMPLERS[name](
        gaussian_denoise(schedule), z, schedule, [900, 300], on_step=lambda step: torch.full_like(z, 5.0)
    )
    assert (out == 5).all()


@pytest.mark.parametrize("timesteps", [[], [1, 2], [5, 5], [1000, 1], [3, -1]])
@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_timesteps(name, timesteps):
    schedule = schedule_of()
    with pytest.raises(ValueError, match="strictly decreasing"):
        SAMPLERS[name](gaussian_denoise(schedule), latent(1, 1, 2, 2), schedule, timesteps)


def test_default_end_is_the_originals():
    schedule = schedule_of()
    ends = []
    for timesteps in ([500, 1], [500, 0]):
        ddim(
            gaussian_denoise(schedule),
            latent(1, 1, 2, 2),
            schedule,
            timesteps,
            on_step=lambda step: ends.append(step.alpha),
        )
    assert ends[1] == schedule.alphas_cumprod[0].item() and ends[3] == 1.0


def test_noise_of_an_image_does_not_depend_on_the_batch():
    z = torch.empty(3, 2, 4, 4)

    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    three = noise_like(z, generators([5, 6, 7]))
    one = noise_like(z[:1], generators([6]))
    assert torch.equal(three[1:2], one) and not torch.equal(three[0], three[1])
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        noise_like(z, generators([1, 2]))


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: Condition(crossattn=t)], ids=["tensor", "condition"])
def test_classifier_free_guidance(wrap):
    calls = []

    def model(z, t, condition):
        calls.append(len(z))
        value = condition.crossattn if isinstance(condition, Condition) else condition
        return z * value.reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1)

    z, t = latent(2, 1, 2, 2), torch.tensor([3, 4])
    condition, uncondition = wrap(torch.tensor([2.0, 3.0])), wrap(torch.tensor([1.0, 1.0]))
    guided = classifier_free_guidance(model, condition, uncondition, 2.5)(z, t)
    factor = torch.tensor([1 + 2.5 * (2 - 1), 1 + 2.5 * (3 - 1)]).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(guided, z * factor + t.reshape(-1, 1, 1, 1))
    assert calls == [4]
    torch.testing.assert_close(
        classifier_free_guidance(model, condition, None, 1)(z, t), model(z, t, condition), rtol=0, atol=0
    )
    assert calls == [4, 2, 2]
    with pytest.raises(ValueError, match="needs an unconditional input"):
        classifier_free_guidance(model, condition, None, 2.0)
