"""Tests of nearest_codebook and nearest_codebook_stats beyond the table of all ops (test_ops.py).

The contract is tested to the bit. `documented` evaluates the formula of the docstring with float32 fused multiply-adds
in index order, and every search on every instruction set must find the same index.
"""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_fast import ops
from ldm_fast.ops import codebook_op, cpu, dispatch, native, reference
from ldm_fast.ops.cases import wrong_codes

NAN, INF = float("nan"), float("inf")
NATIVE = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="relies on how Linux counts and grants memory")
ISAS = native.isas()
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def name(value: Any) -> str:
    return str(value).removeprefix("torch.")


@pytest.fixture
def threads() -> Iterator[Any]:
    """Set the number of threads; the old number is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- the documented distance ----


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a b + c in float32, rounded once.

    The product is exact in float64, and so is the error of the sum (Knuth's two-sum). An inexact sum is rounded to odd.
    Rounding it to float32 is then correct, since 53 digits are more than twice 24 plus two.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)  # NaN if there are infinities: compares as if nothing were lost
    bits = total.view(torch.int64)
    step = torch.where((lost > 0) == (total > 0), 1, -1)
    inexact = ((lost > 0) | (lost < 0)) & (bits & 1 == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


def documented(z: Tensor, codebook: Tensor) -> Tensor:
    """Return the argmin of ½‖e‖² - ⟨z, e⟩ as the op documents it. z (N, d), codebook (K, d) → (N,)."""
    z, codebook = z.float(), codebook.float()
    norm = torch.zeros(codebook.shape[0])
    for e in codebook.T:
        norm = fused(e, e, norm)
    indices = []
    for rows in z.split(max(1, (1 << 20) // codebook.shape[0])):
        distance = (norm * 0.5).expand(rows.shape[0], -1)  # (rows, K)
        for z_i, e_i in zip(rows.T, codebook.T, strict=True):
            distance = fused(-z_i[:, None], e_i, distance)
        smallest = distance.masked_fill(distance.isnan(), INF).amin(1, keepdim=True)
        indices.append((distance == smallest).int().argmax(1))  # the first; 0 if there is none
    return torch.cat(indices)


def as_fraction(value: Tensor) -> Fraction:
    return Fraction(float(value))


def middles(count: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors with products halfway between two float32, and addends of both signs far below the last digit."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(1 << 22, 1 << 23, (count,), generator=generator) * 2 + 1
    a = a[(3 * a >= 1 << 24) & (3 * a < 1 << 25)].float()  # 3a takes 25 digits, the last one is 1
    c = 2.0 ** -torch.randint(60, 120, a.shape, generator=generator).float()
    return a, torch.full_like(a, 3 * 2.0**-40), torch.where(torch.arange(len(a)) % 2 == 0, c, -c)


def test_the_formula_itself() -> None:
    """`fused` rounds the exact result once; plain float64 would round some of these results twice."""
    generator = torch.Generator().manual_seed(1)
    a, b, c = (
        torch.randn(500, generator=generator) * 10.0 ** torch.randint(-15, 16, (500,), generator=generator).float()
        for _ in range(3)
    )
    twice = 0
    for x, y, w in zip(*(torch.cat(pair) for pair in zip((a, b, c), middles(), strict=True)), strict=True):
        exact, got = as_fraction(x) * as_fraction(y) + as_fraction(w), fused(x, y, w)
        near = [torch.nextafter(got, torch.tensor(side)) for side in (-INF, INF)]
        errors = [abs(as_fraction(value) - exact) for value in (got, *near) if value.isfinite()]
        assert errors[0] == min(errors)
        if errors.count(errors[0]) > 1:
            assert got.view(torch.int32) % 2 == 0, "ties go to even"
        twice += int(got != (x.double() * y.double() + w.double()).float())
    assert twice > 100, "no addend mattered"


# ---- every search on every instruction set ----


def search(z: Tensor, codebook: Tensor, way: str = "auto", isa: str | None = None) -> Tensor:
    """Search with the native kernels, by default on the widest instruction set. Returns (N,)."""
    before = native.extension().isa()
    native.extension().set_isa(isa or ISAS[-1])
    try:
        return cpu.nearest_codebook(z[None], codebook, way)[0]
    finally:
        native.extension().set_isa(before)


def _scaled(z: Tensor, codebook: Tensor, of_z: float, of_codebook: float) -> tuple[Tensor, Tensor]:
    return z * of_z, codebook * of_codebook


def _powers(x: Tensor, low: int, high: int) -> Tensor:
    """Multiply every row of x by a power of ten of its own."""
    return x * 10.0 ** torch.randint(low, high, (x.shape[0], 1)).float()


def _trained(z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    return e[torch.arange(z.shape[0]) * 7 % e.shape[0]] + 0.1 * z, e


def _kmeans(z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Take the codes from two rounds of k-means on the rows themselves."""
    for _ in range(2):
        chosen = torch.cdist(z, e).argmin(1)
        counts = torch.bincount(chosen, minlength=e.shape[0])[:, None]
        e = torch.where(counts > 0, torch.zeros_like(e).index_add_(0, chosen, z) / counts.clamp(min=1), e)
    return z, e


def _permuted(z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Make all codes equally far from rows of equal numbers, so that only rounding decides.

    The numbers are exact in bfloat16, so that no bound is wide for another reason.
    """
    z, e = z.bfloat16().float(), e.bfloat16().float()
    return z[:, :1].expand(z.shape), e[0][torch.rand(e.shape).argsort(1)]


def _non_finite_rows(z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    z[::7], z[3::7, 0], z[5::11, -1], z[6::13] = NAN, INF, -INF, 1e30
    return z, e


def _non_finite_codes(z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    e[::9], e[4::9, 0], e[5::9], z[::7, 0] = NAN, INF, 1e30, NAN
    return z, e


DATA = {
    "normal": lambda z, e: (z, e),
    "trained": _trained,
    "kmeans": _kmeans,
    "lattice": lambda z, e: ((2 * z).round().clamp(-4, 4), (2 * e).round().clamp(-4, 4)),
    "duplicates": lambda z, e: (z, e[torch.arange(e.shape[0]) * 5 % max(1, e.shape[0] // 4)]),
    "offset 10": lambda z, e: (z + 10, e + 10),
    "offset 1e4": lambda z, e: (z + 1e4, e + 1e4),
    "far": lambda z, e: (z + 30, e),
    "one point": lambda z, e: (z, 0 * e + 1.5),
    "small ball": lambda z, e: (z, 1e-4 * e),
    "zeros": lambda z, e: (z, 0 * e),
    "permuted": _permuted,
    "huge": lambda z, e: _scaled(z, e, 1e15, 1e15),
    "huge rows": lambda z, e: _scaled(z, e, 1e25, 1e15),
    "overflowing": lambda z, e: _scaled(z, e, 1e20, 1e20),
    "denormal": lambda z, e: _scaled(z, e, 1e-40, 1e-40),
    "vanishing": lambda z, e: _scaled(z, e, 1e-20, 1e-18),
    "all sizes": lambda z, e: (_powers(z, -30, 20), _powers(e, -20, 15)),
    "heavy tails": lambda z, e: (z / torch.randn(z.shape[0], 1), e / torch.randn(e.shape[0], 1) ** 3),
    "NaN rows": _non_finite_rows,
    "NaN codes": _non_finite_codes,
}
SHAPES = {1: (70, 700), 2: (67, 1), 3: (300, 1000), 4: (130, 3001), 5: (129, 65), 7: (65, 513), 8: (131, 900)}
SHAPES |= {9: (33, 130), 16: (130, 300), 31: (40, 1), 32: (67, 300), 33: (70, 129), 64: (131, 257), 100: (65, 140)}
SHAPES |= {257: (64, 150)}


@functools.cache
def data(kind: str, width: int, rows: int, codes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(width)
        z, codebook = DATA[kind](torch.randn(rows, width), torch.randn(codes, width))
    return z.to(dtype), codebook.to(dtype)


@NATIVE
@pytest.mark.parametrize("width", SHAPES)
@pytest.mark.parametrize("kind", DATA)
def test_every_search_on_every_isa_finds_the_documented_index(kind: str, width: int) -> None:
    z, codebook = data(kind, width, *SHAPES[width])
    expected = documented(z, codebook)
    for isa, way in itertools.product(ISAS, cpu.SEARCHES):
        wrong = search(z, codebook, way, isa) != expected
        assert not wrong.any(), (
            f"{way} on {isa}: {int(wrong.sum())} of {len(z)}, the first at {int(wrong.int().argmax())}"
        )


@NATIVE
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name)
@pytest.mark.parametrize("width", (1, 4, 8, 33, 64))
@pytest.mark.parametrize("kind", ("normal", "kmeans", "lattice", "duplicates", "offset 10", "NaN rows", "NaN codes"))
def test_half_precision_is_widened_exactly(kind: str, width: int, dtype: torch.dtype) -> None:
    z, codebook = data(kind, width, 100, 600, dtype)
    expected = documented(z, codebook)
    for isa, way in itertools.product(ISAS, cpu.SEARCHES):
        assert torch.equal(search(z, codebook, way, isa), expected), f"{way} on {isa}"


@NATIVE
def test_no_sum_is_rounded_twice() -> None:
    """For codes A = (0, b) and B = (a, 0), s(B) is halfway between two float32 except for ½‖B‖², which decides.

    Rounded once, s(B) equals s(A), and A wins because it comes first. Rounded twice, half of the s(B) would be smaller.
    """
    a, b, _ = middles()
    small = b[0]
    assert small**2 / 2 < 2.0**-53 * 3 * a.min() * 2.0**-40
    for z_0 in a[:300]:
        below = float(Fraction(float(z_0)) * Fraction(float(small)))
        below = torch.tensor(below, dtype=torch.float64).float()
        if float(below) > float(z_0) * float(small):
            below = torch.nextafter(below, torch.tensor(0.0))
        codebook = torch.tensor([[0.0, float(below) * 2.0**-24], [float(small), 0.0]])
        z = torch.tensor([[float(z_0), 2.0**24]])
        assert int(documented(z, codebook)) == 0
        for isa in ISAS:
            assert int(search(z, codebook, "brute force", isa)) == 0, isa


@NATIVE
def test_ties_across_groups_and_chunks() -> None:
    """Among equal codes the lowest index wins, whichever chunk or group of the pruned search holds it."""
    generator = torch.Generator().manual_seed(0)
    for width, codes in ((2, 4000), (4, 4000), (8, 4000), (64, 1500)):
        few = torch.randint(-3, 4, (40, width), generator=generator).float()
        codebook = few[torch.randint(40, (codes,), generator=generator)]
        z = torch.randint(-3, 4, (200, width), generator=generator).float()
        expected = documented(z, codebook)
        first = (codebook[expected][:, None] == codebook).all(-1).int().argmax(1)
        assert torch.equal(first, expected)
        for isa, way in itertools.product(ISAS, cpu.SEARCHES):
            assert torch.equal(search(z, codebook, way, isa), expected), f"{way} on {isa}, d {width}"


@NATIVE
@pytest.mark.parametrize("way", cpu.SEARCHES)
@pytest.mark.parametrize(("width", "kind"), [(3, "kmeans"), (8, "offset 10"), (5, "small ball"), (64, "normal")])
def test_result_does_not_depend_on_threads_and_split(width: int, kind: str, way: str, threads: Any) -> None:
    """The result is the same even if a search is given up and tried again (small ball)."""
    z, codebook = data(kind, width, 3000, 1100)
    threads(1)
    expected = search(z, codebook, way)
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(search(z, codebook, way), expected), f"{count} threads"
    for size in (1, 64, 997):
        some = z if size > 1 else z[:50]
        assert torch.equal(torch.cat([search(part, codebook, way) for part in some.split(size)]), expected[: len(some)])
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    assert torch.equal(search(z[order], codebook, way), expected[order])


# ---- maps, strides, sizes ----

MAPS = {
    "contiguous": lambda z: z.contiguous(),
    "channels_last": lambda z: z.contiguous(memory_format=torch.channels_last),
    "some channels": lambda z: torch.cat([z, z + 1], 1)[:, : z.shape[1]],
    "every second sample": lambda z: z.repeat_interleave(2, 0)[::2],
    "one pixel repeated": lambda z: z[:, :, :1, :1].expand(z.shape),
    "transposed": lambda z: z.mT.contiguous().mT,
    "crop": lambda z: torch.nn.functional.pad(z, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
}
COPIED = ("crop", "transposed")  # no single stride leads through their pixels


@pytest.mark.parametrize("impl", dispatch.IMPLEMENTATIONS["nearest_codebook"])
@pytest.mark.parametrize("layout", MAPS)
@pytest.mark.parametrize("width", (3, 8, 40))
def test_maps_in_any_layout(width: int, layout: str, impl: str) -> None:
    if dispatch.why_not("nearest_codebook", impl, (torch.zeros(1, 1, 1), torch.zeros(1, 1))) is not None:
        pytest.skip(f"{impl} takes no CPU tensors here")
    z, codebook = data("kmeans", width, 2 * 9 * 13, 300)
    z = MAPS[layout](z.view(2, 9, 13, width).permute(0, 3, 1, 2))
    vectors = codebook_op._vectors(z)
    assert vectors.shape == (2, 9 * 13, width)
    assert (vectors.data_ptr() == z.data_ptr()) == (layout not in COPIED), "a map is copied only if it has to be"
    expected = documented(z.permute(0, 2, 3, 1).reshape(-1, width), codebook).view(2, 9, 13)
    got = ops.nearest_codebook(z, codebook, impl=impl)
    assert got.shape == (2, 9, 13) and got.dtype == torch.int64 and got.is_contiguous()
    assert torch.equal(got, expected)
    assert torch.equal(ops.nearest_codebook_stats(z, codebook, impl=impl)[0], expected)


@NATIVE
@pytest.mark.parametrize(("rows", "codes", "width"), [(0, 5, 3), (0, 1, 64), (1, 1, 1), (3, 1, 2), (1, 17, 300)])
@pytest.mark.parametrize("impl", ("cpu", "reference"))
def test_smallest_sizes(rows: int, codes: int, width: int, impl: str) -> None:
    z, codebook = torch.ones(rows, width), torch.ones(codes, width)
    indices, counts, sums = ops.nearest_codebook_stats(z, codebook, impl=impl)
    assert torch.equal(indices, torch.zeros(rows, dtype=torch.int64))
    assert counts.tolist() == [rows] + [0] * (codes - 1)
    assert torch.equal(sums, torch.cat([torch.full((1, width), float(rows)), torch.zeros(codes - 1, width)]))
    empty = ops.nearest_codebook(torch.ones(2, width, 0, 4), codebook, impl=impl)
    assert empty.shape == (2, 0, 4) and empty.dtype == torch.int64


@NATIVE
@LINUX
def test_more_than_two_to_the_31_elements_apart() -> None:
    """Seven rows and codes lie in 7.5 GB of address space, of which only a few pages are touched."""
    apart = 5 * 2**27
    far = torch.empty(6 * apart + 4, dtype=torch.bfloat16).as_strided((7, 4), (apart, 1))
    assert 6 * apart > 2**31
    far.copy_(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)))
    near = far.contiguous()
    expected = documented(near, near)
    assert len(set(expected.tolist())) > 2
    for way in cpu.SEARCHES:
        assert torch.equal(search(far, near, way), expected) and torch.equal(search(near, far, way), expected)
    as_map = far.T[None, :, :, None].expand(2, 4, 7, 3)
    assert torch.equal(ops.nearest_codebook(as_map, near, impl="cpu"), expected[None, :, None].expand(2, 7, 3))
    stats = ops.nearest_codebook_stats(far, far, impl="cpu")
    for got, want in zip(stats, ops.nearest_codebook_stats(near, near, impl="cpu"), strict=True):
        assert torch.equal(got, want)


# ---- statistics ----


def test_stats_by_the_reference() -> None:
    """The reference, which defines "correct", gives the counts and sums of a plain loop."""
    z, codebook = data("lattice", 3, 60, 20, torch.float64)
    indices, counts, sums = reference.nearest_codebook_stats(z[None], codebook)
    for k in range(20):
        chosen = z[indices[0] == k]
        assert int(counts[k]) == len(chosen) and torch.equal(sums[k], chosen.sum(0))
    assert sums.dtype == torch.float64 and torch.equal(indices[0], reference.nearest_codebook(z, codebook))


@NATIVE
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=name)
@pytest.mark.parametrize("width", (1, 3, 4, 8, 16, 21, 64))
@pytest.mark.parametrize("way", cpu.SEARCHES)
def test_stats(way: str, width: int, dtype: torch.dtype, threads: Any) -> None:
    """The indices are those of the plain op. Sums are taken in float64 in the order of the rows, and rounded once.

    With 40,000 rows several threads count. One of the codes gets no rows, another gets thousands.
    """
    rows = 40_000 if width <= 4 else 3000
    z, codebook = data("normal", width, rows, 70, dtype)
    z, codebook = z.clone(), codebook.clone()
    z[100:5000], codebook[33] = codebook[7], 30.0
    expected = search(z, codebook)
    counts = torch.bincount(expected, minlength=70)
    sums = torch.zeros(70, width, dtype=torch.float64).index_add_(0, expected, z.double()).float()
    assert int(counts[33]) == 0 and int(counts[7]) > min(rows - 100, 4900) * 0.9
    for count in (1, 2, 3, 7):
        threads(count)
        got = cpu.nearest_codebook_stats(z[None], codebook, way)
        for ours, want in zip(got, (expected[None], counts, sums), strict=True):
            assert torch.equal(ours, want), f"{count} threads"


@NATIVE
def test_stats_of_a_map_agree_with_the_reference() -> None:
    z, codebook = data("lattice", 4, 2 * 9 * 13, 50)  # no rounding, so there is one right answer
    z = z.view(2, 9, 13, 4).permute(0, 3, 1, 2).contiguous()
    ours, theirs = (ops.nearest_codebook_stats(z, codebook, impl=impl) for impl in ("cpu", "reference"))
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert int(ours[1].sum()) == 2 * 9 * 13


@NATIVE
def test_stats_with_nan() -> None:
    """A row with NaN counts for the code that its index names, and spoils only that code's sum."""
    z, codebook = data("normal", 4, 200, 30)
    z = z.clone()
    z[17, 2] = NAN
    for impl in ("cpu", "reference"):
        indices, counts, sums = ops.nearest_codebook_stats(z, codebook, impl=impl)
        assert int(indices[17]) == 0 and torch.equal(counts, torch.bincount(indices, minlength=30))
        assert sums.isnan().nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("impl", (None, "cpu", "reference"))
def test_nothing_is_differentiable(impl: str | None) -> None:
    """The ops take tensors that need gradients and give none; straight-through gradients are the quantizer's job."""
    if impl == "cpu" and cpu.unavailable() is not None:
        pytest.skip(str(cpu.unavailable()))
    z, codebook = (t.clone().requires_grad_() for t in data("normal", 4, 50, 30))
    indices, counts, sums = ops.nearest_codebook_stats(z * 2, codebook * 2, impl=impl)
    assert not indices.requires_grad and not counts.requires_grad and not sums.requires_grad
    assert not ops.nearest_codebook(z, codebook, impl=impl).requires_grad
    (codebook[indices] - z + sums.sum()).square().sum().backward()
    assert z.grad is not None and codebook.grad is not None and codebook.grad.isfinite().all()


@pytest.mark.parametrize("dynamic", (False, True))
def test_stats_compile(dynamic: bool) -> None:
    """The op is one opaque node, also in a function that is called with several shapes, maps included."""

    def function(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        indices, counts, sums = ops.nearest_codebook_stats(z * 1.5, codebook)
        return codebook[indices].sum(), sums / counts.clamp(min=1)[:, None]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((12, 4), (2, 4, 5, 3), (3, 4, 7, 2)):
        z, codebook = torch.randn(shape), torch.randn(9, 4)
        for got, want in zip(compiled(z, codebook), function(z, codebook), strict=True):
            torch.testing.assert_close(got, want)


def test_a_module_without_an_op_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS["nearest_codebook_stats"], "cuda", "ldm_fast.ops.version")
    dispatch.implementation.cache_clear()
    z, codebook = data("normal", 4, 20, 30)
    assert len(ops.nearest_codebook_stats(z, codebook)) == 3
    with pytest.raises(ValueError, match="ldm_fast.ops.version does not compute nearest_codebook_stats"):
        ops.nearest_codebook_stats(z, codebook, impl="cuda")
    dispatch.implementation.cache_clear()


# ---- long tests ----


@NATIVE
@pytest.mark.slow
def test_a_hundred_million_pairs() -> None:
    """In 10^8 pairs of a vector and a code no index is wrong, as judged in float64, and all searches agree.

    For each kind of data some rows are also compared with the documented formula, bit for bit.
    """
    pairs = 0
    finite = [kind for kind in DATA if kind not in ("NaN rows", "NaN codes", "overflowing", "huge rows", "all sizes")]
    for kind, (width, rows, codes) in itertools.product(
        finite, ((3, 2048, 2048), (4, 1024, 4096), (8, 1024, 2048), (64, 1024, 1024), (256, 256, 1024))
    ):
        z, codebook = data(kind, width, rows, codes)
        found = search(z, codebook)
        pairs += rows * codes
        assert not wrong_codes(z, codebook, found).any(), f"{kind}, d {width}"
        assert torch.equal(found[::50], documented(z[::50], codebook)), f"{kind}, d {width}"
        for way in cpu.SEARCHES:
            assert torch.equal(search(z, codebook, way), found), f"{kind}, d {width}, {way}"
    assert pairs >= 1e8


MEMORY = """
import sys, torch
from pathlib import Path
from ldm_fast import ops
from ldm_fast.ops import cpu, native
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
z, codebook = torch.randn(1_000_000, 4), torch.randn(16384, 4)
getattr(ops, sys.argv[1])(z[:1000], codebook[:100], impl="cpu")
before = peak()
getattr(ops, sys.argv[1])(z, codebook, impl="cpu")
print(peak() - before)
"""


@NATIVE
@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("op", ("nearest_codebook", "nearest_codebook_stats"))
def test_memory(op: str) -> None:
    """A million vectors and 16384 codes take less than 100 MB; the matrix of distances would take 65 GB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, op], capture_output=True, text=True, check=True)
    assert 7e6 < int(done.stdout) < 100e6
