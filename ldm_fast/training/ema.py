"""Exponential moving average of weights, with the warm-up of the published models."""

from __future__ import annotations

import copy

import torch
from torch import nn


def decay_at(update: int, decay: float) -> float:
    """min(decay, (1 + n) / (10 + n)) for the n-th update, n = 0, 1, ...: early averages forget the random start."""
    return min(decay, (1 + update) / (10 + update))


class Ema:
    """`module` is a copy of the followed one that holds the averaged weights; buffers are copied, not averaged."""

    def __init__(self, followed: nn.Module, decay: float):
        self.followed = followed
        self.decay = decay
        self.module = copy.deepcopy(followed).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, update: int) -> None:
        """average <- decay * average + (1 - decay) * weights."""
        averages, weights = list(self.module.parameters()), list(self.followed.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay_at(update, self.decay))
        for mine, theirs in zip(self.module.buffers(), self.followed.buffers(), strict=True):
            mine.copy_(theirs)
