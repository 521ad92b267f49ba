"""Gradient checkpointing (arXiv:1604.06174): a block keeps its inputs alone, and its inside is computed twice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module, *inputs: Any) -> Any:
    """Return module(*inputs), of which only the inputs are kept for the backward pass; that computes the rest again."""
    return checkpoint(module, *inputs, use_reentrant=False)


class Recomputed(nn.Module):
    """A module that computes its parts twice, if asked to, instead of storing what is inside them."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any] = staticmethod(recompute)

    def _run(self, module: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
        """Return module(*inputs, **keywords)."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return module(*inputs, **keywords)
        return self._gradient_checkpointing_func(functools.partial(module, **keywords) if keywords else module, *inputs)


def set_recompute(model: nn.Module, enabled: bool, function: Callable[..., Any] | None) -> None:
    """Switch every `Recomputed` module in the model on or off; `function(module, *inputs)` takes the place of ours."""
    for module in model.modules():
        if isinstance(module, Recomputed):
            module.gradient_checkpointing = enabled
            module._gradient_checkpointing_func = function or recompute
