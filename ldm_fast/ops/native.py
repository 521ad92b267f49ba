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
from types import ModuleType
from typing import Any

import torch

from ldm_fast.ops.version import __version__

KERNELS = {"_native": "the native CPU kernels", "_native_cuda": "the CUDA kernels"}


@functools.cache
def load_module(name: str) -> tuple[ModuleType | None, str | None]:
    """`ldm_fast._native` or `ldm_fast._native_cuda`, or else the reason in one line.

    Warns, and gives nothing, if the module was built from another version of ldm_fast.
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
def load() -> tuple[ModuleType | None, str | None, str | None]:
    """The CPU module, why it is missing, and the path of the OpenMP runtime whose threads it uses."""
    module, missing = load_module("_native")
    if module is None:
        return None, missing, None
    path, address = _find_openmp()
    module.set_openmp(address)
    return module, None, path


@functools.cache
def extension() -> Any:
    return load()[0]


def _build_record(name: str) -> dict[str, Any]:
    """What setup.py noted about the build of a module; empty if there was none."""
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
    """How the CPU kernels were built, and what they run on here."""
    native, missing, openmp = load()
    threads = torch.get_num_threads() if openmp else 1
    info = {"missing": missing, "compiler": _build_record("_native").get("compiler")}
    info["isas"] = native.isas() if native else []
    info["isa"] = native.isa() if native else None
    info["openmp"] = openmp or "none found in this process: the kernels run on one thread"
    return {**info, "threads": threads}


def describe() -> list[str]:
    """What was built, what was left out and how to build it: lines for `ldm-fast doctor`."""
    lines, left_out = [], []
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
    native = load()[0]
    if native is not None:
        best = native.machine_isas()[-1]
        lines.append(f"this CPU runs {native.isa()}" + ("" if native.isas()[-1] == best else f", and it has {best}"))
    if left_out:
        lines.append(
            f"not built: {', '.join(left_out)}. Name those you want, or say LDM_FAST_TARGETS=all, and install again"
        )
    return lines


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
