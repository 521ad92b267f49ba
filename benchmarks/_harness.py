"""Code shared by the benchmarks: options, the machine's peaks, verifying, interleaved timing, a table, a line of JSON.

A benchmark consists of rows. The contenders of a row do the same work; ours comes first. Every contender is verified
before anything is timed. If ours is wrong, the row gets no times at all and the process ends with exit code 1. A peer
that is wrong is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm_fast.ops import dispatch
from ldm_fast.ops.cases import CASES, Case

OURS = "ldm_fast"  # a contender whose name begins with this is ours too, not a peer
# s: shorter calls are repeated within a sample, so that most of them find the caches as the previous call left them
SHORTEST_SAMPLE = 20e-3
HOPELESS = 3.0  # a slow peer that takes this many times as long as the best one gets only three samples
SLOW = 50e-3  # s


class Verdict(NamedTuple):
    """The outcome of verifying one result."""

    error: float
    right: bool
    detail: str = ""  # which error this is, what it is relative to, and how large it may be


Verify = Callable[[str, Any], Verdict]


def parser(description: str, *, dtypes: tuple[str, ...]) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description.splitlines()[0])
    p.add_argument("--dtype", nargs="+", default=list(dtypes), choices=("float32", "bfloat16", "float16"))
    p.add_argument("--shape", metavar="TEXT", help="only the rows whose name contains this, for example 4096x77x40")
    p.add_argument("--repeats", type=_positive, default=7, metavar="N", help="samples of each contender (default 7)")
    p.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: PyTorch's choice)")
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one"
    )
    p.add_argument("--compile", action="store_true", help="also time torch.compile (compiling takes long)")
    p.add_argument("--quick", action="store_true", help="tiny shapes and one sample, to try out the benchmark")
    return p


def add_impl_option(p: argparse.ArgumentParser, op: str) -> None:
    p.add_argument("--impl", choices=tuple(dispatch.IMPLEMENTATIONS[op]), help="time this one instead of the best one")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


@dataclass
class Bench:
    """One run of a benchmark: the options, the machine's peaks, and the rows so far."""

    name: str
    options: argparse.Namespace
    absent: dict[str, str] = field(default_factory=dict)  # peers that are not installed, and how to install them
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        self.device = torch.device(self.options.device)
        self.repeats = 1 if self.options.quick else self.options.repeats
        self.copy_bandwidth = self._copy_bandwidth()
        self.peaks = {dtype: self._matmul_peak(getattr(torch, dtype)) for dtype in dict.fromkeys(self.options.dtype)}
        print(f"{self.name}: {describe(self.device)}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
        peaks = ", ".join(f"{dtype} {peak / 1e9:.0f} GFLOP/s" for dtype, peak in self.peaks.items())
        print(f"peaks measured now: matrix product {peaks}; copy {self.copy_bandwidth / 1e9:.1f} GB/s (read + write)")

    def cases(self, op: str, tiny: tuple[Case, ...]) -> list[Any]:
        """Return the acceptance cases, or with --quick the tiny ones, that --shape selects."""
        chosen = tiny if self.options.quick else [case for case in CASES[op] if case.acceptance]
        kept = [case for case in chosen if not self.options.shape or self.options.shape in str(case)]
        if not kept:
            names = ", ".join(map(str, chosen))
            raise SystemExit(f"{self.name}: no row's name contains {self.options.shape!r}; the rows are: {names}")
        return kept

    def row(
        self,
        case: str,
        dtype: str,
        contenders: dict[str, Callable[[], Any]],
        verify: Verify,
        *,
        implementation: str,
        flops: int = 0,
        moved: int = 0,
        skipped: dict[str, str] | None = None,
    ) -> None:
        """Verify every contender, then time those that are right, in turns. `skipped`: peers left out, and why."""
        row = {"case": case, "dtype": dtype, "implementation": implementation, "flops": flops, "bytes": moved}
        row |= {"verified": False, "contenders": {}, "left_out": dict(skipped or {})}
        self.rows.append(row)
        print(f"\n{case}  {dtype}  (ours: {implementation})", flush=True)
        verdicts, first = {}, {}
        for name, contender in contenders.items():
            verdict, first[name] = self._verify(name, contender, verify)
            if verdict.right:
                verdicts[name] = verdict
            elif name.startswith(OURS):
                self.wrong.append(f"{case} {dtype}: {verdict.detail}")
                print(f"  {name} is WRONG, so nothing is timed: {verdict.detail}")
                return
            else:
                row["left_out"][name] = f"wrong: {verdict.detail}"
        row["verified"] = True
        samples = self._time({name: contenders[name] for name in verdicts}, first)
        for name, seconds in samples.items():
            row["contenders"][name] = self._figures(seconds, dtype, flops, moved) | {"error": verdicts[name].error}
        peers = {name: c["median_ms"] for name, c in row["contenders"].items() if not name.startswith(OURS)}
        row["best_peer"] = min(peers, key=peers.get, default=None)
        row["speedup"] = peers[row["best_peer"]] / row["contenders"][OURS]["median_ms"] if peers else None
        self._print(row)

    def finish(self) -> int:
        """Print the last lines (absent peers, wrong results, the JSON) and return the exit code."""
        print()
        for name, how in self.absent.items():
            print(f"absent: {name} ({how})")
        for line in self.wrong:
            print(f"WRONG: {line}")
        record = {
            "benchmark": self.name,
            "device": describe(self.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "quick": self.options.quick,
            "repeats": self.repeats,
            "peaks": {
                "copy_gbs": self.copy_bandwidth / 1e9,
                "matmul_gflops": {dtype: peak / 1e9 for dtype, peak in self.peaks.items()},
            },
            "absent": self.absent,
            "wrong": self.wrong,
            "rows": self.rows,
        }
        print(json.dumps(record), flush=True)
        return 1 if self.wrong else 0

    def _verify(self, name: str, contender: Callable[[], Any], verify: Verify) -> tuple[Verdict, float]:
        """Return the verdict, and how many seconds this first call took."""
        try:
            start = time.perf_counter()
            result = contender()
            synchronize(self.device)
            seconds = time.perf_counter() - start
            return verify(name, result), seconds
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            reason = str(error).strip().splitlines() or [""]
            return Verdict(float("nan"), False, f"raises {type(error).__name__}: {reason[0][:120]}"), 0.0

    def _time(self, contenders: dict[str, Callable[[], Any]], first: dict[str, float]) -> dict[str, list[float]]:
        """Take `repeats` samples of each contender, in seconds per call, in turns so that drift affects all alike."""
        calls = {}
        for name, contender in contenders.items():
            # a first call may be slower than later ones, but if it took this long, the later ones are not short either
            once = first[name] if first[name] > SLOW else self._sample(contender, 1)
            calls[name] = 1 if self.options.quick else max(1, int(SHORTEST_SAMPLE / max(once, 1e-7)))
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(self.repeats):
            medians = {name: statistics.median(s) for name, s in samples.items() if s and not name.startswith(OURS)}
            limit = max(SLOW, HOPELESS * min(medians.values(), default=0.0)) if turn >= 3 else float("inf")
            for name, contender in contenders.items():
                if medians.get(name, 0.0) <= limit:
                    samples[name].append(self._sample(contender, calls[name]))
        return samples

    def _sample(self, contender: Callable[[], Any], calls: int) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            contender()
        synchronize(self.device)
        return (time.perf_counter() - start) / calls

    def _figures(self, seconds: list[float], dtype: str, flops: int, moved: int) -> dict[str, Any]:
        median = statistics.median(seconds)
        figures = {
            "median_ms": median * 1e3,
            "min_ms": min(seconds) * 1e3,
            "max_ms": max(seconds) * 1e3,
            "samples": len(seconds),
            "gflops": flops / median / 1e9,
            "gbs": moved / median / 1e9,
            "share_of_matmul_peak": flops / median / self.peaks[dtype],
            "share_of_copy": moved / median / self.copy_bandwidth,
        }
        return {name: float(f"{figure:.4g}") for name, figure in figures.items()}

    def _print(self, row: dict[str, Any]) -> None:
        ours = row["contenders"][OURS]["median_ms"]
        print(
            f"  {'':24}{'median':>10}  {'spread':>19}{'GFLOP/s':>9}{'of peak':>9}{'GB/s':>8}{'of copy':>9}{'error':>10}"
        )
        for name, c in row["contenders"].items():
            spread = f"{c['min_ms']:.3g} to {c['max_ms']:.3g}"
            compute = f"{c['gflops']:9.1f}{c['share_of_matmul_peak']:9.0%}" if row["flops"] else f"{'':18}"
            memory = f"{c['gbs']:8.1f}{c['share_of_copy']:9.0%}" if row["bytes"] else f"{'':17}"
            ratio = c["median_ms"] / ours
            times = (
                "" if name == OURS else f"  {ratio:.2f} x {OURS}" if name.startswith(OURS) else f"  ours {ratio:.2f} x"
            )
            print(f"  {name:24}{c['median_ms']:7.4g} ms  {spread:>19}{compute}{memory}{c['error']:10.1e}{times}")
        for name, reason in row["left_out"].items():
            print(f"  {name:24}not timed: {reason}")
        sys.stdout.flush()

    def _matmul_peak(self, dtype: torch.dtype) -> float:
        """Measure the FLOP/s of a large square matrix product."""
        side = 128 if self.options.quick else 8192 if self.device.type == "cuda" else 2048
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        out = a @ b
        return 2 * side**3 / self._best(lambda: torch.matmul(a, b, out=out))

    def _copy_bandwidth(self) -> float:
        """Measure the bytes read and written per second by a copy that fits in no cache."""
        a = torch.ones((1 << 20) if self.options.quick else (1 << 27), dtype=torch.uint8, device=self.device)
        b = torch.zeros_like(a)
        return 2 * a.numel() / self._best(lambda: b.copy_(a))

    def _best(self, work: Callable[[], Any]) -> float:
        self._sample(work, 1)
        return min(self._sample(work, 1) for _ in range(1 if self.options.quick else 7))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def implementation(op: str, impl: str | None, *arguments: Any) -> str:
    """Return the implementation that will run these inputs: the op's arguments in order, with defaults filled in."""
    return dispatch.choose(op, impl or "", arguments)


def too_large(needed: int, device: torch.device) -> str | None:
    """Return why a peer that needs this many bytes should not be started, or None if the memory suffices."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return None if needed < 0.8 * free else f"needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free"


def largest_error(got: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest element; infinite if shapes differ or there is a NaN."""
    if got.shape != exact.shape:
        return float("inf")
    error = (got.to(exact.dtype) - exact).abs().max().item()
    return error / max(exact.abs().max().item(), 1e-30) if error == error else float("inf")


def judge(errors: dict[str, float], allowed: float) -> Verdict:
    """Call a contender right if the largest of its errors (of the result or of a gradient) is at most `allowed`."""
    worst = max(errors, key=errors.get)
    detail = f"error of {worst} {errors[worst]:.2e}, allowed {allowed:.2e}, relative to its largest element"
    return Verdict(errors[worst], errors[worst] <= allowed, detail)
