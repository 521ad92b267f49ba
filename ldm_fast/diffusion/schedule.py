"""The forward process q(z_t | z_0), noise schedules, parameterisations and the training target.

Notation of Ho et al. (arXiv:2006.11239): β_t, α_t = 1 - β_t, ᾱ_t = Π α_s, z_t = √ᾱ_t z_0 + √(1 - ᾱ_t) ε.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm_fast.configs.diffusion import SCHEDULES, DiffusionConfig


def beta_schedule(name: str, steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Return β_1 … β_T, float64 (steps,) on the CPU.

    "scaled_linear" is linear in √β; the LDM code calls it "linear". "linear" is linear in β; the LDM code calls it
    "sqrt_linear". "cosine" is that of Nichol & Dhariwal (arXiv:2102.09672) and ignores start and end. "sqrt" is the
    square root of a linear schedule.

    Raises:
        ValueError: unknown name, or steps < 1.
    """
    if steps < 1:
        raise ValueError(f"beta_schedule: steps must be at least 1, got {steps}")
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64, device="cpu") ** 2
    if name == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")
    if name == "sqrt":
        return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu") ** 0.5
    if name == "cosine":
        s = 0.008
        t = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        alphas_cumprod = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999)
    raise ValueError(f"beta_schedule: name must be one of {', '.join(SCHEDULES)}, got {name!r}")


@dataclass(frozen=True)
class NoiseSchedule:
    """q(z_t | z_0) and the conversions between ε, z_0 and v. `t` is always a (B,) tensor of integers in [0, T).

    `alphas_cumprod` is ᾱ_t, float64 (T,) on the CPU.
    """

    config: DiffusionConfig = field(default_factory=DiffusionConfig)
    alphas_cumprod: Tensor = field(init=False, repr=False, compare=False)
    _signal_and_noise: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)  # √ᾱ_t and √(1 - ᾱ_t)

    def __post_init__(self) -> None:
        config = self.config
        betas = beta_schedule(config.schedule, config.num_train_timesteps, config.beta_start, config.beta_end)
        alphas_cumprod = (1 - betas).cumprod(0)
        if config.zero_terminal_snr:
            alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)
        object.__setattr__(self, "_signal_and_noise", (alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()))

    @property
    def num_train_timesteps(self) -> int:
        return self.config.num_train_timesteps

    @property
    def prediction_type(self) -> str:
        return self.config.prediction_type

    def _at(self, t: Tensor, table: Tensor) -> Tensor:
        """Return the values of table (T,) at t (B,), on t's device.

        The range of t is not checked if reading t would wait for a device or break a graph that is being compiled.
        """
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"NoiseSchedule: t must hold integers, got {t.dtype}")
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = (t < 0) | (t >= self.num_train_timesteps)
            if outside.any():
                raise ValueError(f"NoiseSchedule: t must lie in [0, {self.num_train_timesteps}), got {t.tolist()}")
        return _to(table, t.device)[t.long()]

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return √ᾱ_t and √(1 - ᾱ_t), each (B, 1, 1, …) to multiply `like`, in its dtype and on its device.

        TypeError if t does not hold integers, ValueError if it is on the CPU and out of range.
        """
        shape = (-1, *(1,) * (like.ndim - 1))
        signal, noise = (_to(self._at(t, table.to(like.dtype)), like.device) for table in self._signal_and_noise)
        return signal.reshape(shape), noise.reshape(shape)

    def add_noise(self, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return a sample of q(z_t | z_0)."""
        signal, sigma = self.signal_and_noise(t, z_0)
        return signal * z_0 + sigma * noise

    def target(self, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network is to predict: ε, z_0 or v = √ᾱ ε - √(1 - ᾱ) z_0 (arXiv:2202.00512)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return z_0
        signal, sigma = self.signal_and_noise(t, z_0)
        return signal * noise - sigma * z_0

    def to_x0(self, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the z_0 that a prediction implies."""
        if self.prediction_type == "sample":
            return prediction
        signal, sigma = self.signal_and_noise(t, z_t)
        if self.prediction_type == "epsilon":
            return (z_t - sigma * prediction) / signal
        return signal * z_t - sigma * prediction

    def to_eps(self, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the ε that a prediction implies."""
        if self.prediction_type == "epsilon":
            return prediction
        signal, sigma = self.signal_and_noise(t, z_t)
        if self.prediction_type == "sample":
            return (z_t - signal * prediction) / sigma
        return signal * prediction + sigma * z_t

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Return the weight of each sample's loss, (B,) float32: min(SNR, γ) over the weight that it already has.

        Hang et al., arXiv:2303.09556: min(SNR, γ) for z_0, divided by SNR for ε and by SNR + 1 for v.
        """
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        clipped = snr.clamp(max=gamma)
        divisor = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}[self.prediction_type]
        return self._at(t, (clipped / divisor).float())


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it, which is safe: the source is ordinary memory that nobody changes."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def _zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift √ᾱ so that the last is 0, and scale it so that the first stays (arXiv:2305.08891, algorithm 1)."""
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


Generators = torch.Generator | Sequence[torch.Generator] | None


def noise_like(z: Tensor, generator: Generators = None) -> Tensor:
    """Draw standard normal noise of z's shape, dtype and device.

    With one generator per image, image i's noise depends on generator i alone, whatever the batch size. Numbers are
    drawn on the generator's device, so a CPU generator gives the same noise on every device.
    """
    if generator is None:
        return torch.randn_like(z)
    if isinstance(generator, torch.Generator):
        return torch.randn(z.shape, generator=generator, dtype=z.dtype, device=generator.device).to(z.device)
    if len(generator) != len(z):
        raise ValueError(f"noise_like: {len(generator)} generators for a batch of {len(z)}; one per image is needed")
    return torch.stack([noise_like(image, g) for image, g in zip(z, generator, strict=True)])
