"""The CUDA source of nearest_codebook, run on the CPU under sanitizers (tests/cuda_host), against the reference.

One program per sanitizer is compiled once and runs all cases in one process; each case is then a test of its own.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_fast import cuda, reference

ROOT = Path(__file__).resolve().parents[1]
HEADERS = sorted((ROOT / "csrc/cuda").glob("nearest_codebook*.cuh"))
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Multiprocessors of the GPU to plan for: none is filled by any grid, many ask for ranges of codes.
NO_SPLIT, SPLIT = 0, 64
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    d: int
    dtype: str = "float32"
    sms: int = NO_SPLIT
    data: str = "normal"
    layout: str = "rows"

    def __str__(self) -> str:
        split = "-split" if self.sms == SPLIT else ""
        return f"n{self.n}-k{self.k}-d{self.d}-{self.dtype}-{self.data}-{self.layout}{split}"


DIMS = (1, 3, 4, 5, 8, 16, 17, 64)
CASES = [
    # Awkward sizes: no query and one; less than a warp, a vector, a chunk, a tile, and one more than several.
    *[Case(n, k, d) for n in (1, 33, 130) for k in (1, 2, 17, 300, 1025) for d in DIMS],
    Case(0, 17, 4),
    Case(0, 17, 64),
    *[Case(33, 1025, d, sms=SPLIT) for d in (*DIMS, 2, 6, 7, 9, 12, 13, 40)],
    *[Case(33, 300, d) for d in (2, 6, 7, 9, 12, 13, 40)],
    *[Case(1030, 65, d) for d in (4, 7, 24)],  # more than one block of queries
    *[Case(33, 300, d, dtype, sms) for d in DIMS for dtype in ("float16", "bfloat16") for sms in (NO_SPLIT, SPLIT)],
    *[Case(33, 300, d, data="lattice", sms=sms) for d in DIMS for sms in (NO_SPLIT, SPLIT)],
    *[Case(33, 300, d, data="twice", sms=sms) for d in (1, 4, 64) for sms in (NO_SPLIT, SPLIT)],
    *[Case(33, 300, d, data=data) for d in (1, 4, 64) for data in ("offset", "huge", "denormal")],
    *[Case(40, 300, d, data="nonfinite", sms=sms) for d in (1, 4, 16, 17, 64) for sms in (NO_SPLIT, SPLIT)],
    *[Case(33, 300, d, dtype, layout="columns") for d in (3, 4, 16, 40) for dtype in ("float32", "float16")],
    *[Case(33, 300, d, dtype, layout="wide") for d in (3, 4, 16, 40) for dtype in ("float32", "bfloat16")],
    *[Case(33, 300, d, dtype, layout="padded") for d in (3, 17, 46) for dtype in ("float32", "float16")],
    *[Case(33, 600, d, data="underflow", sms=sms) for d in (1, 4, 16, 40) for sms in (NO_SPLIT, SPLIT)],
]
# ThreadSanitizer is slow and data do not matter to it: every kernel, layout and way of merging once.
TSAN_CASES = [
    *[Case(33, 600, d, sms=sms) for d in (1, 4, 7, 16) for sms in (NO_SPLIT, SPLIT)],
    *[Case(130, 130, 40, sms=sms) for sms in (NO_SPLIT, SPLIT)],
    Case(33, 300, 4, "float16"),
    Case(33, 300, 64, "bfloat16", SPLIT),
    Case(33, 300, 4, layout="columns"),
]
# For the barriers that are left out: every kernel goes around its loops more than once.
# At d = 4 a thread computes the norms of the very codes it staged; at d = 3 it does not.
RACE_CASES = [Case(33, 600, 3), Case(33, 130, 40)]


def make_inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """z (n, d) and codebook (k, d) in the case's dtype, with its strides."""
    generator = torch.Generator().manual_seed(case.n * 1000003 + case.k * 1009 + case.d)
    z = torch.randn(case.n, case.d, generator=generator)
    codes = torch.randn(case.k, case.d, generator=generator)
    if case.data == "lattice":  # small integers: exact in every dtype, and full of equal distances
        z, codes = z.round(), codes.round()
    elif case.data == "twice":
        codes = codes[: case.k // 2].repeat(2, 1)
    elif case.data == "offset":
        z, codes = z + 1e4, codes + 1e4
    elif case.data == "huge":
        z, codes = z * 1e18, codes * 1e18
    elif case.data == "denormal":
        z, codes = z * 1e-20, codes * 1e-20
    elif case.data == "underflow":  # every distance is +0 or -0, which are equal
        z, codes = z * 1e-30, codes * 1e-30
    elif case.data == "nonfinite":
        spoil(z, codes)
    return lay_out(z.to(DTYPES[case.dtype]), case.layout), lay_out(codes.to(DTYPES[case.dtype]), case.layout)


def spoil(z: torch.Tensor, codes: torch.Tensor) -> None:
    """NaN and infinities wherever they could mislead: in codes, in rows of z, in single numbers."""
    nan, inf = float("nan"), float("inf")
    codes[:70] = nan  # the first chunks hold no number at all
    codes[100, -1] = nan
    codes[120:140] = inf
    z[0] = nan
    z[1, 0] = nan
    z[2] = inf
    z[3] = -inf
    z[4, -1] = inf
    z[5] = 0
    z[6:10] *= 3e38  # distances overflow to infinity, for some rows all of them


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    rows, columns = x.shape
    if layout == "columns":  # as a channel-first map has it
        return x.t().contiguous().t()
    if layout in ("wide", "padded"):  # rows of a wider matrix; padded: all of them start at a multiple of 16 bytes
        width = columns + 3 if layout == "wide" else -(-columns // 8) * 8
        wide = torch.full((rows, width), float("nan"), dtype=x.dtype)
        wide[:, :columns] = x
        return wide[:, :columns]
    return x.contiguous()


def memory_of(x: torch.Tensor) -> bytes:
    """The bytes from the first element to the last, gaps included."""
    rows, columns = x.shape
    count = (rows - 1) * x.stride(0) + (columns - 1) * x.stride(1) + 1 if rows else 0
    return torch.as_strided(x, (count,), (1,)).contiguous().view(torch.uint8).numpy().tobytes()


def write_cases(path: Path, cases: list[Case]) -> None:
    with path.open("wb") as file:
        for case in cases:
            z, codes = make_inputs(case)
            dtype = list(DTYPES).index(case.dtype)
            file.write(struct.pack("9q", case.n, case.k, case.d, dtype, case.sms, *z.stride(), *codes.stride()))
            file.write(memory_of(z) + memory_of(codes))


def run(program: Path, cases: list[Case], without: str = "") -> subprocess.CompletedProcess[str]:
    """Run the cases; indices (kernel, formula) are left in <program>.results."""
    inputs, results = Path(f"{program}.cases"), Path(f"{program}.results")
    write_cases(inputs, cases)
    command = [str(program), str(inputs), str(results), without]
    # The first report ends the program; leaks are not this test's business where ptrace is forbidden.
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True, timeout=600)


@dataclass(frozen=True)
class Result:
    ranges: int  # that the codes were divided into
    kernel: np.ndarray
    formula: np.ndarray


def read_results(program: Path, cases: list[Case]) -> dict[Case, Result]:
    numbers = np.fromfile(f"{program}.results", dtype=np.int64)
    assert len(numbers) == sum(1 + 2 * case.n for case in cases)
    results, start = {}, 0
    for case in cases:
        own = numbers[start : start + 1 + 2 * case.n]
        results[case] = Result(int(own[0]), own[1 : 1 + case.n], own[1 + case.n :])
        start += len(own)
    return results


def build(folder: Path, name: str) -> Path:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler found (c++, g++, clang++)")
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-pthread"]
    flags += [f"-fsanitize={SANITIZERS[name]}", "-fno-sanitize-recover=all"]
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    for command in ([compiler, *flags, str(probe), "-o", str(folder / "probe")], [str(folder / "probe")]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(
                f"{compiler} cannot build and run programs with -fsanitize={SANITIZERS[name]}: {done.stderr[:200]}"
            )
    program = folder / f"nearest_codebook_{name}"
    source = ROOT / "tests/cuda_host/nearest_codebook.cpp"
    done = subprocess.run([compiler, *flags, str(source), "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def asan_results(folder):
    program = build(folder, "asan")
    done = run(program, CASES)
    assert done.returncode == 0, done.stderr
    return read_results(program, CASES)


@pytest.fixture(scope="module")
def tsan_program(folder):
    return build(folder, "tsan")


def rounding_bound(z: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """How far the float32 formula can be from the exact distance, (n, k).

    2d + 2 roundings of numbers no larger than the sum of the absolute terms; each may also lose a denormal number.
    """
    d = z.shape[1]
    size = (codes**2).sum(1) / 2 + np.abs(z) @ np.abs(codes).T
    return (2 * d + 2) * (1.01 * 2.0**-24 * size + 2.0**-149)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_gives_the_minimum_of_the_formula(case, asan_results):
    kernel = asan_results[case].kernel
    np.testing.assert_array_equal(kernel, asan_results[case].formula)
    if case.n == 0 or case.data == "nonfinite":
        return
    z, codes = (x.double().numpy() for x in make_inputs(case))
    distances = (codes**2).sum(1) / 2 - z @ codes.T
    bound = rounding_bound(z, codes)
    rows, best = np.arange(case.n), distances.argmin(1)
    excess = distances[rows, kernel] - distances[rows, best]
    assert (excess <= bound[rows, kernel] + bound[rows, best]).all()


@pytest.mark.parametrize("case", [c for c in CASES if c.n and c.k >= 300], ids=str)
def test_codes_are_divided_only_where_queries_are_few(case, asan_results):
    assert (asan_results[case].ranges > 1) == (case.sms == SPLIT)


@pytest.mark.parametrize("case", [c for c in CASES if c.data in ("lattice", "twice", "underflow")], ids=str)
def test_equal_distances_give_the_lowest_index(case, asan_results):
    kernel = asan_results[case].kernel
    if case.data == "twice":
        assert (kernel < case.k // 2).all()
    elif case.data == "underflow":
        assert (kernel == 0).all()
    else:  # exact arithmetic: float32 and the reference's float64 agree to the last tie
        np.testing.assert_array_equal(kernel, reference.nearest_codebook(*make_inputs(case)).numpy())


@pytest.mark.parametrize("case", [c for c in CASES if c.data == "nonfinite"], ids=str)
def test_nan_never_wins(case, asan_results):
    kernel = asan_results[case].kernel
    assert kernel[0] == 0  # nothing but NaN
    assert kernel[5] >= 140 or 70 <= kernel[5] < 120  # zero times infinity is NaN
    z, codes = (x.double() for x in make_inputs(case))
    distances = codes.square().sum(1) / 2 - z @ codes.T
    real = ~distances.isnan()
    rows = real.any(1)
    assert real[rows, torch.from_numpy(kernel)[rows]].all()


@pytest.fixture(scope="module")
def tsan_results(tsan_program):
    done = run(tsan_program, TSAN_CASES)
    assert done.returncode == 0, done.stderr
    return read_results(tsan_program, TSAN_CASES)


@pytest.mark.parametrize("case", TSAN_CASES, ids=str)
def test_no_data_race(case, tsan_results):
    np.testing.assert_array_equal(tsan_results[case].kernel, tsan_results[case].formula)


BARRIERS = [
    pytest.param(f"{header.name}:{line}", id=f"{header.stem}-{line}")
    for header in HEADERS
    for line, text in enumerate(header.read_text().splitlines(), 1)
    if "__syncthreads()" in text or "__syncwarp()" in text
]


def test_every_barrier_is_listed():
    assert len(BARRIERS) >= 7


@pytest.mark.parametrize("barrier", BARRIERS)
def test_thread_sanitizer_misses_every_barrier(barrier, tsan_program):
    done = run(tsan_program, RACE_CASES, without=barrier)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


needs_module = pytest.mark.skipif(cuda._native_cuda is None, reason="ldm_fast._native_cuda is not built (no nvcc)")
ARGUMENTS = dict(z=0, z_row_stride=4, z_column_stride=1, codebook=0, codebook_row_stride=4, codebook_column_stride=1)
ARGUMENTS |= dict(out=0, half_norms=0, n=1, k=1, d=4, dtype="float32", device=0, stream=0)


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_call_raises_what_the_runtime_says():
    with pytest.raises(RuntimeError, match="nearest_codebook: cuda.*cudaError"):
        cuda._native_cuda.nearest_codebook(**ARGUMENTS)
    assert cuda.unavailable() is not None and "\n" not in cuda.unavailable()


@needs_module
@pytest.mark.parametrize("wrong", [{"dtype": "float64"}, {"k": 0}, {"n": -1}, {"d": 0}, {"d": 17}], ids=str)
def test_wrong_arguments_are_refused_before_the_gpu_is_touched(wrong):
    with pytest.raises(ValueError, match="nearest_codebook: "):
        cuda._native_cuda.nearest_codebook(**ARGUMENTS | wrong)


def test_cpu_tensors_are_unsupported_in_words():
    z = torch.zeros(2, 4)
    assert "CUDA device" in cuda.nearest_codebook_unsupported(z, z)


@pytest.mark.gpu
@pytest.mark.skipif(cuda.unavailable() is not None, reason="the CUDA kernels cannot run here")
@pytest.mark.parametrize("case", [c for c in CASES if c.n and c.data == "lattice"], ids=str)
def test_on_a_gpu_and_in_a_graph(case):
    z, codes = (x.cuda() for x in make_inputs(case))
    expected = reference.nearest_codebook(z, codes)
    assert torch.equal(cuda.nearest_codebook(z, codes), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.nearest_codebook(z, codes)
    out.fill_(-1)
    graph.replay()
    assert torch.equal(out, expected)
