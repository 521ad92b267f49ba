"""Exponential moving averages of weights, with the warm-up of the published models."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def decay_at(update: int, decay: float) -> float:
    """min(decay, (1 + n) / (10 + n)) for the n-th update, n = 0, 1, ...: early averages forget the random start."""
    return min(decay, (1 + update) / (10 + update))


class Ema(Generic[M]):
    """A copy of a module, `module`, that holds averages of its weights. Buffers are copied, not averaged."""

    def __init__(self, followed: M, decay: float):
        self.followed = followed
        self.decay = decay
        self.module = copy.deepcopy(followed).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, update: int) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        averages: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(self.followed.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay_at(update, self.decay))
        for mine, theirs in zip(self.module.buffers(), self.followed.buffers(), strict=True):
            mine.copy_(theirs)
