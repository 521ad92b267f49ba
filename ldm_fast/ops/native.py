"""The native CPU extension: loading it, what it was built with, and the OpenMP runtime it runs on."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


@functools.cache
def load() -> tuple[ModuleType | None, str | None, str | None]:
    """The extension module, why it is missing, and the path of the OpenMP runtime whose threads it uses."""
    try:
        from ldm_fast import _native
    except ImportError as error:
        return None, _why_missing(error), None
    path, address = _find_openmp()
    _native.set_openmp(address)
    return _native, None, path


@functools.cache
def extension() -> Any:
    return load()[0]


def _build_record() -> dict[str, Any]:
    """What setup.py noted about the build; empty if there was none."""
    try:
        return json.loads((Path(__file__).parents[1] / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _why_missing(error: ImportError) -> str:
    record = _build_record().get("_native")
    if record is None:
        return "the native CPU kernels were never built: run `pip install -e .` in the repository"
    if not record["built"]:
        return f"the native CPU kernels were not built ({record['message']}); mend that and install ldm_fast again"
    return f"the native CPU kernels cannot be loaded ({error}); install ldm_fast again"


def _find_openmp() -> tuple[str | None, int]:
    """Path of the OpenMP runtime this process has already loaded, and the address of its GOMP_parallel (0: none).

    torch's own copy goes first. Nothing is loaded here: RTLD_NOLOAD only opens what is mapped.
    """
    if not hasattr(os, "RTLD_NOLOAD"):
        return None, 0
    for path in sorted(openmp_runtimes(), key=lambda path: "torch" not in path):
        try:
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return path, ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return None, 0


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped in this process; the empty list where /proc does not tell."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)\b[^/\n]*\.so[^/\n]*)$", maps, flags=re.MULTILINE)))


def build_info() -> dict[str, Any]:
    """For `ldm-fast doctor`: how the kernels were built and what they run on here."""
    native, missing, openmp = load()
    threads = torch.get_num_threads() if openmp else 1
    info = {"missing": missing, "compiler": _build_record().get("_native", {}).get("compiler")}
    info["isas"] = native.isas() if native else []
    info["isa"] = native.isa() if native else None
    info["openmp"] = openmp or "none found in this process: the kernels run on one thread"
    return {**info, "threads": threads}


def fused_multiply_add_rate() -> float:
    """Float32 multiplications and additions a second that the kernels' instructions can reach here; for benchmarks."""
    threads, rounds = torch.get_num_threads(), 1 << 17
    result = torch.empty(threads)
    best = float("inf")
    for _ in range(99):  # half a millisecond each: some of them nothing interrupts
        start = time.perf_counter()
        count = extension().fused_multiply_adds(rounds, 0.5, result.data_ptr(), threads)
        best = min(best, time.perf_counter() - start)
    return 2 * count / best
