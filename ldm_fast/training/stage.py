"""What a stage is to the loop that trains it, and what both stages need for a step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ldm_fast.files.tensors import CheckpointError
from ldm_fast.training.recipe import LoopConfig

M = TypeVar("M", bound=nn.Module)


class Stage(Protocol):
    """What the loop needs of a stage."""

    name: str
    device: torch.device

    def __len__(self) -> int:
        """Return the number of training examples."""

    def modules(self) -> dict[str, nn.Module]:
        """Return everything with weights that a checkpoint must hold, the averaged weights included."""

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers whose state and learning rate belong to the run."""

    def extra(self) -> dict[str, Tensor]:
        """Return other tensors that are part of the state; `restore` writes into them."""

    def step(self, number: int, batches: list[Tensor], generator: torch.Generator) -> dict[str, float]:
        """Do one optimizer step over batches of example numbers; return metrics, "loss" among them."""

    def evaluate(self) -> dict[str, float]:
        """Return metrics on held-out data; must not change the state."""

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return a picture (H, W, 3) uint8 that shows how far training is; must not change the state."""


# The state of a stage


def capture(stage: Stage) -> dict[str, Tensor]:
    """Copy every tensor of a stage's state to the CPU, under flat names; a device may have no room for a copy."""
    tensors: dict[str, Tensor] = {}
    for name, module in stage.modules().items():
        tensors.update({f"weights/{name}/{key}": value for key, value in module.state_dict().items()})
    for name, optimizer in stage.optimizers().items():
        for path, parameter in zip(trained_parameters(stage, optimizer), _parameters(optimizer), strict=True):
            state = optimizer.state.get(parameter, {})
            tensors.update({f"optimizer/{name}/{path}/{key}": value for key, value in state.items()})
    tensors.update({f"extra/{name}": value for name, value in stage.extra().items()})
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def restore(stage: Stage, tensors: dict[str, Tensor]) -> None:
    """Put what `capture` returned back into the stage. CheckpointError if it belongs to another stage or recipe."""
    try:
        for name, module in stage.modules().items():
            module.load_state_dict(under(tensors, f"weights/{name}/"))
        for name, optimizer in stage.optimizers().items():
            _restore_optimizer(optimizer, trained_parameters(stage, optimizer), under(tensors, f"optimizer/{name}/"))
        for name, value in stage.extra().items():
            value.copy_(tensors[f"extra/{name}"])
    except (KeyError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"the checkpoint does not fit the recipe's {stage.name}: {error}") from error


def _restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """State tensors get the memory layout of their parameter: the fused optimizers read both in memory order."""
    params = _parameters(optimizer)
    if all(name.split("/")[0].isdecimal() for name in tensors):  # of an earlier version
        names = numbered(names)
    places = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, key = name.rsplit("/", 1)
        place = places[parameter]
        param = params[place]
        if tensor.ndim:  # all but the number of steps
            if tensor.shape != param.shape:
                raise KeyError(f"{key} of {parameter} is {tuple(tensor.shape)}, must be {tuple(param.shape)}")
            tensor = torch.empty_like(param, memory_format=torch.preserve_format).copy_(tensor)
        state.setdefault(place, {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def trained_parameters(stage: Stage, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return "module/parameter" for each of the optimizer's parameters."""
    names = {p: f"{name}/{key}" for name, module in stage.modules().items() for key, p in module.named_parameters()}
    return [names[p] for p in _parameters(optimizer)]


# Checkpoints of earlier versions hold an optimizer's state by number, in the order that parameters had before they took
# that of diffusers. These are the modules that have moved among their siblings, in the old order.
_MOVED = (
    *("conv_in", "time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj", "encoder"),
    *("down_blocks", "mid_block", "decoder", "up_blocks", "conv_norm_out", "conv_out"),
    *("resnets", "attentions", "downsamplers", "upsamplers"),
    *("to_q", "to_k", "to_v", "to_out", "group_norm"),
    *("quant_conv", "post_quant_conv", "quantize"),
)


def numbered(names: list[str]) -> list[str]:
    """Return for each of these parameters the number, as text, that it had in checkpoints of earlier versions."""
    first: dict[str, int] = {}
    for place, name in enumerate(names):
        parts = name.split("/")[-1].split(".")
        for depth in range(len(parts) + 1):
            first.setdefault(".".join((name.split("/")[0], *parts[:depth])), place)

    def key(name: str) -> list[tuple[int, int]]:
        module, path = name.split("/")
        parts = path.split(".")
        above = [".".join((module, *parts[:depth])) for depth in range(1, len(parts) + 1)]
        ranks = [_MOVED.index(part) if part in _MOVED else -1 for part in parts]
        return [(0, first[module]), *((rank, first[prefix]) for rank, prefix in zip(ranks, above, strict=True))]

    before = {name: str(number) for number, name in enumerate(sorted(names, key=key))}
    return [before[name] for name in names]


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# Random numbers and the order of the examples


def seeded(*what: object) -> torch.Generator:
    """Return a CPU generator whose numbers depend on `what` alone."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def global_seed(generator: torch.Generator) -> int:
    """Draw a seed for PyTorch's global generator, which initialises weights and drives dropout."""
    return int(torch.randint(2**62, (), generator=generator))


class DataOrder:
    """An endless stream of example numbers: a new permutation for every epoch, and any part of it can be asked for."""

    def __init__(self, count: int, *seed: object):
        self.count, self.seed = count, seed
        self._epochs: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = torch.randperm(self.count, generator=seeded(*self.seed, "epoch", epoch))
        return self._epochs[epoch]

    def take(self, start: int, size: int) -> Tensor:
        """Return numbers start ... start + size - 1 of the stream, int64 (size,)."""
        parts = []
        while size > 0:
            epoch, within = divmod(start, self.count)
            part = self._epoch(epoch)[within : within + size]
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return torch.cat(parts)


# What a step is made of


def placed(module: M, device: torch.device, loop: LoopConfig) -> M:
    """Move a module to the device, with convolutions in the memory layout that the recipe asks for."""
    module.to(device)
    if loop.channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this one
    return module


def adamw(params: Iterable[nn.Parameter], loop: LoopConfig, learning_rate: float | None = None) -> torch.optim.AdamW:
    """Make the recipe's optimizer (Loshchilov & Hutter, arXiv:1711.05101), by default with its learning rate."""
    rate = learning_rate or loop.learning_rate
    return torch.optim.AdamW(params, lr=rate, betas=loop.betas, weight_decay=loop.weight_decay, fused=True)


def mixed_precision(device: torch.device, loop: LoopConfig) -> torch.autocast:
    """Return the context in which a stage's networks compute."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=loop.precision == "bf16")


def update_weights(optimizer: torch.optim.Optimizer, clip: float | None) -> Tensor:
    """Clip the gradients' norm, step, and drop the gradients. Return the norm before clipping."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, math.inf if clip is None else clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
