"""The arguments that several ops share, as one record: a new argument is a new field here.

The record goes from the public function through the registered op, as fields in this order, to every implementation.
"""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

from torch import Tensor


class Norm(NamedTuple):
    """The checked arguments of group_norm_silu; its two halves and its backward pass take them, too."""

    x: Tensor  # (B, C, *spatial), contiguous or channels_last
    num_groups: int
    weight: Tensor | None = None  # (C,)
    bias: Tensor | None = None  # (C,)
    eps: float = 1e-5
    activation: str = ""  # "silu" or "" for none
    scale: Tensor | None = None  # (B, C)
    shift: Tensor | None = None  # (B, C)

    @property
    def width(self) -> int:
        """The channels of a group."""
        return self.x.shape[1] // self.num_groups

    @property
    def vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """weight, bias, scale and shift."""
        return self.weight, self.bias, self.scale, self.shift


_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", str: "str"}


def schema(record: type[tuple[object, ...]]) -> str:
    """Return the fields of a record as `torch.library` writes the arguments of an op."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(record).items())
