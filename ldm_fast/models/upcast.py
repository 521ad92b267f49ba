"""Computing in float32 with weights that stay in float16."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Float32Arithmetic(TorchFunctionMode):
    """While it is entered, an op that is given float32 and float16 tensors casts the latter to float32 first.

    So a model with float16 weights computes in float32 when its input is float32. A weight is cast for the op that uses
    it: no float32 copy of the model exists at any time, and nothing in the model changes, so that other threads may use
    it meanwhile. The mode holds for the thread that enters it.
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
