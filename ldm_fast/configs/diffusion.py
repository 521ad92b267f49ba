"""Configurations of the noise schedule, and of how a model is sampled by default."""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULES = ("scaled_linear", "linear", "cosine", "sqrt")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class DiffusionConfig:
    """A noise schedule and what the network predicts. The defaults are those of Stable Diffusion 1.x.

    `zero_terminal_snr` rescales the schedule so that z_T is pure noise (Lin et al., arXiv:2305.08891). It needs
    prediction_type "v_prediction" or "sample", since ε at T tells nothing about z_0.
    """

    schedule: str = "scaled_linear"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"DiffusionConfig: schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"DiffusionConfig: prediction_type must be one of {', '.join(PREDICTION_TYPES)}, "
                f"got {self.prediction_type!r}"
            )
        for name in ("beta_start", "beta_end"):
            if not 0 < getattr(self, name) < 1:  # shares of the variance: anything else gives roots of negative numbers
                raise ValueError(f"DiffusionConfig: {name} must be between 0 and 1, got {getattr(self, name)}")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError("DiffusionConfig: zero_terminal_snr needs prediction_type v_prediction or sample")


@dataclass(frozen=True)
class Defaults:
    """The settings a model samples best with: stored with it, and used by `generate` unless told otherwise."""

    steps: int = 25
    guidance: float = 3.0
    sampler: str = "ddim"
    eta: float = 0.0
    spacing: str = "trailing"
