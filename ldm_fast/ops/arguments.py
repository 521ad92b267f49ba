"""The arguments that several ops share, as one record: a new argument is a new field here.

The public functions fill it, the registered op takes its fields, and every implementation gets it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """The checked arguments of group_norm_silu; its two halves and its backward pass take them, too."""

    x: Tensor  # (B, C, *spatial), contiguous or channels_last
    num_groups: int
    weight: Tensor | None = None  # (C,)
    bias: Tensor | None = None  # (C,)
    eps: float = 1e-5
    activation: str | None = None  # "silu"
    scale: Tensor | None = None  # (B, C)
    shift: Tensor | None = None  # (B, C)

    @property
    def width(self) -> int:
        """Return the channels of a group."""
        return self.x.shape[1] // self.num_groups

    @property
    def vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return weight, bias, scale and shift."""
        return self.weight, self.bias, self.scale, self.shift
