"""The CUDA source of nearest_codebook, run on the CPU under sanitizers (tests/cuda_host), against the formula.

One program per sanitizer is compiled once and runs all cases in two processes. Each case is then a separate test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_host.cases import (
    CASES,
    LONG_CASES,
    LONG_TSAN_CASES,
    METHODS,
    RACE_CASES,
    SPLIT,
    TSAN_CASES,
    Case,
    Results,
    make_inputs,
    read_results,
    write_cases,
)

from ldm_fast.ops import cuda, reference

ROOT = Path(__file__).resolve().parents[1]
HEADERS = sorted((ROOT / "csrc/cuda").glob("nearest_codebook*.cuh"))
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}


def run(program: Path, cases: list[Case], without: str = "", part: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the cases, leaving out a barrier ("file:line") or the "bounds". The results go to <program>.results<part>."""
    inputs, results = Path(f"{program}.cases{part}"), Path(f"{program}.results{part}")
    write_cases(inputs, cases)
    command = [str(program), str(inputs), str(results), without]
    # The first report ends the program. Leaks are not looked for, since ptrace may be forbidden.
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True, timeout=1800)


def run_cleanly(program: Path, cases: list[Case]) -> dict[Case, Results]:
    """Run the cases in two processes, each of which takes every other case."""
    parts, results = (cases[0::2], cases[1::2]), {}
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda number: run(program, parts[number], part=number), (0, 1)))
    for number, done in enumerate(both):
        assert done.returncode == 0, done.stderr
        results |= read_results(Path(f"{program}.results{number}"), parts[number])
    return results


def build(folder: Path, name: str) -> Path:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler found (c++, g++, clang++)")
    flags = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-pthread"]
    flags += [f"-fsanitize={SANITIZERS[name]}", "-fno-sanitize-recover=all"]
    probe = folder / f"probe_{name}.cpp"
    probe.write_text("int main() { return 0; }\n")
    for command in ([compiler, *flags, str(probe), "-o", str(probe.with_suffix(""))], [str(probe.with_suffix(""))]):
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
def programs(folder):
    """Both programs, which are compiled at the same time."""
    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(build, folder, name) for name in SANITIZERS}


@pytest.fixture(scope="module")
def asan_program(programs):
    return programs["asan"].result()


@pytest.fixture(scope="module")
def tsan_program(programs):
    return programs["tsan"].result()


@pytest.fixture(scope="module")
def asan_results(asan_program):
    return run_cleanly(asan_program, CASES)


@pytest.fixture(scope="module")
def tsan_results(tsan_program):
    return run_cleanly(tsan_program, TSAN_CASES)


def rounding_bound(z: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return how far the float32 formula can be from the exact distance, (n, k).

    It rounds 2d + 2 numbers no larger than the sum of the absolute terms. Each may also lose a denormal number.
    """
    d = z.shape[1]
    size = (codes**2).sum(1) / 2 + np.abs(z) @ np.abs(codes).T
    return (2 * d + 2) * (1.01 * 2.0**-24 * size + 2.0**-149)


def check_search(case: Case, results: Results) -> None:
    """The method is that for these sizes, the index is the formula's, and no code is nearer by more than rounding."""
    assert results.method == case.method
    index = results.kernel.index
    np.testing.assert_array_equal(index, results.formula.index)
    if case.n == 0 or case.data == "nonfinite":
        return
    z, codes = (x.double().reshape(-1, case.d).numpy() for x in make_inputs(case))
    distances = (codes**2).sum(1) / 2 - z @ codes.T
    bound = rounding_bound(z, codes)
    rows, best = np.arange(case.n), distances.argmin(1)
    excess = distances[rows, index] - distances[rows, best]
    assert (excess <= bound[rows, index] + bound[rows, best]).all()


def check_stats(case: Case, results: Results) -> None:
    """The bits are those of the formula. Counts are exact; sums are as exact as float64 before they are rounded."""
    np.testing.assert_array_equal(results.kernel.counts, results.formula.counts)
    np.testing.assert_array_equal(results.kernel.sums, results.formula.sums)
    index = torch.from_numpy(results.kernel.index.copy())
    np.testing.assert_array_equal(results.kernel.counts, torch.bincount(index, minlength=case.k).numpy())
    if case.data == "nonfinite":
        return
    z = make_inputs(case)[0].double().reshape(-1, case.d)
    sums = torch.zeros(case.k, case.d, dtype=torch.float64).index_add_(0, index, z)
    np.testing.assert_allclose(results.kernel.sums, sums.float().numpy(), rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_gives_the_minimum_of_the_formula(case, asan_results):
    check_search(case, asan_results[case])


@pytest.mark.parametrize("case", [c for c in CASES if c.stats], ids=str)
def test_counts_and_sums(case, asan_results):
    check_stats(case, asan_results[case])


def test_every_method_is_run_in_every_way():
    ways = {(case.method, case.dtype, case.sms == SPLIT) for case in CASES}
    assert len(ways) == len(METHODS) * 3 * 2
    assert {(c.method, c.sms == SPLIT) for c in TSAN_CASES} == {(m, s) for m in METHODS for s in (False, True)}


@pytest.mark.slow
def test_long_cases(asan_program):
    for case, results in run_cleanly(asan_program, LONG_CASES).items():
        check_search(case, results)
        if case.stats:
            check_stats(case, results)


@pytest.mark.parametrize("case", [c for c in CASES if c.n and c.k >= 300], ids=str)
def test_codes_are_divided_only_if_queries_are_few(case, asan_results):
    assert (asan_results[case].ranges > 1) == (case.sms == SPLIT)


@pytest.mark.parametrize("case", [c for c in CASES if c.data in ("lattice", "twice", "underflow")], ids=str)
def test_equal_distances_give_the_lowest_index(case, asan_results):
    index = asan_results[case].kernel.index
    if case.data == "twice":
        assert (index < case.k // 2).all()
    elif case.data == "underflow":
        assert (index == 0).all()
    else:  # exact arithmetic: float32 and the reference's float64 agree to the last tie
        z, codes = make_inputs(case)
        np.testing.assert_array_equal(index, reference.nearest_codebook(z[0], codes).numpy())


@pytest.mark.parametrize("case", [c for c in CASES if c.data == "nonfinite"], ids=str)
def test_nan_never_wins(case, asan_results):
    index = asan_results[case].kernel.index
    assert index[0] == 0  # all its distances are NaN
    assert index[5] >= 140 or 70 <= index[5] < 120  # zero times infinity is NaN
    z, codes = (x.double().reshape(-1, case.d) for x in make_inputs(case))
    distances = codes.square().sum(1) / 2 - z @ codes.T
    real = ~distances.isnan()
    rows = real.any(1)
    assert real[rows, torch.from_numpy(index)[rows]].all()


@pytest.mark.parametrize("data", ["normal", "close"])
def test_without_the_bounds_the_tensor_cores_are_wrong(data, asan_program):
    """The bounds make the index exact: without them the best code in bfloat16 wins, and the tests notice."""
    case = next(c for c in CASES if c.method == "tensor" and c.data == data and c.dtype == "float32")
    done = run(asan_program, [case], without="bounds")
    assert done.returncode == 0, done.stderr
    results = read_results(Path(f"{asan_program}.results0"), [case])[case]
    assert (results.kernel.index != results.formula.index).any()


@pytest.mark.parametrize("case", TSAN_CASES, ids=str)
def test_no_data_race(case, tsan_results):
    results = tsan_results[case]
    np.testing.assert_array_equal(results.kernel.index, results.formula.index)
    np.testing.assert_array_equal(results.kernel.sums, results.formula.sums)


@pytest.mark.slow
def test_no_data_race_in_long_cases(tsan_program):
    for results in run_cleanly(tsan_program, LONG_TSAN_CASES).values():
        np.testing.assert_array_equal(results.kernel.index, results.formula.index)


BARRIERS = [
    pytest.param(header.name, line, id=f"{header.stem}-{line}")
    for header in HEADERS
    for line, text in enumerate(header.read_text().splitlines(), 1)
    if "__syncthreads()" in text or "__syncwarp()" in text
]


def test_every_barrier_is_listed():
    assert {barrier.values[0] for barrier in BARRIERS} == set(RACE_CASES)
    assert len(BARRIERS) >= 16


@pytest.mark.parametrize(("header", "line"), BARRIERS)
def test_thread_sanitizer_notices_every_missing_barrier(header, line, tsan_program):
    done = run(tsan_program, [RACE_CASES[header]], without=f"{header}:{line}")
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


needs_module = pytest.mark.skipif(cuda._native_cuda is None, reason="ldm_fast._native_cuda is not built (no nvcc)")
ARGUMENTS = dict(z=0, z_shape=(1, 1, 4), z_strides=(4, 4, 1), codebook=0, k=1, codebook_strides=(4, 1), out=0)
ARGUMENTS |= dict(counts=0, sums=0, workspace=0, dtype="float32", device=0, stream=0)
WRONG_ARGUMENTS = [
    {"dtype": "float64"},
    {"k": 0},
    {"k": 2**31},
    {"z_shape": (1, -1, 4)},
    {"z_shape": (-1, -1, 4)},
    {"z_shape": (1, 1, 0)},
    {"z_shape": (2**16, 2**16, 4), "counts": 8, "sums": 8},
    {"counts": 8},
    {"counts": 4, "sums": 4},
    {"out": 4},
    {"workspace": 128},
]


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_call_raises_what_the_runtime_says():
    with pytest.raises(RuntimeError, match="nearest_codebook: cuda.*cudaError"):
        cuda._native_cuda.nearest_codebook(**ARGUMENTS)
    assert cuda.unavailable() is not None and "\n" not in cuda.unavailable()


@needs_module
@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS, ids=str)
def test_wrong_arguments_are_refused_before_the_gpu_is_touched(wrong):
    with pytest.raises(ValueError, match="nearest_codebook: "):
        cuda._native_cuda.nearest_codebook(**ARGUMENTS | wrong)


@needs_module
def test_sizes_beyond_the_kernels_have_no_workspace():
    with pytest.raises(ValueError, match="nearest_codebook: d must be"):
        cuda._native_cuda.nearest_codebook_workspace(n=1, k=1, d=2**31 - 32, stats=False, device=0)


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "reason"),
    [("12.4", 12040, "CUDA 13.0, and the driver runs at most"), ("13.1", 13000, None), (None, 0, "built without CUDA")],
)
def test_what_the_driver_cannot_run_is_known_beforehand(torch_cuda, driver, reason, monkeypatch):
    """A driver runs programs of its major version and older ones; a PyTorch for AMD's GPUs calls these CUDA devices."""
    info = SimpleNamespace(runtime_version=13000, driver_version=driver, architectures=[80])
    monkeypatch.setattr(cuda, "_native_cuda", SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert cuda.unavailable() is None if reason is None else reason in cuda.unavailable()


@pytest.mark.parametrize("op", ["nearest_codebook", "nearest_codebook_stats"])
def test_cpu_tensors_are_refused_with_a_reason(op):
    z = torch.zeros(1, 2, 4)
    assert "CUDA device" in getattr(cuda, f"{op}_unsupported")(z, z[0])


def test_more_vectors_than_can_be_counted_are_unsupported():
    z = torch.zeros(1, 1, 1).expand(2**16, 2**16, 1)
    assert "2^32 - 1 vectors" in cuda.nearest_codebook_stats_unsupported(z, torch.zeros(1, 1))


GPU_CASES = [c for c in CASES if c.n and c.data != "nonfinite" and (c.data == "lattice" or c.stats)]


@pytest.mark.gpu
@pytest.mark.skipif(cuda.unavailable() is not None, reason="the CUDA kernels cannot run here")
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_on_a_gpu_and_in_a_graph(case, asan_results):
    z, codes = (x.cuda() for x in make_inputs(case))
    expected = [torch.from_numpy(x.copy()).cuda() for x in vars(asan_results[case].formula).values()]
    expected[0] = expected[0].view(z.shape[:2])

    def search() -> list[torch.Tensor]:
        return list(cuda.nearest_codebook_stats(z, codes)) if case.stats else [cuda.nearest_codebook(z, codes)]

    for found, right in zip(search(), expected, strict=False):
        assert torch.equal(found, right.to(found.dtype))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = search()
    for tensor in captured:
        tensor.fill_(-1)
    graph.replay()
    for found, right in zip(captured, expected, strict=False):
        assert torch.equal(found, right.to(found.dtype))
