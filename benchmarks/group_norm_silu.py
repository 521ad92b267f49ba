"""Time group_norm_silu against PyTorch's group_norm followed by silu, in both memory layouts, forward and backward.

    python benchmarks/group_norm_silu.py [--dtype float32] [--shape channels_last] [--backward] [--compile]

The shapes are those of Stable Diffusion 1.x at batch 2 and of a first stage at 512². A result counts as right if its
error against float64 is at most twice PyTorch's in the same dtype, plus rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from _eager import group_norm_silu as eager
from _harness import OURS, Bench, add_impl_option, implementation, judge, largest_error, parser
from torch import Tensor

from ldm_fast import ops
from ldm_fast.ops.arguments import Norm
from ldm_fast.ops.cases import TOLERANCE, GroupNormSilu, bytes_moved, flops, make_inputs

TINY = (GroupNormSilu((2, 64, 7, 7), 32), GroupNormSilu((2, 64, 7, 7), 32, "channels_last"))
GRADIENTS = ("x", "weight", "bias")
PEER_SLACK = 64  # times TOLERANCE: how far off a peer may be


def exact(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs in float64 and contiguous, since PyTorch's channels_last statistics are less exact."""
    return {key: value.double().contiguous() if isinstance(value, Tensor) else value for key, value in inputs.items()}


def functions(bench: Bench) -> dict[str, Callable[..., Tensor]]:
    """Return our function and those of the peers."""
    found = {OURS: lambda **kwargs: ops.group_norm_silu(**kwargs, impl=bench.options.impl), "eager": eager}
    if bench.options.compile:
        torch._dynamo.reset()  # otherwise it would treat the sizes as variable and compile for all rows at once
        found["eager, torch.compile"] = torch.compile(eager, dynamic=False)
    return found


def forward_row(bench: Bench, case: GroupNormSilu, dtype: torch.dtype) -> None:
    inputs = make_inputs("group_norm_silu", case, dtype, bench.device)
    truth = eager(**exact(inputs))
    allowed = 2 * largest_error(eager(**inputs), truth) + TOLERANCE[dtype]

    def verify(name: str, y: Tensor) -> object:
        return judge({"y": largest_error(y, truth)}, allowed if name == OURS else PEER_SLACK * TOLERANCE[dtype])

    bench.row(
        str(case),
        str(dtype).removeprefix("torch."),
        {name: lambda function=function: function(**inputs) for name, function in functions(bench).items()},
        verify,
        implementation=implementation("group_norm_silu", bench.options.impl, Norm(**inputs)),
        flops=flops("group_norm_silu", case),
        moved=bytes_moved("group_norm_silu", case, dtype),
    )


def backward_row(bench: Bench, case: GroupNormSilu, dtype: torch.dtype) -> None:
    """Time only the backward pass. It reads at least x and dL/dy, and writes dL/dx."""
    inputs = make_inputs("group_norm_silu", case, dtype, bench.device)
    grad = torch.empty_like(inputs["x"]).normal_(generator=torch.Generator(bench.device).manual_seed(1))

    def backward(function: Callable[..., Tensor], inputs: dict[str, Any], grad: Tensor) -> Callable[[], Any]:
        leaves = {key: inputs[key].detach().requires_grad_() for key in GRADIENTS}
        y = function(**{**inputs, **leaves})
        return lambda: torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)

    truth = backward(eager, exact(inputs), grad.double().contiguous())()

    def errors(gradients: tuple[Tensor, ...]) -> dict[str, float]:
        return {f"d{key}": largest_error(g, t) for key, g, t in zip(GRADIENTS, gradients, truth, strict=True)}

    allowed = 2 * max(errors(backward(eager, inputs, grad)()).values()) + TOLERANCE[dtype]

    def verify(name: str, gradients: tuple[Tensor, ...]) -> object:
        return judge(errors(gradients), allowed if name == OURS else PEER_SLACK * TOLERANCE[dtype])

    who = implementation("group_norm_silu", bench.options.impl, Norm(**inputs))
    bench.row(
        f"{case} backward",
        str(dtype).removeprefix("torch."),
        {name: backward(function, inputs, grad) for name, function in functions(bench).items()},
        verify,
        implementation=who,
        moved=3 * inputs["x"].numel() * dtype.itemsize,
    )


def main(arguments: list[str] | None = None) -> int:
    p = parser(__doc__, dtypes=("float32", "bfloat16"))
    add_impl_option(p, "group_norm_silu")
    p.add_argument(
        "--backward", action="store_true", help="time the backward pass of every shape, not only of the first two"
    )
    bench = Bench("group_norm_silu", p.parse_args(arguments))
    for number, case in enumerate(bench.cases("group_norm_silu", TINY)):
        for dtype in bench.options.dtype:
            with torch.no_grad():
                forward_row(bench, case, getattr(torch, dtype))
            if bench.options.backward or number < 2:
                backward_row(bench, case, getattr(torch, dtype))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
