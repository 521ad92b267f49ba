"""`ldm_fast.explain()`: which implementation each op would run here, and why not a better one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldm_fast.ops.dispatch import IMPLEMENTATIONS, why_not


@dataclass(frozen=True)
class Choice:
    """One op on one device: who runs it, both ways, and the better ones that cannot, with the reason of each."""

    op: str
    device: str
    chosen: str
    passed_over: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Explanation:
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        lines = []
        for choice in self.choices:
            lines.append(f"{choice.op} on {choice.device}: {choice.chosen}")
            lines += [f"    not {name}: {reason}" for name, reason in choice.passed_over]
        return "\n".join(lines)


def explain(dtype: torch.dtype = torch.float32) -> Explanation:
    """What each op would run for ordinary inputs of `dtype`, on the CPU and, where there is one, on the GPU.

    Returns an object that prints as a table; `.choices` holds one `Choice` for each op and device.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return Explanation(tuple(_choice(op, device, dtype) for device in devices for op in IMPLEMENTATIONS))


def _choice(op: str, device: str, dtype: torch.dtype) -> Choice:
    arguments = _ordinary_arguments(op, device, dtype)
    passed_over = []
    for name in IMPLEMENTATIONS[op]:
        reason = why_not(op, name, arguments)
        if reason is None:
            break
        passed_over.append((name, reason))
    return Choice(op, device, name, tuple(passed_over))


def _ordinary_arguments(op: str, device: str, dtype: torch.dtype) -> tuple[object, ...]:
    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    if op == "attention":
        return tensor(1, 2, 16, 40), tensor(1, 2, 77, 40), tensor(1, 2, 77, 40), None, 40**-0.5
    if op == "group_norm_silu":
        return tensor(1, 64, 8, 8), 32, tensor(64), tensor(64), 1e-5, "silu", None, None
    if op == "group_norm_stats":
        return tensor(1, 64, 8, 8), 32
    if op == "group_norm_apply":
        stats = tensor(1, 32, 3).double()
        return tensor(1, 64, 8, 8), stats, 32, tensor(64), tensor(64), 1e-5, "silu", None, None
    return tensor(1, 16, 4), tensor(32, 4)
