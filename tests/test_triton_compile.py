"""The Triton kernels, compiled without a GPU, pass the checks of `benchmarks/gpu_static.py`.

The default run compiles a few launches. `-m slow` compiles all that the published models need, for three architectures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import golden
import pytest
import torch

pytest.importorskip("triton", minversion="3.3", reason="Triton 3.2 compiles the kernels, some of them with spills")

import gpu_static
import model_shapes

from ldm_fast import kernels
from ldm_fast.interop.compvis import (
    autoencoder_config_from_compvis,
    encoder_config_from_compvis,
    unet_config_from_compvis,
)
from ldm_fast.ops.cases import CASES

if kernels.interpreting():
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
ARCHITECTURES = (80, 90, 100)
HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def check(launches: Iterable[kernels.Launch], dtype: torch.dtype, arch: int, allowed: str = "") -> None:
    """Compile all launches and find no faults, except one that is allowed."""
    for launch in launches:
        static = gpu_static.compile_launch(launch, arch)
        found = gpu_static.faults(static, dtype, gpu_static.aligned(launch))
        assert set(found) <= {allowed}, static


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
def test_attention(shape: tuple[int, ...], dtype: torch.dtype, arch: int) -> None:
    check(gpu_static.attention_launches(shape, dtype), dtype, arch)


@pytest.mark.parametrize(
    ("shape", "layout", "arch"),
    [
        ((2, 1280, 16, 16, True, False), CHANNELS_LAST, 80),
        ((2, 2560, 8, 8, True, False), CONTIGUOUS, 90),
        ((2, 320, 64, 64, True, True), CONTIGUOUS, 100),
    ],
    ids=str,
)
def test_group_norm_silu(shape: tuple[int, ...], layout: torch.memory_format, arch: int) -> None:
    launches = gpu_static.group_norm_silu_launches(model_shapes.GroupNormShape(*shape), HALF, layout)
    check(launches, HALF, arch)


@pytest.mark.parametrize(
    ("shape", "kernel", "keys", "columns"),
    [
        ((2, 8, 4096, 77, 40), "forward_short", [64, 16], [32, 16]),
        ((2, 8, 1024, 77, 80), "forward_short", [64, 16], [64, 16]),
        ((2, 8, 256, 77, 160), "forward_short", [64, 16], [128, 32]),
        ((2, 12, 256, 92, 32), "forward_short", [64, 32], [32]),
        ((2, 8, 4096, 77, 40), "backward_short", [64, 16], [64]),  # two pieces of keys, or two of columns
        ((2, 8, 1024, 77, 80), "backward_short", [128], [64, 16]),
        ((2, 8, 4096, 4096, 40), "forward_long", [64], [32, 16]),
        ((2, 8, 4096, 4096, 40), "backward_queries", [32], [32, 16]),
        ((2, 8, 4096, 4096, 40), "backward_keys", [64], [32, 16]),
        ((2, 8, 256, 77, 160), "backward_keys", [64], [128, 32]),  # dk and dv apart
        ((1, 1, 4096, 4096, 512), "forward_long", [32], [256]),
        ((1, 1, 4096, 4096, 512), "backward_keys", [64], [256]),  # dk and dv apart
        ((2, 1, 1024, 1024, 384), "backward_keys", [64], [128]),
    ],
    ids=str,
)
def test_what_tiles_need(shape: tuple[int, ...], kernel: str, keys: list[int], columns: list[int]) -> None:
    """The check of matrix work counts tiles made of these pieces: 48 columns and 80 keys, not 64 and 128."""
    launch = next(x for x in gpu_static.attention_launches(shape, HALF) if x.kernel.__name__ == f"_{kernel}")
    lengths = gpu_static._lengths(launch)
    assert (lengths["k"], lengths["d"]) == (keys, columns)
    need = sum(rows * columns * depth for rows, columns, depth in gpu_static._product_tiles(launch))
    assert need == len(gpu_static._products(launch)) * launch.options["BLOCK_N"] * sum(keys) * sum(columns)


def test_faults_are_found() -> None:
    """If a tile has too few rows for its warps, they compute everything twice, and the check says so."""
    launch = gpu_static.attention_launches((2, 8, 256, 77, 160), HALF)[0]
    wasteful = launch._replace(options={**launch.options, "num_warps": 8}, resident=4)
    static = gpu_static.compile_launch(wasteful, 80)
    assert static.matrix == 2 and static.registers > 64
    assert {"matrix work", "occupancy"} <= set(gpu_static.faults(static, HALF))


def test_faults_of_memory_are_found() -> None:
    """The faults are rows about which nothing is known, too few registers, and a division in a loop."""
    shape = model_shapes.GroupNormShape(2, 320, 64, 64, True, False)
    launches = gpu_static.group_norm_silu_launches(shape, HALF, CHANNELS_LAST)
    apply, merge = (next(x for x in launches if x.kernel.__name__ == name) for name in ("_apply", "_merge"))
    static = gpu_static.compile_launch(apply._replace(options={**apply.options, "UNIT": 1, "maxnreg": 32}), 80)
    assert set(gpu_static.faults(static, HALF)) == {"spills", "narrow loads", "narrow stores"}
    divides = gpu_static.compile_launch(merge, 80).loop_divisions
    assert gpu_static.faults(replace(static, loop_divisions=divides), HALF)[-1] == "division in a loop"


def test_sizes_of_one() -> None:
    """One query, key, column, pixel or channel per group compiles, with a group in one piece or split."""
    tiny = gpu_static.attention_launches((1, 1, 1, 1, 1), HALF)  # its tiles have too few columns for the warps
    check(tiny, HALF, 80, allowed="matrix work")
    for side in (1, 139):
        shape = model_shapes.GroupNormShape(1, 32, side, side, True, True)
        check(gpu_static.group_norm_silu_launches(shape, SINGLE, CONTIGUOUS), SINGLE, 80)


@pytest.mark.parametrize(("m", "d"), [(77, 80), (1024, 64), (999, 40)])
def test_masks(m: int, d: int) -> None:
    """A mask is read, and causes no spills."""
    b, h, n, m, d = shape = (2, 8, 1000, m, d)
    padding = torch.empty(b, 1, 1, m, dtype=torch.bool, device="meta").expand(b, h, n, m)
    additive = torch.empty(b, h, n, m, dtype=HALF, device="meta")
    for mask in (padding, additive):
        launches = gpu_static.attention_launches(shape, HALF, mask)
        check(launches, HALF, 80, allowed="narrow loads")  # of the mask
        args = launches[0].args
        unmasked = launches[0]._replace(args=(*args[:3], None, *args[4:]))
        assert gpu_static.compile_launch(launches[0], 80).loads > gpu_static.compile_launch(unmasked, 80).loads


def check_that_it_fits(launches: Iterable[kernels.Launch], arch: int) -> None:
    for launch in launches:
        static = gpu_static.compile_launch(launch, arch)
        assert static.resident >= 1, static


@pytest.mark.parametrize(("m", "d"), [(77, 128), (80, 192), (64, 256)])
def test_a_program_fits_small_gpus(m: int, d: int) -> None:
    """On sm_86, sm_89 and sm_120 a program that takes more than 99 KB of shared memory cannot start."""
    check_that_it_fits(gpu_static.attention_launches((1, 1, 64, m, d), HALF)[:1], 86)


@pytest.mark.slow
@pytest.mark.parametrize("arch", (86, 120))
@pytest.mark.parametrize("masked", (False, True))
def test_every_plan_fits_small_gpus(arch: int, masked: bool) -> None:
    short = [(1, 1, 64, m, d) for m in (64, 80, 96, 128) for d in (80, 96, 128, 160, 192)]
    long = [(1, 1, 300, 300, d) for d in (64, 80, 128, 160, 192, 256, 320, 512)]
    for shape in short + long:
        b, h, n, m, _ = shape
        mask = torch.empty(b, h, n, m, dtype=torch.bool, device="meta") if masked else None
        check_that_it_fits(gpu_static.attention_launches(shape, HALF, mask), arch)


def test_one_kernel_for_every_size() -> None:
    """Other numbers of images, heads, queries, keys, channels and pixels need no other kernel."""

    def kernels_of(*all_launches: list[kernels.Launch]) -> int:
        return len(gpu_static.distinct([("", launches) for launches in all_launches]))

    sizes = [(2, 8, 4096, 77, 40), (1, 5, 1000, 80, 40), (7, 1, 1, 66, 40)]
    assert kernels_of(*(gpu_static.attention_launches(size, HALF) for size in sizes)) == 3
    sizes = [(2, 8, 4096, 4096, 40), (1, 1, 1000, 640, 40)]
    assert kernels_of(*(gpu_static.attention_launches(size, HALF) for size in sizes)) == 3
    maps = [model_shapes.GroupNormShape(*size, True, False) for size in ((2, 320, 64, 64), (1, 960, 96, 56))]
    assert kernels_of(*(gpu_static.group_norm_silu_launches(shape, HALF, CHANNELS_LAST) for shape in maps)) == 7


# ---- the published models ----


def test_the_shapes_are_those_of_the_models() -> None:
    """If this fails: `python benchmarks/model_shapes.py` prints the lists as they have to be."""
    with torch.device("meta"):
        recorded = model_shapes.record(model_shapes.all_runs())
    assert recorded.attention == set(model_shapes.ATTENTION)
    assert recorded.group_norm_silu == set(model_shapes.GROUP_NORM_SILU)


@pytest.mark.slow
def test_no_shape_of_the_zoo_is_missing() -> None:
    """The lists contain the shapes of every published configuration: UNet, first stage and text encoder."""
    tokens = {"ClassEmbedder": 1, "BERTEmbedder": 77, "Identity": 11}  # the last is ten neighbours and the prompt
    runs, seen = [], set()
    for entry in golden.zoo().values():
        stage = entry.get("first_stage_config", entry)["params"]
        config, size = autoencoder_config_from_compvis(stage), stage["ddconfig"]["resolution"]
        if "unet_config" in entry:
            size = entry["ddpm"]["image_size"] * config.downsampling_factor
            unet, condition = unet_config_from_compvis(entry["unet_config"]["params"]), entry["cond_stage_config"]
            name, params = (condition["class"], condition["params"]) if isinstance(condition, dict) else ("none", {})
            runs.append((model_shapes.unet, unet, params.get("max_seq_len", tokens.get(name, 77))))
            if name == "BERTEmbedder":
                runs.append((model_shapes.text_encoder, encoder_config_from_compvis(name, params)))
        runs.append((model_shapes.first_stage, config, size))
    with torch.device("meta"):
        different = [run for run in runs if repr(run) not in seen and not seen.add(repr(run))]
        recorded = model_shapes.record(build(*sizes) for build, *sizes in different)
    assert len(different) > 20
    assert recorded.attention <= set(model_shapes.ATTENTION)
    assert recorded.group_norm_silu <= set(model_shapes.GROUP_NORM_SILU)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", ("attention", "group_norm_silu"))
def test_every_shape_of_the_models(op: str, arch: int) -> None:
    wrong = {}
    for launch, label, _ in gpu_static.distinct(gpu_static.works([op], HALF)):
        static = gpu_static.compile_launch(launch, arch)
        if found := gpu_static.faults(static, HALF, gpu_static.aligned(launch)):
            wrong[label, static.kernel] = found, static
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", (BFLOAT, SINGLE), ids=str)
def test_other_dtypes(dtype: torch.dtype, arch: int) -> None:
    for case in CASES["attention"]:
        if case.acceptance:
            check(
                gpu_static, gpu_static.attention_launches((case.B, case.H, case.N, case.M, case.D), dtype), dtype, arch
            )
    for case in CASES["group_norm_silu"]:
        if case.acceptance:
            shape, layout = (
                model_shapes.GroupNormShape(*case.shape, True, False),
                getattr(torch, case.layout, CONTIGUOUS),
            )
            check(gpu_static.group_norm_silu_launches(shape, dtype, layout), dtype, arch)


def test_the_table_is_printed() -> None:
    command = [sys.executable, str(FOLDER / "gpu_static.py"), "--quick", "--arch", "80"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.strip().splitlines()
    record = json.loads(lines[-1])
    assert record["benchmark"] == "gpu_static" and len(record["kernels"]) >= 5
    assert all(kernel["registers"] > 0 and kernel["arch"] == 80 for kernel in record["kernels"])
    assert lines[-2] == f"{len(record['kernels'])} kernels, 0 with faults"
    assert lines[0].count("modelled") == 3
    assert all(0 < work["needed"] <= work["ours"] for work in record["works"])
    assert {work["flash"] is None for work in record["works"]} == {True, False}
