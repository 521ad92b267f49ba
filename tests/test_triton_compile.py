"""What the compiler makes of the Triton kernels, without a GPU: no spills, no atomics, tensor cores, 128-bit accesses.

The default run compiles a few launches; `-m slow` all of `benchmarks/gpu_static.py`, each for three architectures.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ldm_fast import kernels

if kernels.interpreting():
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a block may have
HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
NO_PRODUCT = {"sum_parts"}
# Kernels that read x, or q, k and v, as a whole: there 16 bytes at once matter.
STREAMING = {
    *("forward_short", "forward_long", "backward_short", "backward_queries", "backward_keys"),
    *("forward_group", "backward_group", "stats", "apply", "grad_sums", "grad_apply"),
}
WRITES_PER_CHANNEL = {"stats", "grad_sums"}  # their results are a few numbers


@pytest.fixture
def gpu_static(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu_static")


def check(static: Any, dtype: torch.dtype, attention: bool, aligned: bool = True) -> None:
    assert (static.stack, static.local) == (0, 0), f"spills: {static}"
    assert static.atomics == 0, f"atomics: {static}"
    assert static.shared <= SHARED[static.arch], f"shared memory: {static}"
    if attention and static.kernel not in NO_PRODUCT:
        # float32 products keep their precision, so they do not go through the tensor cores (tf32 would)
        assert (static.tensor_core > 0) == (dtype != SINGLE), f"tensor cores: {static}"
        assert static.exp2 > 0, f"exponentials: {static}"
    if aligned and static.kernel in STREAMING:
        assert static.loads_128 > 0, f"narrow loads: {static}"
        assert static.stores_128 > 0 or static.kernel in WRITES_PER_CHANNEL, f"narrow stores: {static}"


@pytest.mark.parametrize(
    ("shape", "dtype", "arch"),
    [
        ((2, 8, 4096, 77, 40), HALF, 80),
        ((2, 8, 4096, 77, 40), BFLOAT, 100),
        ((2, 8, 1024, 1024, 80), BFLOAT, 90),
        ((2, 8, 4096, 4096, 40), SINGLE, 80),
    ],
    ids=str,
)
def test_attention(gpu_static: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, arch: int) -> None:
    for launch in gpu_static.attention_launches(shape, dtype):
        check(gpu_static.compile_launch(launch, arch), dtype, attention=True)


@pytest.mark.parametrize(
    ("shape", "layout", "arch"),
    [
        ((2, 1280, 16, 16), torch.channels_last, 80),
        ((2, 2560, 8, 8), torch.contiguous_format, 90),
        ((2, 320, 64, 64), torch.contiguous_format, 100),
    ],
    ids=str,
)
def test_group_norm_silu(
    gpu_static: ModuleType, shape: tuple[int, ...], layout: torch.memory_format, arch: int
) -> None:
    for launch in gpu_static.group_norm_silu_launches(shape, HALF, layout):
        check(gpu_static.compile_launch(launch, arch), HALF, attention=False)


@pytest.mark.parametrize(
    ("shape", "kernel", "products"),
    [
        ((2, 8, 4096, 77, 40), "forward_short", (("N", "M", "D"), ("N", "D", "M"))),
        ((2, 8, 4096, 4096, 40), "forward_long", (("N", "M", "D"), ("N", "D", "M"))),
        ((2, 8, 4096, 4096, 40), "backward_queries", (("N", "M", "D"), ("N", "M", "D"), ("N", "D", "M"))),
        ((2, 8, 4096, 4096, 40), "backward_keys", (("M", "N", "D"),) * 2 + (("M", "D", "N"),) * 2),
    ],
    ids=str,
)
def test_no_product_is_padded(
    gpu_static: ModuleType, shape: tuple[int, ...], kernel: str, products: tuple[tuple[str, str, str], ...]
) -> None:
    """sm_80 computes 16 × 8 × 16 per instruction: as many as 48 columns and 80 keys need, not 64 and 128."""
    launch = next(x for x in gpu_static.attention_launches(shape, HALF) if x.kernel.__name__ == f"_{kernel}")
    options = launch.options
    size = {
        "N": options["BLOCK_N"],
        "M": options["BLOCK_M"] if "BLOCK_M" in options else options["M0"] + options["M1"],
        "D": options["D0"] + options["D1"],
    }
    assert size["D"] == 48 and size["M"] in (32, 64, 80)
    wanted = sum(size[a] // 16 * size[b] // 8 * size[c] // 16 for a, b, c in products) // options["num_warps"]
    assert gpu_static.compile_launch(launch, 80).tensor_core == wanted


def test_sizes_of_one(gpu_static: ModuleType) -> None:
    """Triton makes a constant of an argument that is 1: nothing may depend on it being a number at run time."""
    for launch in gpu_static.attention_launches((1, 1, 1, 1, 1), HALF):
        check(gpu_static.compile_launch(launch, 80), HALF, attention=True, aligned=False)
    for shape in ((1, 32), (1, 32, 70, 70)):  # one pixel; one channel in a group, with a group in one piece and split
        for launch in gpu_static.group_norm_silu_launches(shape, SINGLE):
            check(gpu_static.compile_launch(launch, 80), SINGLE, attention=False, aligned=False)


@pytest.mark.parametrize(("m", "d"), [(77, 80), (1024, 64), (999, 40)])
def test_masks(gpu_static: ModuleType, m: int, d: int) -> None:
    """A mask is read, and costs no spill."""
    b, h, n, m, d = shape = (2, 8, 1000, m, d)
    padding = torch.empty(b, 1, 1, m, dtype=torch.bool, device="meta").expand(b, h, n, m)
    additive = torch.empty(b, h, n, m, dtype=HALF, device="meta")
    for mask in (padding, additive):
        launches = gpu_static.attention_launches(shape, HALF, mask)
        statics = [gpu_static.compile_launch(launch, 80) for launch in launches]
        for static in statics:
            check(static, HALF, attention=True)
        args = launches[0].args
        unmasked = launches[0]._replace(args=(*args[:3], None, *args[4:]))
        assert statics[0].loads > gpu_static.compile_launch(unmasked, 80).loads


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dtype", (HALF, BFLOAT, SINGLE), ids=str)
@pytest.mark.parametrize("op", ("attention", "group_norm_silu"))
def test_every_listed_shape(gpu_static: ModuleType, op: str, dtype: torch.dtype, arch: int) -> None:
    for label, launch in gpu_static.table([op], dtype):
        print(label)
        check(gpu_static.compile_launch(launch, arch), dtype, attention=op == "attention")


def test_the_table_is_printed() -> None:
    command = [sys.executable, str(FOLDER / "gpu_static.py"), "--quick", "--arch", "90"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.strip().splitlines()
    record = json.loads(lines[-1])
    assert record["benchmark"] == "gpu_static" and len(record["kernels"]) >= 5
    assert all(kernel["registers"] > 0 and kernel["arch"] == 90 for kernel in record["kernels"])
    assert lines[-2] == f"{len(record['kernels'])} kernels, 0 with spills"
