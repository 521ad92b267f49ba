"""Inputs of the program in this folder (sizes, data and layouts), and the files that it reads and writes."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
METHODS = ("chunk", "tiled", "tensor")
# Multiprocessors of the GPU to plan for. Any grid fills 0 of them; for 64 the codes are divided into ranges.
NO_SPLIT, SPLIT = 0, 64


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    d: int
    dtype: str = "float32"
    sms: int = NO_SPLIT
    data: str = "normal"
    layout: str = "rows"
    stats: bool = False

    def __str__(self) -> str:
        ends = ("-split" if self.sms == SPLIT else "") + ("-stats" if self.stats else "")
        return f"n{self.n}-k{self.k}-d{self.d}-{self.dtype}-{self.data}-{self.layout}{ends}"

    @property
    def method(self) -> str:
        if self.d <= 16:
            return "chunk"
        return "tensor" if self.n >= 64 and self.k >= 64 and 32 <= self.d <= 4096 else "tiled"


DIMS = (1, 3, 4, 5, 8, 16, 17, 64)
TENSOR_DATA = ("normal", "lattice", "twice", "offset", "huge", "denormal", "underflow", "nonfinite", "close", "scales")
CASES = [
    # Awkward sizes: no query or one; less than a warp, a vector, a chunk or a tile; one more than several of these.
    *[Case(n, k, d) for n in (1, 33, 130) for k in (1, 2, 17, 300) for d in DIMS],
    *[Case(33, 1025, d) for d in DIMS],
    *[Case(0, 17, d) for d in (4, 64)],
    *[Case(33, 1025, d, sms=SPLIT) for d in (*DIMS, 2, 6, 7, 9, 12, 13, 40)],
    *[Case(33, 300, d) for d in (2, 6, 7, 9, 12, 13, 40)],
    *[Case(1030, 65, d) for d in (4, 7, 24)],  # more than one block of queries
    *[Case(33, 300, d, dtype, sms) for d in DIMS for dtype in ("float16", "bfloat16") for sms in (NO_SPLIT, SPLIT)],
    *[Case(33, 300, d, data="lattice", sms=sms) for d in DIMS for sms in (NO_SPLIT, SPLIT)],
    *[Case(33, 300, d, data="twice", sms=sms) for d in (1, 4, 64) for sms in (NO_SPLIT, SPLIT)],
    *[Case(33, 300, d, data=data) for d in (1, 4, 64) for data in ("offset", "huge", "denormal", "close", "scales")],
    *[Case(40, 300, d, data="nonfinite", sms=sms) for d in (1, 4, 16, 17, 64) for sms in (NO_SPLIT, SPLIT)],
    *[Case(33, 600, d, data="underflow", sms=sms) for d in (1, 4, 16, 40) for sms in (NO_SPLIT, SPLIT)],
    *[Case(33, 300, d, dtype, layout="columns") for d in (3, 4, 16, 40) for dtype in ("float32", "float16")],
    *[Case(33, 300, d, dtype, layout="wide") for d in (3, 4, 16, 40) for dtype in ("float32", "bfloat16")],
    *[Case(33, 300, d, dtype, layout="padded") for d in (3, 17, 46) for dtype in ("float32", "float16")],
    *[Case(66, 70, d, dtype, layout=layout) for d in (3, 8, 20) for dtype in DTYPES for layout in ("map", "crop")],
    # On the tensor cores: a tile and a little more, whole and partial slices of dimensions, more queries than a slab.
    *[Case(64, 64, 32), Case(65, 129, 33), Case(129, 300, 47), Case(130, 128, 100), Case(600, 64, 32)],
    *[Case(130, 300, 47, dtype, sms) for dtype in DTYPES for sms in (NO_SPLIT, SPLIT)],
    *[Case(66, 300, 40, data=data, sms=sms) for data in TENSOR_DATA for sms in (NO_SPLIT, SPLIT)],
    *[Case(66, 150, 40, "bfloat16", data=data) for data in TENSOR_DATA],
    *[
        Case(66, 130, d, dtype, layout=layout)
        for d, dtype in ((33, "float32"), (40, "float16"))
        for layout in ("columns", "wide", "padded", "map", "crop")
    ],
    # Counts and sums: one code, and more than a digit can hold; one block of the sort or several; codes of many pieces.
    *[Case(300, k, d, stats=True) for k in (1, 17, 300) for d in (1, 4)],
    *[Case(130, 300, d, dtype, SPLIT, stats=True) for d, dtype in ((3, "float16"), (20, "bfloat16"), (40, "float32"))],
    *[Case(66, 70, 4, layout=layout, stats=True) for layout in ("columns", "wide", "map", "crop")],
    *[Case(4500, 5, 2, stats=True), Case(2100, 257, 1, stats=True), Case(0, 17, 4, stats=True)],
    Case(70, 300, 4, data="nonfinite", stats=True),
]
# These take minutes: a codebook with three digits, rows of many slices, many random draws near the bound.
LONG_CASES = [
    Case(5, 65537, 1, stats=True),
    *[Case(64, 64, d, data=data) for d in (1024, 4096, 4097) for data in ("normal", "close")],
    *[Case(1000, 1026, d, dtype, data=data) for d in (32, 64) for dtype in DTYPES for data in TENSOR_DATA],
    *[Case(1000, 5000, d, data=data, sms=sms) for d in (3, 4, 8) for data in TENSOR_DATA for sms in (NO_SPLIT, SPLIT)],
]
# ThreadSanitizer is slow, and the data do not matter to it, so each kernel, layout and way of merging appears once.
TSAN_CASES = [
    *[Case(33, 600, d, sms=sms) for d in (1, 4, 7, 16) for sms in (NO_SPLIT, SPLIT)],
    *[Case(130, 130, 20, sms=sms) for sms in (NO_SPLIT, SPLIT)],
    *[Case(130, 260, 40, sms=sms) for sms in (NO_SPLIT, SPLIT)],
    Case(130, 130, 40, data="nonfinite"),
    Case(33, 300, 4, "float16"),
    Case(33, 300, 64, "bfloat16", SPLIT),
    Case(33, 300, 4, layout="columns"),
    Case(66, 130, 40, "bfloat16", layout="map"),
    Case(150, 300, 1, stats=True),
]
LONG_TSAN_CASES = [Case(4500, 300, 2, stats=True), Case(600, 300, 100, sms=SPLIT), Case(3000, 600, 8, sms=SPLIT)]
# The case to run without a barrier, by the header that the barrier is in. Every kernel goes around its loops more than
# once. At d = 4 a thread computes the norms of the very codes that it staged; at d = 3 it does not.
RACE_CASES = {
    "nearest_codebook_chunk.cuh": Case(33, 600, 3),
    "nearest_codebook_tiled.cuh": Case(33, 130, 20),
    "nearest_codebook_tensor.cuh": Case(130, 260, 40, data="close"),
    "nearest_codebook_sort.cuh": Case(150, 300, 1, stats=True),
}


def make_inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z (B, S, d), with B S = n, and the codebook (k, d), in the dtype and layout of the case."""
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
        factor = 1e4 if case.dtype == "float16" else 1e18  # the largest float16 is 65504
        z, codes = z * factor, codes * factor
    elif case.data == "denormal":
        factor = 1e-6 if case.dtype == "float16" else 1e-20
        z, codes = z * factor, codes * factor
    elif case.data == "underflow":  # every distance is +0 or -0, which are equal
        z, codes = z * 1e-30, codes * 1e-30
    elif case.data == "close":  # codes in clusters that bfloat16 cannot tell apart, with queries among them
        codes = codes[torch.arange(case.k) % -(-case.k // 40)] + 1e-3 * codes
        z = codes[torch.randint(case.k, (case.n,), generator=generator)] + 1e-3 * z
    elif case.data == "scales":  # some norms are far larger than the differences that decide
        z *= 10.0 ** torch.randint(-12, 3, (case.n, 1), generator=generator)
        codes *= 10.0 ** torch.randint(-12, 3, (case.k, 1), generator=generator)
    elif case.data == "nonfinite":
        spoil(z, codes)
    return lay_out(z.to(DTYPES[case.dtype]), case.layout), lay_out_rows(codes.to(DTYPES[case.dtype]), case.layout)


def spoil(z: torch.Tensor, codes: torch.Tensor) -> None:
    """Put NaN and infinities wherever they could mislead: in codes, in rows of z, in single numbers."""
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


def lay_out(z: torch.Tensor, layout: str) -> torch.Tensor:
    """Return (n, d) as (B, S, d): one batch of vectors, or three channel-first maps, whole or parts of larger ones."""
    if layout not in ("map", "crop"):
        return lay_out_rows(z, layout)[None]
    maps = z.unflatten(0, (3, -1)).mT.contiguous()
    if layout == "crop":
        maps = torch.nn.functional.pad(maps, (5, 2), value=float("nan"))[..., 5:-2]
    return maps.mT


def lay_out_rows(x: torch.Tensor, layout: str) -> torch.Tensor:
    rows, columns = x.shape
    if layout == "columns":
        return x.t().contiguous().t()
    if layout in ("wide", "padded"):  # rows of a wider matrix; if padded, each starts at a multiple of 16 bytes
        width = columns + 3 if layout == "wide" else -(-columns // 8) * 8
        wide = torch.full((rows, width), float("nan"), dtype=x.dtype)
        wide[:, :columns] = x
        return wide[:, :columns]
    return x.contiguous()


def memory_of(x: torch.Tensor) -> bytes:
    """Return the bytes from the first element to the last, including gaps."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    flat = torch.as_strided(x, (reach + 1 if x.numel() else 0,), (1,), x.storage_offset())
    return flat.contiguous().view(torch.uint8).numpy().tobytes()


def write_cases(path: Path, cases: list[Case]) -> None:
    with path.open("wb") as file:
        for case in cases:
            z, codes = make_inputs(case)
            numbers = (*z.shape[:2], case.k, case.d, list(DTYPES).index(case.dtype), case.sms)
            file.write(struct.pack("12q", *numbers, *z.stride(), *codes.stride(), case.stats))
            file.write(memory_of(z) + memory_of(codes))


@dataclass(frozen=True)
class Result:
    index: np.ndarray  # (n,)
    counts: np.ndarray  # (k,), empty without stats
    sums: np.ndarray  # (k, d), empty without stats


@dataclass(frozen=True)
class Results:
    method: str
    ranges: int  # how many the codes were divided into
    kernel: Result
    formula: Result


def read_results(path: Path, cases: list[Case]) -> dict[Case, Results]:
    memory = np.fromfile(path, dtype=np.int64)
    start = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal start
        start += math.prod(shape)
        return memory[start - math.prod(shape) : start].reshape(shape)

    results = {}
    for case in cases:
        method, ranges = take(2)
        indices = take(case.n), take(case.n)
        k = case.k if case.stats else 0
        kernel, formula = (Result(i, take(k), take(k, case.d).view(np.float64)) for i in indices)
        results[case] = Results(METHODS[method], int(ranges), kernel, formula)
    assert start == len(memory)
    return results
