"""`ldm_fast.explain()`: which implementation each op would run here, and why not a better one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ldm_fast.ops.dispatch import IMPLEMENTATIONS, consider
from ldm_fast.ops.op import OPS


@dataclass(frozen=True)
class Choice:
    """Who runs one op on one device, forward and backward, and who was considered before, with the reason it cannot.

    `chosen` is None if nobody can, as inside a `use_impl` that names an implementation for other machines.
    """

    op: str
    device: str
    chosen: str | None
    passed_over: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layer:
    """A layer of a model that code of others computes in our place, and which."""

    name: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """One `Choice` for each op and device, and the layers of a model that are not ours; prints as a table."""

    choices: tuple[Choice, ...]
    layers: tuple[Layer, ...] = ()

    def __str__(self) -> str:
        lines = []
        for choice in self.choices:
            lines.append(f"{choice.op} on {choice.device}: {choice.chosen or 'cannot run'}")
            lines += [f"    not {name}: {reason}" for name, reason in choice.passed_over]
        return "\n".join([*lines, *(f"not ours: {layer.name}: {layer.reason}" for layer in self.layers)])


def explain(subject: torch.dtype | nn.Module = torch.float32) -> Explanation:
    """Return which implementation each op would run for ordinary inputs of a dtype, and why not a better one.

    It asks the function that chooses when an op runs, on the CPU and, if there is one, on the GPU. Inside
    `use_impl(name)` it says what runs there. Of a model, which gives the dtype, it also names the layers that code of
    others computes: attention with a processor of its own, or with an exchanged `forward`.
    """
    if isinstance(subject, nn.Module):
        dtype = next((p.dtype for p in subject.parameters() if p.is_floating_point()), torch.float32)
        asked = {name: module.not_ours() for name, module in subject.named_modules() if hasattr(module, "not_ours")}
        layers = tuple(Layer(name, reason) for name, reason in asked.items() if reason is not None)
    elif isinstance(subject, torch.dtype):
        dtype, layers = subject, ()
    else:
        raise TypeError(f"explain: subject must be a dtype or a model, got {type(subject).__name__}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return Explanation(tuple(_choice(op, device, dtype) for device in devices for op in IMPLEMENTATIONS), layers)


def _choice(op: str, device: str, dtype: torch.dtype) -> Choice:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    ordinary = OPS[op].ordinary
    if ordinary is None:
        raise NotImplementedError(f"explain: {op} does not say what ordinary arguments are")
    chosen, passed_over = consider(op, None, ordinary(zeros))
    return Choice(op, device, chosen, tuple(passed_over))
