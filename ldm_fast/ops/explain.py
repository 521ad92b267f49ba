"""`ldm_fast.explain()`: which implementation each op would run here, and why not a better one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
class Explanation:
    """One `Choice` for each op and device; prints as a table."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        lines = []
        for choice in self.choices:
            lines.append(f"{choice.op} on {choice.device}: {choice.chosen or 'cannot run'}")
            lines += [f"    not {name}: {reason}" for name, reason in choice.passed_over]
        return "\n".join(lines)


def explain(dtype: torch.dtype = torch.float32) -> Explanation:
    """Return which implementation each op would run for ordinary inputs of `dtype`, and why not a better one.

    It asks the function that chooses when an op runs, on the CPU and, if there is one, on the GPU. Inside
    `use_impl(name)` it says what runs there.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return Explanation(tuple(_choice(op, device, dtype) for device in devices for op in IMPLEMENTATIONS))


def _choice(op: str, device: str, dtype: torch.dtype) -> Choice:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    ordinary = OPS[op].ordinary
    if ordinary is None:
        raise NotImplementedError(f"explain: {op} does not say what ordinary arguments are")
    chosen, passed_over = consider(op, None, ordinary(zeros))
    return Choice(op, device, chosen, tuple(passed_over))
