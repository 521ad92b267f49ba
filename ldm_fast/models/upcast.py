"""Arithmetic in float32 with weights that stay in float16."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Float32Arithmetic(TorchFunctionMode):
    """A mode in which an op that is given float32 and float16 tensors casts the latter to float32 first.

    This makes a model with float16 weights compute in float32 if its input is float32. A weight is cast only for the op
    that uses it, so no float32 copy of the whole model ever exists. Nothing in the model changes, so other threads may
    use it meanwhile. The mode applies only to the thread that enters it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if _has(given, torch.float16) and _has(given, torch.float32):
            args = [_widened(value) for value in args]
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _has(values: Sequence[Any], dtype: torch.dtype) -> bool:
    return any(isinstance(value, Tensor) and value.dtype == dtype for value in values)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value
