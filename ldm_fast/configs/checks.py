"""Checks that several configurations share."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


import numbers


def whole_number(name: str, value: Any) -> int:
    """An int, of whatever type it is. TypeError for what is no whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def check_positive(config: Any, *names: str) -> None:
    """ValueError where one of these fields of a configuration is not a whole number above 0."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(config).__name__}: {name} must be a positive number, got {value!r}")


def check_seed(seed: int, count: int = 1) -> int:
    """PyTorch's CPU generator tells seeds apart by 32 bits; two larger ones could silently be the same."""
    seed = whole_number("seed", seed)
    if not 0 <= seed <= 2**32 - count:
        raise ValueError(f"seed must be between 0 and {2**32 - count}, got {seed}")
    return seed


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
