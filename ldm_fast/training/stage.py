"""What a stage is to the loop that trains it."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Stage(Protocol):
    """What the loop needs of a stage."""

    name: str
    device: torch.device

    def __len__(self) -> int:
        """The number of training examples."""

    def modules(self) -> dict[str, nn.Module]:
        """Everything with weights that a checkpoint must hold, EMA included."""

    def optimizers(self) -> dict[str, torch.optim.Optimizer]: ...

    def extra(self) -> dict[str, Tensor]:
        """Other tensors that are part of the state; restored in place."""

    def step(self, number: int, batches: list[Tensor], generator: torch.Generator) -> dict[str, float]:
        """One optimiser step over batches of example numbers; returns metrics, "loss" among them."""

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out data; must not change the state."""

    def sample(self, generator: torch.Generator) -> Tensor:
        """A picture uint8 (H, W, 3) that shows how far training is; must not change the state."""


def seeded(*what: Any) -> torch.Generator:
    """A CPU generator whose numbers depend on `what` alone."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class DataOrder:
    """An endless stream of example numbers, every epoch a new permutation; any part of it can be asked for."""

    def __init__(self, count: int, *seed: Any):
        self.count, self.seed = count, seed
        self._epochs: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = torch.randperm(self.count, generator=seeded(*self.seed, "epoch", epoch))
        return self._epochs[epoch]

    def take(self, start: int, size: int) -> Tensor:
        """Numbers start ... start + size - 1 of the stream, int64 (size,)."""
        parts = []
        while size > 0:
            epoch, within = divmod(start, self.count)
            part = self._epoch(epoch)[within : within + size]
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return torch.cat(parts)


def update_weights(optimizer: torch.optim.Optimizer, clip: float | None) -> Tensor:
    """Clips the gradients' norm, steps and forgets the gradients. Returns the norm as it was."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, math.inf if clip is None else clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
