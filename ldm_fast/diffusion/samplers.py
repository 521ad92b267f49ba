"""Samplers: from noise z_T to a latent z_0, each one a pure function.

Every sampler has the signature

    f(denoise, z, schedule, timesteps, *, generator=None, on_step=None, alpha_end=None) -> z_0

    denoise(z_t, t)  the network's output in the schedule's parameterisation (eps, x0 or v); t is (B,) int64
    z                (B, C, H, W) noise, or a latent noised to timesteps[0]; keeps its dtype
    schedule         NoiseSchedule
    timesteps        strictly decreasing, each in [0, schedule.num_train_timesteps); see `spaced_timesteps`
    generator        the source of random numbers: one torch.Generator, or one per image
    on_step(step)    called after every step; if it returns a tensor, that replaces the latent
    alpha_end        abar of the latent returned; 1.0 for the clean one. Default: abar of timestep 0, where the original
                     LDM samplers end (but 1.0 if timestep 0 is itself a step)

Below, abar is the cumulative product of (1 - beta), "t" is a step's timestep and "s" the next one. Coefficients are
computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm_fast.configs.checks import whole_number
from ldm_fast.diffusion.schedule import Generators, NoiseSchedule, noise_like

Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """What `on_step` is told: the latent z after step `index` (from 0) of `total`, its abar, the estimate of z_0."""

    index: int
    total: int
    timestep: int
    alpha: float
    z: Tensor
    x0: Tensor


OnStep = Callable[[Step], Tensor | None]


def spaced_timesteps(num_train_timesteps: int, steps: int, spacing: str = "leading") -> list[int]:
    """Return `steps` timesteps, strictly decreasing (Lin et al., arXiv:2305.08891, table 2).

    "leading": ..., 1 + T // steps, 1, as in the original LDM samplers. "trailing": starts at the last timestep T - 1.
    "linspace": from T - 1 down to 0.
    """
    total, steps = num_train_timesteps, whole_number("steps", steps)
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total}, got {steps}")
    if spacing == "leading":
        stride = total // steps
        offset = 1 if (steps - 1) * stride + 1 < total else 0
        return [i * stride + offset for i in reversed(range(steps))]
    if spacing == "trailing":
        return [round(total - i * total / steps) - 1 for i in range(steps)]
    if spacing == "linspace":
        return [round((total - 1) * (1 - i / max(steps - 1, 1))) for i in range(steps)]
    raise ValueError(f"unknown timestep spacing {spacing!r}; known: leading, trailing, linspace")


def _noise_levels(schedule: NoiseSchedule, timesteps: Sequence[int], alpha_end: float | None) -> list[float]:
    """Return abar at every timestep and, last, where the sampler ends."""
    timesteps, total = [int(t) for t in timesteps], schedule.num_train_timesteps
    decreasing = all(a > b for a, b in pairwise(timesteps))
    if not timesteps or not decreasing or timesteps[0] >= total or timesteps[-1] < 0:
        raise ValueError(
            f"timesteps must be strictly decreasing, from below {total} down to 0 or more; got {timesteps}"
        )
    alphas = schedule.alphas_cumprod.tolist()
    if alpha_end is None:
        alpha_end = alphas[0] if timesteps[-1] > 0 else 1.0
    return [alphas[t] for t in timesteps] + [float(alpha_end)]


def _batch(z: Tensor, t: int) -> Tensor:
    """Return the timestep for each image, on the CPU, where its value can be read without waiting for z's device."""
    return torch.full((len(z),), int(t), dtype=torch.int64)


def _finish(on_step: OnStep | None, step: Step) -> Tensor:
    replaced = on_step(step) if on_step is not None else None
    return step.z if replaced is None else replaced


def ddim(
    denoise: Denoise,
    z: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    *,
    generator: Generators = None,
    on_step: OnStep | None = None,
    alpha_end: float | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al., arXiv:2010.02502, eq. 12 and 16): deterministic at eta 0, ancestral sampling at eta 1.

    z_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - sigma^2) eps + sigma noise,
    sigma^2 = eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s)
    """
    alphas = _noise_levels(schedule, timesteps, alpha_end)
    for i, t in enumerate(timesteps):
        now, then = alphas[i], alphas[i + 1]
        t_batch = _batch(z, t)
        output = denoise(z, t_batch)
        x0, eps = schedule.to_x0(output, z, t_batch), schedule.to_eps(output, z, t_batch)
        variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        z = math.sqrt(then) * x0 + math.sqrt(max(1 - then - variance, 0.0)) * eps
        if variance > 0:
            z = z + math.sqrt(variance) * noise_like(z, generator)
        z = _finish(on_step, Step(i, len(timesteps), int(t), then, z, x0))
    return z


def ddpm(
    denoise: Denoise,
    z: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    *,
    generator: Generators = None,
    on_step: OnStep | None = None,
    alpha_end: float | None = None,
) -> Tensor:
    """Ancestral sampling with the posterior q(z_s | z_t, x0) on any subset of timesteps (Ho et al., arXiv:2006.11239).

    Equations 6 and 7 there, with r = abar_t / abar_s:

    mean = sqrt(abar_s) (1 - r) / (1 - abar_t) x0 + sqrt(r) (1 - abar_s) / (1 - abar_t) z_t,
    variance = (1 - r) (1 - abar_s) / (1 - abar_t)
    """
    alphas = _noise_levels(schedule, timesteps, alpha_end)
    for i, t in enumerate(timesteps):
        now, then = alphas[i], alphas[i + 1]
        t_batch = _batch(z, t)
        x0 = schedule.to_x0(denoise(z, t_batch), z, t_batch)
        ratio = now / then
        z = math.sqrt(then) * (1 - ratio) / (1 - now) * x0 + math.sqrt(ratio) * (1 - then) / (1 - now) * z
        variance = (1 - ratio) * (1 - then) / (1 - now)
        if variance > 0:
            z = z + math.sqrt(variance) * noise_like(z, generator)
        z = _finish(on_step, Step(i, len(timesteps), int(t), then, z, x0))
    return z


# Adams-Bashforth weights, newest first, by the number of predictions available.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def plms(
    denoise: Denoise,
    z: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    *,
    generator: Generators = None,
    on_step: OnStep | None = None,
    alpha_end: float | None = None,
) -> Tensor:
    """Pseudo linear multi-step (PNDM, Liu et al., arXiv:2202.09778), as the original LDM runs it.

    The first step is a pseudo improved Euler step with two evaluations; the later ones combine up to four predictions
    of eps. With one or two steps the first one is that of DDIM: it ends at, or next to, a clean latent, whose noise the
    network cannot tell, so a second evaluation there would spoil it. ValueError if the schedule has abar 0 at the first
    timestep.
    """
    alphas = _noise_levels(schedule, timesteps, alpha_end)
    if alphas[0] <= 0:
        raise ValueError(
            "plms: the schedule has no signal at its first timestep (abar 0); use ddim or dpm_solver_pp_2m"
        )
    history: list[Tensor] = []

    def predict(z: Tensor, t: int) -> Tensor:
        t_batch = _batch(z, t)
        return schedule.to_eps(denoise(z, t_batch), z, t_batch)

    for i, t in enumerate(timesteps):
        history = [predict(z, t), *history[:3]]
        if i == 0 and len(timesteps) > 2:
            euler, _ = _transfer(z, history[0], alphas[0], alphas[1])
            eps = (history[0] + predict(euler, timesteps[1])) / 2
        else:
            weights = ADAMS_BASHFORTH[len(history)]
            eps = weights[0] * history[0]
            for weight, before in zip(weights[1:], history[1:], strict=True):
                eps = eps + weight * before
        z, x0 = _transfer(z, eps, alphas[i], alphas[i + 1])
        z = _finish(on_step, Step(i, len(timesteps), int(t), alphas[i + 1], z, x0))
    return z


def _transfer(z: Tensor, eps: Tensor, now: float, then: float) -> tuple[Tensor, Tensor]:
    """Return the deterministic DDIM step for a given eps: (z_s, x0)."""
    x0 = (z - math.sqrt(1 - now) * eps) / math.sqrt(now)
    return math.sqrt(then) * x0 + math.sqrt(1 - then) * eps, x0


def dpm_solver_pp_2m(
    denoise: Denoise,
    z: Tensor,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    *,
    generator: Generators = None,
    on_step: OnStep | None = None,
    alpha_end: float | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., arXiv:2211.01095, algorithm 2): second order in x0, one evaluation per step.

    z_s = sigma_s / sigma_t z_t + alpha_s (1 - exp(-h)) D, h = lambda_s - lambda_t, lambda = log(alpha / sigma),
    D = (1 + 1 / 2r) x0 - (1 / 2r) x0_before, r = h_before / h.
    The first step is of first order. So is the last one if there are fewer than 15 steps or it ends at sigma 0.
    """
    alphas = _noise_levels(schedule, timesteps, alpha_end)
    log_snr = [_half_log_snr(a) for a in alphas]
    before: Tensor | None = None
    for i, t in enumerate(timesteps):
        now, then, h = alphas[i], alphas[i + 1], log_snr[i + 1] - log_snr[i]
        t_batch = _batch(z, t)
        x0 = schedule.to_x0(denoise(z, t_batch), z, t_batch)
        last = i == len(timesteps) - 1
        combined = x0
        if before is not None and not (last and (len(timesteps) < 15 or then >= 1)):
            weight = h / (2 * (log_snr[i] - log_snr[i - 1]))
            combined = x0 + weight * (x0 - before)
        z = math.sqrt((1 - then) / (1 - now)) * z - math.sqrt(then) * math.expm1(-h) * combined
        before = x0
        z = _finish(on_step, Step(i, len(timesteps), int(t), then, z, x0))
    return z


def _half_log_snr(alpha: float) -> float:
    """Return log(sqrt(abar) / sqrt(1 - abar)), infinite at pure noise and at the clean latent."""
    if alpha <= 0 or alpha >= 1:
        return math.inf if alpha >= 1 else -math.inf
    return 0.5 * math.log(alpha / (1 - alpha))


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "plms": plms,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
}
