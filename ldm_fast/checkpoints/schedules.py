"""What a checkpoint says of its noise schedule, its parameterisation and its scaling factor.

Checkpoints of the original code hold the schedule as tables, sometimes in half precision, and programs that merge
models leave marks (`v_pred`, `ztsnr`). A table is recognised within the rounding of the dtype that it went through. One
that belongs to no schedule of ours is refused: no other schedule takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm_fast.checkpoints.found import NO_SCHEDULE, Found
from ldm_fast.checkpoints.published import PUBLISHED
from ldm_fast.configs.diffusion import SCHEDULES, DiffusionConfig
from ldm_fast.diffusion.schedule import NoiseSchedule

DDPM = DiffusionConfig(schedule="linear", beta_start=0.0001, beta_end=0.02)
MARKS = ("v_pred", "ztsnr")
PLAIN_ROUNDING = 0.55  # of the distance between neighbours, and a little for the arithmetic before
COMPUTED = 1e-4  # how much float32, step by step, may change the numbers of a table


class Table(NamedTuple):
    """How a table is made of ᾱ, and ᾱ of the table."""

    of: Callable[[Tensor], Tensor]
    alphas_cumprod: Callable[[Tensor], Tensor]


# The tables that tell a schedule. The first one in a file is read, and the others are compared with it.
TABLES = {
    "betas": Table(lambda a: 1 - a / torch.cat([a.new_ones(1), a[:-1]]), lambda betas: (1 - betas).cumprod(0)),
    "alphas_cumprod": Table(lambda a: a, lambda a: a),
    "sqrt_alphas_cumprod": Table(lambda a: a.sqrt(), lambda signal: signal**2),
    "sqrt_one_minus_alphas_cumprod": Table(lambda a: (1 - a).sqrt(), lambda noise: 1 - noise**2),
    "denoiser.sigmas": Table(lambda a: ((1 - a) / a).sqrt(), lambda sigmas: 1 / (1 + sigmas**2)),
    "denoiser.log_sigmas": Table(lambda a: ((1 - a) / a).log() / 2, lambda logs: 1 / (1 + (2 * logs).exp())),
}


def note_schedule(found: Found, tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> None:
    """Put into `found` what the file itself says about noise schedule, parameterisation and scaling factor.

    others: what stands beside the state dict in its file.
    """
    if "unet" not in found.parts:
        return
    _note_scaling_factor(found, tensors.get("scale_factor"))
    found.marks = [mark for mark in MARKS if mark in tensors]
    usual = found.schedule or DiffusionConfig()
    prediction, zero_terminal_snr = usual.prediction_type, usual.zero_terminal_snr
    if found.marks:  # a network that predicts the noise cannot start from pure noise: ztsnr says v-prediction, too
        prediction, zero_terminal_snr = "v_prediction", "ztsnr" in found.marks
    elif found.model == "Stable Diffusion 2.x":
        # The base model and the one for v-prediction have the same shapes; the number of steps tells them apart.
        prediction = "epsilon" if others.get("global_step") == 875000 else prediction
        found.assumed.append(f"prediction type {prediction}")
    usual = replace(usual, prediction_type=prediction, zero_terminal_snr=zero_terminal_snr)
    if any(name in tensors for name in TABLES):
        found.schedule = _stored_schedule(found, tensors, usual)
    else:
        found.schedule = usual
        found.assumed.append("noise schedule")


def _note_scaling_factor(found: Found, stored: Tensor | None) -> None:
    """Take the file's factor; if it is a published one but for rounding, that."""
    if stored is None:
        found.assumed.append(f"scaling factor {found.scaling_factor}")
        return
    value = float(stored)
    known = (found.scaling_factor, *(row.scaling_factor for row in PUBLISHED))
    tolerance = max(_rounding(stored.reshape(1)) / 2, 1e-6) * abs(value)
    found.scaling_factor = next((factor for factor in known if abs(factor - value) <= tolerance), value)


def _stored_schedule(found: Found, tensors: Mapping[str, Tensor], usual: DiffusionConfig) -> DiffusionConfig | None:
    """Return the schedule of the file's tables; None, with the reason in `found.ignored`, if we do not have it."""
    first, *others = (name for name in TABLES if name in tensors)
    config = _recognise(first, tensors[first], usual)
    if config is None:
        dtype, shape = str(tensors[first].dtype).removeprefix("torch."), tuple(tensors[first].shape)
        found.ignored[NO_SCHEDULE] = [f"the file's {first}, {dtype} {shape}, belong to none of {', '.join(SCHEDULES)}"]
        return None
    for other in others:
        if _misfit(config, other, tensors[other]) > 1:
            found.assumed.append(f"noise schedule of the file's {first}, which its {other} contradict")
    if config.prediction_type != usual.prediction_type:
        found.assumed.append(f"prediction type {config.prediction_type}, because the schedule ends in pure noise")
    return config


def _recognise(name: str, stored: Tensor, usual: DiffusionConfig) -> DiffusionConfig | None:
    """Return the schedule with this table, with the rest of `usual`; None if it is none of ours.

    A file that is marked ztsnr may hold the table before or after it was rescaled.
    """
    if stored.is_meta or stored.ndim != 1 or len(stored) == 0 or not stored.is_floating_point():
        return None
    v = "v_prediction" if usual.prediction_type == "epsilon" else usual.prediction_type
    plain = list(_candidates(name, stored, usual))
    rescaled = [replace(config, zero_terminal_snr=True, prediction_type=v) for config in plain]
    # The first that explains the table by plain rounding, or else the nearest.
    best = min(plain + rescaled, key=lambda config: max(_misfit(config, name, stored), PLAIN_ROUNDING))
    if _misfit(best, name, stored) > 1:
        return None
    return replace(best, zero_terminal_snr=best.zero_terminal_snr or usual.zero_terminal_snr)


def _candidates(name: str, stored: Tensor, usual: DiffusionConfig) -> Iterator[DiffusionConfig]:
    """Yield the schedules of that many steps which this table may be of.

    The ends of betas are read from them. Those of other tables are small differences of large numbers, so published
    schedules are tried first.
    """
    betas = TABLES["betas"].of(TABLES[name].alphas_cumprod(_in_order(name, stored)))
    exact = name == "betas"
    tolerance = max(_rounding(stored) / 2, 1e-6)
    start, end = (_shortest(float(b), tolerance * (float(b) if exact else 1)) for b in (betas[0], betas[-1]))
    first, last = (_shortest(float(b) ** 2, 2 * tolerance * float(b) ** 2) for b in (betas[0], betas[-1]))
    read = [("scaled_linear", start, end), ("linear", start, end), ("sqrt", first, last), ("cosine", 0.00085, 0.012)]
    rows = (usual, *(row.schedule for row in PUBLISHED), DDPM)
    known = [(row.schedule, row.beta_start, row.beta_end) for row in rows]
    for schedule, first, last in dict.fromkeys(read + known if exact else known + read):
        if 0 < first < 1 and 0 < last < 1:
            yield replace(
                usual,
                schedule=schedule,
                num_train_timesteps=len(betas),
                beta_start=first,
                beta_end=last,
                zero_terminal_snr=False,
            )


def _misfit(config: DiffusionConfig, name: str, stored: Tensor) -> float:
    """Return how far a table is from that of a schedule, as a multiple of what rounding may have done."""
    table = TABLES[name].of(NoiseSchedule(config).alphas_cumprod)
    if stored.shape != table.shape or stored.is_meta:
        return math.inf
    found = _in_order(name, stored)
    rounding = max(_rounding(stored), COMPUTED)
    allowed = rounding * table.abs() + (rounding if name == "denoiser.log_sigmas" else 1e-6)
    misfit = torch.where(found == table, 0.0, (found - table).abs() / allowed).max()
    return math.inf if misfit.isnan() else float(misfit)


def _in_order(name: str, stored: Tensor) -> Tensor:
    """Return a table in float64, from the first timestep to the last; sigmas may be stored from the last one on."""
    table = stored.double()
    return table.flip(0) if "sigmas" in name and table[0] > table[-1] else table


def _rounding(stored: Tensor) -> float:
    """Return the relative distance of neighbours in the narrowest dtype that holds these numbers exactly.

    A table that was once in half precision stays rounded when it is stored in float32 later.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(stored.to(dtype).double(), stored.double()):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float32).eps


def _shortest(value: float, tolerance: float) -> float:
    """Return the number of fewest decimal digits that is within the tolerance."""
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next((number for number in rounded if abs(number - value) <= tolerance), value)
