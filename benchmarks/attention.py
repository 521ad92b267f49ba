"""Time attention against PyTorch: scaled_dot_product_attention, its flash and math variants, and three eager ops.

    python benchmarks/attention.py [--dtype bfloat16] [--shape 4096x77x40] [--backward] [--compile]

The shapes are those of Stable Diffusion 1.x and XL at batch 2 and of a first stage at 512². A result counts as right if
its error against float64 is at most twice that of scaled_dot_product_attention in the same dtype, plus rounding. On
Linux each forward row on the CPU ends with how much one call raises the memory of the process, including the result.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _eager import attention as sdpa
from _harness import OURS, Bench, add_impl_option, implementation, judge, largest_error, parser, too_large
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_fast import ops
from ldm_fast.ops.cases import TOLERANCE, Attention, bytes_moved, flops, make_inputs

TINY = (Attention(2, 2, 33, 77, 40, layout="heads_last"), Attention(1, 1, 40, 40, 64, layout="heads_last"))
PEER_SLACK = 64  # times TOLERANCE: how far off a peer may be; it may compute the softmax in its inputs' dtype


def sdpa_by(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return attention


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def exact(q: Tensor, k: Tensor, v: Tensor, *, mask: None = None, scale: None = None) -> Tensor:
    """Compute attention in float64, one head at a time. Returns (B, H, N, D)."""
    q, k, v = (t.double() for t in (q, k, v))
    heads = [[eager(*(t[b, h] for t in (q, k, v))) for h in range(q.shape[1])] for b in range(q.shape[0])]
    return torch.stack([torch.stack(row) for row in heads])


def peers(bench: Bench, case: Attention, dtype: torch.dtype) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """Return the peers that can run this case and, for the others, why they cannot."""
    found: dict[str, Callable[..., Tensor]] = {"SDPA": sdpa, "SDPA flash": sdpa_by(SDPBackend.FLASH_ATTENTION)}
    if bench.device.type == "cuda":
        found["SDPA efficient"] = sdpa_by(SDPBackend.EFFICIENT_ATTENTION)
        found["SDPA cuDNN"] = sdpa_by(SDPBackend.CUDNN_ATTENTION)
    found |= {"SDPA math": sdpa_by(SDPBackend.MATH), "eager": eager}
    if bench.options.compile:
        found["eager, torch.compile"] = torch.compile(eager)
    scores = case.B * case.H * case.N * case.M
    reason = too_large(3 * scores * 4, bench.device)
    skipped = {name: reason for name in found if "eager" in name or "math" in name} if reason else {}
    return {name: function for name, function in found.items() if name not in skipped}, skipped


def extra_memory(contender: Callable[[], Tensor]) -> float:
    """Return how many MB the memory of this process grows at most during one call."""

    def memory(which: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # otherwise, memory that malloc keeps would be reused unnoticed
    Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak
    before = memory("VmRSS")
    contender()
    return max(0, memory("VmHWM") - before) / 1e6


def report_memory(row: dict[str, Any], contenders: dict[str, Callable[[], Tensor]]) -> None:
    """Measure the memory of the contenders that were timed, and add it to their figures as "extra_mb"."""
    for name, figures in row["contenders"].items():
        figures["extra_mb"] = extra_memory(contenders[name])
    extra = ", ".join(f"{name} {figures['extra_mb']:.0f} MB" for name, figures in row["contenders"].items())
    print(f"  peak memory beyond that of the inputs: {extra}", flush=True)


def forward_row(bench: Bench, case: Attention, dtype: torch.dtype) -> None:
    inputs = make_inputs("attention", case, dtype, bench.device)
    q, k, v = (inputs[key] for key in "qkv")
    who = implementation("attention", bench.options.impl, q, k, v, None, case.D**-0.5)
    functions, skipped = peers(bench, case, dtype)
    truth = exact(q, k, v)
    allowed = 2 * largest_error(sdpa(q, k, v), truth) + TOLERANCE[dtype]

    def verify(name: str, out: Tensor) -> object:
        return judge({"out": largest_error(out, truth)}, allowed if name == OURS else PEER_SLACK * TOLERANCE[dtype])

    contenders = {OURS: lambda: ops.attention(q, k, v, impl=bench.options.impl)}
    contenders |= {name: lambda function=function: function(q, k, v) for name, function in functions.items()}
    bench.row(
        str(case),
        str(dtype).removeprefix("torch."),
        contenders,
        verify,
        implementation=who,
        flops=flops("attention", case),
        moved=bytes_moved("attention", case, dtype),
        skipped=skipped,
    )
    if bench.device.type == "cpu" and sys.platform == "linux":
        report_memory(bench.rows[-1], contenders)


def backward_row(bench: Bench, case: Attention, dtype: torch.dtype) -> None:
    """Time only the backward pass. It has five matrix products; the forward pass has two."""
    functions, skipped = peers(bench, case, dtype)
    leaves = [make_inputs("attention", case, dtype, bench.device)[key].detach().requires_grad_() for key in "qkv"]
    who = implementation("attention", bench.options.impl, *leaves, None, case.D**-0.5)
    grad = torch.randn(case.B, case.N, case.H, case.D, device=bench.device).to(dtype).transpose(1, 2)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(exact(*doubles), doubles, grad.double())

    def backward(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        out = function(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def errors(gradients: tuple[Tensor, ...]) -> dict[str, float]:
        return {name: largest_error(g, t) for name, g, t in zip(("dq", "dk", "dv"), gradients, truth, strict=True)}

    allowed = 2 * max(errors(backward(sdpa)()).values()) + TOLERANCE[dtype]

    def verify(name: str, gradients: tuple[Tensor, ...]) -> object:
        return judge(errors(gradients), allowed if name == OURS else PEER_SLACK * TOLERANCE[dtype])

    contenders = {OURS: backward(lambda q, k, v: ops.attention(q, k, v, impl=bench.options.impl))}
    contenders |= {name: backward(function) for name, function in functions.items()}
    bench.row(
        f"{case} backward",
        str(dtype).removeprefix("torch."),
        contenders,
        verify,
        implementation=who,
        flops=flops("attention", case) * 5 // 2,
        moved=2 * bytes_moved("attention", case, dtype),
        skipped=skipped,
    )


def main(arguments: list[str] | None = None) -> int:
    p = parser(__doc__, dtypes=("float32", "bfloat16"))
    add_impl_option(p, "attention")
    p.add_argument("--backward", action="store_true", help="also time the backward pass of each shape")
    bench = Bench("attention", p.parse_args(arguments))
    for case in bench.cases("attention", TINY):
        for dtype in bench.options.dtype:
            with torch.no_grad():
                forward_row(bench, case, getattr(torch, dtype))
            if bench.options.backward:
                backward_row(bench, case, getattr(torch, dtype))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
