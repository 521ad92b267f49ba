"""What the UNet is conditioned on, and guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from ldm_fast.diffusion.samplers import Denoise

C = TypeVar("C", Tensor, "Condition")


def classifier_free_guidance(
    model: Callable[[Tensor, Tensor, C], Tensor],
    condition: C,
    uncondition: C | None,
    scale: float,
) -> Denoise:
    """Return denoise(z, t) = model(uncondition) + scale * (model(condition) - model(uncondition)).

    This is eq. 6 of Ho & Salimans (arXiv:2207.12598), with the scale 1 + w there.
    Both halves go through the model in one batched call. At scale 1 the unconditional half has no influence and is not
    computed. ValueError if `uncondition` is None at another scale.
    """
    if scale == 1:
        return lambda z, t: model(z, t, condition)
    if uncondition is None:
        raise ValueError(f"guidance {scale} needs an unconditional input; without one only guidance 1 is possible")
    both = uncondition.cat(condition) if isinstance(uncondition, Condition) else torch.cat([uncondition, condition])

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        without, conditional = model(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return without + scale * (conditional - without)

    return denoise


@dataclass(frozen=True)
class Condition:
    """What a UNet is conditioned on: crossattn (B, L, d), concat (B, C, H, W), adm (B,) labels or (B, d) vectors."""

    crossattn: Tensor | None = None
    concat: Tensor | None = None
    adm: Tensor | None = None

    def __post_init__(self) -> None:
        if len({len(t) for t in self.tensors().values()}) > 1:
            sizes = {name: len(t) for name, t in self.tensors().items()}
            raise ValueError(f"Condition: batch sizes differ: {sizes}")

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are given, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        return Condition(**{name: t[rows] for name, t in self.tensors().items()})

    def to(self, device: torch.device, dtype: torch.dtype) -> Condition:
        """Move to a device, and floating point tensors to a dtype."""
        return Condition(
            **{name: t.to(device, dtype if t.is_floating_point() else None) for name, t in self.tensors().items()}
        )

    def cat(self, other: Condition) -> Condition:
        """Join two batches. ValueError if they do not hold the same kinds of tensors, or shapes differ beyond B."""
        mine, theirs = self.tensors(), other.tensors()
        if mine.keys() != theirs.keys():
            raise ValueError(f"Condition.cat: one has {sorted(mine)}, the other {sorted(theirs)}")
        for name in mine:
            one, another = (tuple(tensors[name].shape) for tensors in (mine, theirs))
            if one[1:] != another[1:]:
                raise ValueError(f"Condition.cat: {name} is {one} in one, {another} in the other; only B may differ")
        return Condition(**{name: torch.cat([t, theirs[name]]) for name, t in mine.items()})


CONDITIONING_KEYS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "crossattn": ("crossattn",),
    "concat": ("concat",),
    "hybrid": ("crossattn", "concat"),
    "adm": ("adm",),
}


def unet_arguments(key: str | None, z_t: Tensor, condition: Condition) -> dict[str, Tensor]:
    """Return the UNet's arguments for a noisy latent z_t (B, C, H, W) under a conditioning key.

    crossattn -> encoder_hidden_states; concat -> channels appended to the sample; hybrid -> both; adm -> class_labels.
    ValueError if the key is unknown, the condition is not exactly what the key needs, or a map has not z_t's size.
    """
    if key not in CONDITIONING_KEYS:
        raise ValueError(
            f"unet_arguments: unknown conditioning key {key!r}; known: {', '.join(map(str, CONDITIONING_KEYS))}"
        )
    given = condition.tensors()
    if given.keys() != set(CONDITIONING_KEYS[key]):
        raise ValueError(f"unet_arguments: key {key!r} needs {list(CONDITIONING_KEYS[key])}, got {sorted(given)}")
    arguments = {"sample": z_t}
    if "concat" in given:
        if given["concat"].shape[2:] != z_t.shape[2:]:
            sizes = [" x ".join(map(str, t.shape[2:])) for t in (given["concat"], z_t)]
            raise ValueError(f"unet_arguments: concat is {sizes[0]}, the latent {sizes[1]}; give a size that fits it")
        arguments["sample"] = torch.cat([z_t, given["concat"].to(z_t.dtype)], dim=1)
    if "crossattn" in given:
        arguments["encoder_hidden_states"] = given["crossattn"]
    if "adm" in given:
        arguments["class_labels"] = given["adm"]
    return arguments
