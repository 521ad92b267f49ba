"""The native modules: loading them, what they were built for, and the OpenMP runtime that the CPU kernels run on."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from ldm_fast.ops.version import __version__

KERNELS = {"_native": "the native CPU kernels", "_native_cuda": "the CUDA kernels"}


@functools.cache
def load_module(name: str) -> tuple[Any, str | None]:
    """Return `ldm_fast._native` or `ldm_fast._native_cuda`, or None and the reason in one line.

    A module that was built from another version of ldm_fast is not used; a warning says so.
    """
    try:
        module = importlib.import_module(f"ldm_fast.{name}")
    except ImportError as error:
        return None, _why_missing(name, error)
    version = getattr(module, "version", "an older version")
    if version != __version__:
        reason = (
            f"{KERNELS[name]} were built from ldm_fast {version}, and this is ldm_fast {__version__}: "
            "run `pip install -e .` in the repository, or install ldm_fast again"
        )
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return None, reason
    return module, None


def warn_of_other_versions() -> None:
    """Load both modules, so that one of another version is reported when ldm_fast is imported."""
    for name in KERNELS:
        load_module(name)


@functools.cache
def extension() -> Any:
    """Return `ldm_fast._native`, which runs on the threads of the OpenMP runtime found; None if it cannot be loaded."""
    module, _ = load_module("_native")
    if module is not None:
        module.set_openmp(find_openmp()[1])
    return module


def isas() -> list[str]:
    """Return the instruction sets that were compiled in and this CPU has, the widest last; empty without kernels."""
    return list(extension().isas()) if extension() else []


def _build_record(name: str) -> dict[str, Any]:
    """Return what setup.py noted about the build of a module; empty if there was none."""
    try:
        record: dict[str, Any] = json.loads((Path(__file__).parents[1] / "_build.json").read_text()).get(name, {})
        return record
    except (OSError, ValueError):
        return {}


def _why_missing(name: str, error: ImportError) -> str:
    record = _build_record(name)
    if not record:
        return f"{KERNELS[name]} were never built: run `pip install -e .` in the repository"
    if not record["built"]:
        return f"{KERNELS[name]} were not built ({record['message']}); mend that and install ldm_fast again"
    return f"{KERNELS[name]} cannot be loaded ({error}); install ldm_fast again"


@functools.cache
def find_openmp() -> tuple[str | None, int]:
    """Return the path of the OpenMP runtime in this process and the address of its GOMP_parallel; (None, 0) without.

    torch's own copy comes first. Nothing is loaded here: RTLD_NOLOAD only opens what is mapped.
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
    """Return the paths of the OpenMP runtimes mapped in this process; empty if there is no /proc."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)\b[^/\n]*\.so[^/\n]*)$", maps, flags=re.MULTILINE)))


def describe() -> list[str]:
    """Return what was built, what was left out and how to build it, as lines for `ldm-fast doctor`."""
    lines: list[str] = []
    left_out: list[str] = []
    for name, kernels in KERNELS.items():
        module, missing = load_module(name)
        if module is None:
            lines.append(str(missing))
            continue
        record = _build_record(name)
        built = record.get("isas") or [f"sm_{arch}" for arch in record.get("architectures", [])]
        left_out += [str(target) if "isas" in record else f"sm_{target}" for target in record.get("left_out", [])]
        by = record.get("compiler") or f"nvcc {record.get('nvcc', '')}, and PTX for newer GPUs"
        lines.append(f"{kernels.removeprefix('the ')} {module.version}: {', '.join(built)} ({by})")
    if native := extension():
        best, openmp = native.machine_isas()[-1], find_openmp()[0]
        lines.append(f"runs {native.isa()}" + ("" if native.isas()[-1] == best else f", but this CPU has {best}, too"))
        lines.append(f"threads of {openmp}" if openmp else "one thread: there is no OpenMP runtime in this process")
    if left_out:
        lines.append(
            f"not built: {', '.join(left_out)} (set LDM_FAST_TARGETS to those you want, or to all, and install again)"
        )
    return lines


def fused_multiply_add_rate() -> float:
    """Measure how many float32 multiplications and additions a second the kernels' instructions reach here."""
    threads, rounds = torch.get_num_threads(), 1 << 17
    result = torch.empty(threads)
    best = float("inf")
    for _ in range(99):  # half a millisecond each, so that some are not interrupted
        start = time.perf_counter()
        count: int = extension().fused_multiply_adds(rounds, 0.5, result.data_ptr(), threads)
        best = min(best, time.perf_counter() - start)
    return 2 * count / best
