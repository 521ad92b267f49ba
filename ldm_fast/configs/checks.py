"""Checks of numbers that several configurations and arguments share."""

from __future__ import annotations

import numbers
import operator
from typing import Any


def whole_number(name: str, value: Any) -> int:
    """Return `value`, of any integer type, as an int. TypeError if it is not a whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def check_number(name: str, value: Any) -> None:
    """TypeError if `value` is not a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_positive(config: Any, *names: str) -> None:
    """ValueError if one of these fields of a configuration is not a whole number above 0."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(config).__name__}: {name} must be a positive number, got {value!r}")


def check_seed(seed: Any, count: int = 1) -> int:
    """Return the first of `count` seeds in a row. ValueError if one of them does not fit in 32 bits.

    PyTorch's generator on the CPU looks at no more, so two larger seeds could silently be the same.
    """
    first, highest = whole_number("seed", seed), (1 << 32) - count
    if not 0 <= first <= highest:
        raise ValueError(f"seed must be between 0 and {highest}, got {seed}")
    return first
