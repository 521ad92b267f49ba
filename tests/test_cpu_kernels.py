"""Tests of the native CPU kernels beyond the table of all ops (test_ops.py): threads, instruction sets, exp, memory."""

import functools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ldm_fast.ops import cpu, native, reference
from ldm_fast.ops.arguments import Norm
from ldm_fast.ops.cases import CASES, make_inputs

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

ISAS = native.isas()
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def isa(request):
    """Run the test with the instruction set that it is parametrised by."""
    before = native.extension().isa()
    native.extension().set_isa(request.param)
    yield request.param
    native.extension().set_isa(before)


@pytest.fixture
def threads():
    """Set the number of threads; the old number is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def group_norm_arguments(shape, groups, channels_last, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x = normal(*shape).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    batch, channels = shape[:2]
    vectors = normal(channels), normal(channels)
    return Norm(x, groups, *vectors, 1e-5, "silu", normal(batch, channels), normal(batch, channels))


def attention_arguments(shape, dtype=torch.float32):
    batch, heads, rows, keys, width = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, rows, heads, width, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, batch, keys, heads, width, generator=generator).to(dtype).transpose(2, 3)
    mask = torch.rand(1, 1, rows, keys, generator=generator) > 0.3
    return q, k, v, mask.expand(batch, heads, rows, keys), width**-0.5


def run_attention(shape, dtype=torch.float32):
    """Run forward and backward, and return a flat list of tensors."""
    arguments = attention_arguments(shape, dtype)
    out, lse = cpu.attention(*arguments)
    grad = torch.empty_like(out).copy_(torch.linspace(-1, 1, out.numel()).view(out.shape))
    return [out, lse, *cpu.attention_backward(grad, *arguments, out, lse)]


def codebook_arguments(rows, codes, width):
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(codes, width, generator=generator)
    codebook[codes // 2 :] = codebook[: codes - codes // 2]  # every code twice: ties everywhere
    return torch.randn(1, rows, width, generator=generator), codebook


def doubled(norm):
    return Norm(*(t.double() if isinstance(t, torch.Tensor) else t for t in norm))


@functools.lru_cache(maxsize=1)  # instruction sets vary first
def exact_group_norm(*of):
    return reference.group_norm_silu(doubled(group_norm_arguments(*of)))


def run_group_norm(shape, groups, channels_last, dtype=torch.float32):
    """Run forward and backward, and return a flat list of tensors."""
    norm = group_norm_arguments(shape, groups, channels_last, dtype)
    y, statistics = cpu.group_norm_silu(norm)
    grad = torch.empty_like(norm.x).copy_(torch.linspace(-1, 1, norm.x.numel()).view(shape))
    gradients = cpu.group_norm_silu_backward(grad, norm, statistics)
    return [y, statistics, *gradients]


def run_split_group_norm(shape, groups, channels_last, dtype=torch.float32):
    """Compute the statistics and apply them, and return both results."""
    norm = group_norm_arguments(shape, groups, channels_last, dtype)
    stats = cpu.group_norm_stats(norm.x, groups)
    return [stats, cpu.group_norm_apply(norm, stats)]


# Shapes on both sides of every decision the kernels take: one slab or several, more units than threads or fewer, full
# vectors or a remainder.
RUNS = {
    "group_norm one slab": lambda: run_group_norm((3, 30, 7, 5), 3, False),
    "group_norm whole vectors": lambda: run_group_norm((3, 240, 12, 16), 4, False),
    "group_norm many slabs": lambda: run_group_norm((1, 64, 70, 65), 2, False),
    "group_norm few units": lambda: run_group_norm((1, 6, 300, 301), 1, False),
    "group_norm channels_last": lambda: run_group_norm((3, 320, 16, 16), 32, True),
    "group_norm channels_last many slabs": lambda: run_group_norm((1, 37, 90, 70), 1, True),
    "group_norm bfloat16 one slab": lambda: run_group_norm((2, 64, 33, 17), 4, False, torch.bfloat16),
    # Results so large that they are written past the caches, with and without rows of whole cache lines.
    "group_norm large": lambda: run_group_norm((1, 64, 224, 224), 2, False),
    "group_norm large channels_last": lambda: run_group_norm((1, 64, 224, 224), 32, True),
    "group_norm large odd": lambda: run_group_norm((1, 65, 225, 223), 5, False),
    "group_norm large bfloat16": lambda: run_group_norm((2, 64, 224, 224), 32, False, torch.bfloat16),
    "group_norm large bfloat16 channels_last": lambda: run_group_norm((2, 64, 224, 224), 2, True, torch.bfloat16),
    "group_norm split": lambda: run_split_group_norm((1, 64, 70, 65), 2, False),
    "group_norm split channels_last": lambda: run_split_group_norm((1, 37, 90, 70), 1, True),
    "group_norm bfloat16": lambda: run_group_norm((5, 64, 33, 17), 32, True, torch.bfloat16),
    "attention few keys": lambda: run_attention((2, 4, 130, 77, 40)),
    "attention many keys": lambda: run_attention((2, 4, 70, 150, 24)),
    "attention one head": lambda: run_attention((1, 1, 700, 600, 33)),
    "attention wide head": lambda: run_attention((1, 3, 100, 140, 400)),
    "attention more keys than all heads at once": lambda: run_attention((1, 3, 5, 65536, 4)),
    "attention bfloat16": lambda: run_attention((1, 3, 300, 301, 40), torch.bfloat16),
    "nearest_codebook": lambda: [cpu.nearest_codebook(*codebook_arguments(1000, 1500, 5))],
    "nearest_codebook narrow": lambda: [cpu.nearest_codebook(*codebook_arguments(16000, 1500, 4))],
    "nearest_codebook wide": lambda: [cpu.nearest_codebook(*codebook_arguments(1000, 1500, 33))],
    "nearest_codebook_stats": lambda: cpu.nearest_codebook_stats(*codebook_arguments(40000, 300, 5)),
}


@pytest.mark.parametrize("name", RUNS)
def test_result_does_not_depend_on_threads(name, threads):
    threads(1)
    expected = [t.clone() for t in RUNS[name]()]
    for count in (2, 3, 7):
        threads(count)
        for got, want in zip(RUNS[name](), expected, strict=True):
            assert torch.equal(got, want), f"{count} threads"


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels, spatial", [(20, 64), (60, 192), (10, 4096)])
def test_a_group_measured_beside_another_has_the_same_bits(isa, threads, dtype, channels, spatial):
    """If rows are whole vectors, a group is measured while the one before it is normalised. A single group is not."""
    threads(1)
    x = torch.randn(2, 4 * channels, spatial) * torch.linspace(1, 30, 4).repeat_interleave(channels)[:, None] + 7
    x, weight = x.to(dtype), torch.rand(4 * channels)
    y, statistics = cpu.group_norm_silu(Norm(x, 4, weight, activation="silu"))
    for group in range(4):
        of_group = slice(group * channels, (group + 1) * channels)
        for sample in range(2):
            alone = x[sample : sample + 1, of_group].contiguous()
            expected = cpu.group_norm_silu(Norm(alone, 1, weight[of_group].clone(), activation="silu"))
            assert torch.equal(statistics[:, sample, group], expected[1][:, 0, 0])
            assert torch.equal(y[sample, of_group], expected[0][0])


@pytest.mark.parametrize("name", RUNS)
def test_every_element_is_written(name):
    """PyTorch fills new tensors with NaN (or the largest integer), so an unwritten element would show."""
    expected = [t.clone() for t in RUNS[name]()]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        got = list(RUNS[name]())
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, groups", [((2, 30, 11, 7), 3), ((2, 64, 224, 224), 32)], ids=["odd", "large"])
def test_group_norm_on_every_isa(isa, channels_last, dtype, shape, groups):
    norm = group_norm_arguments(shape, groups, channels_last, dtype)
    y, (mean, rstd) = cpu.group_norm_silu(norm)
    expected = exact_group_norm(shape, groups, channels_last, dtype)
    rounding = {torch.float32: 3e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    assert (y.double() - expected[0]).norm() <= rounding * expected[0].norm()
    # The narrowest vectors add up the longest rows, of 512 numbers.
    expected_mean, expected_rstd = expected[1]
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(rstd.double(), expected_rstd, rtol=4e-6, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_silu_of_numbers_of_any_size(isa, channels_last):
    """exp2 in the sigmoid overflows at one end and underflows at the other: SiLU is then h or nearly 0, never NaN."""
    x = group_norm_arguments((2, 64, 9, 9), 32, channels_last).x
    norm = Norm(x, 32, torch.logspace(-30, 36, 64), activation="silu")
    y, _ = cpu.group_norm_silu(norm)
    h, _ = reference.group_norm_silu(doubled(norm._replace(activation=None)))
    error = (y.double() - torch.nn.functional.silu(h)).abs()
    assert (error <= 2e-6 * h.abs().amax((2, 3), keepdim=True)).all()
    assert (y[h < -200].abs() < 1e-30).all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_group_norm_with_mean_far_above_std(isa, channels_last):
    norm = group_norm_arguments((2, 64, 64, 64), 32, channels_last)
    norm = norm._replace(x=norm.x + 1000, scale=None, shift=None)
    y, _ = cpu.group_norm_silu(norm)
    expected, _ = reference.group_norm_silu(doubled(norm))
    assert (y.double() - expected).abs().max() < 1e-5
    again = cpu.group_norm_apply(norm, cpu.group_norm_stats(norm.x, norm.num_groups))
    assert torch.equal(again, y), "the two halves give the result of the whole"


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_on_every_isa(isa, dtype):
    arguments = attention_arguments((1, 2, 61, 333, 41), dtype)
    out, lse = cpu.attention(*arguments)
    expected, expected_lse = reference.attention(*(t.double() for t in arguments[:3]), *arguments[3:])
    rounding = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]
    assert (out.double() - expected).norm() <= rounding * expected.norm()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=2e-6)
    grad = torch.empty_like(out).copy_(torch.linspace(-1, 1, out.numel()).view(out.shape))
    gradients = cpu.attention_backward(grad, *arguments, out, lse)
    doubles = [t.double() for t in (grad, *arguments[:3])]
    exact = reference.attention_backward(*doubles, *arguments[3:], expected, expected_lse)
    for got, truth in zip(gradients, exact, strict=True):
        assert (got.double() - truth).norm() <= 2 * rounding * truth.norm()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_row_does_not_depend_on_the_others(isa, dtype):
    """A row depends on no other query or head: full tiles, half tiles and single rows give the same bits."""
    for shape in ((2, 3, 75, 77, 40), (2, 2, 75, 300, 24), (1, 2, 75, 40, 300)):
        q, k, v, mask, scale = attention_arguments(shape, dtype)
        out, lse = cpu.attention(q, k, v, mask, scale)
        for first, last in ((0, 1), (3, 20), (16, 75), (74, 75)):
            rows = slice(first, last)
            part, part_lse = cpu.attention(q[-1:, -1:, rows], k[-1:, -1:], v[-1:, -1:], mask[-1:, -1:, rows], scale)
            assert torch.equal(part, out[-1:, -1:, rows]) and torch.equal(part_lse, lse[-1:, -1:, rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 3, 65536, 5), (1, 1, 65536, 3, 5), (1, 2, 33, 129, 1), (1, 1, 5, 7, 1024)])
def test_attention_of_extreme_shapes(shape, dtype):
    arguments = attention_arguments(shape, dtype)
    grad = torch.ones(shape[0], shape[2], shape[1], shape[4]).to(dtype).transpose(1, 2)
    out, lse = cpu.attention(*arguments)
    gradients = cpu.attention_backward(grad, *arguments, out, lse)
    doubles = [t.double() for t in arguments[:3]]
    exact, exact_lse = reference.attention(*doubles, *arguments[3:])
    exact_gradients = reference.attention_backward(grad.double(), *doubles, *arguments[3:], exact, exact_lse)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, truth in zip((out, *gradients), (exact, *exact_gradients), strict=True):
        assert (got.double() - truth).norm() <= rounding * truth.norm()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30])
def test_attention_with_any_scale(isa, scale):
    q, k, v, mask, _ = attention_arguments((1, 2, 35, 150, 20))
    for kept in (mask, None):
        out, lse = cpu.attention(q, k, v, kept, scale)
        expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), kept, scale)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("shape", [(1, 2, 35, 77, 20), (1, 1, 40, 300, 24)], ids=["few keys", "many keys"])
@pytest.mark.parametrize("alike", [True, False], ids=["padding", "rows of their own"])
def test_attention_with_the_lowest_number_in_a_mask(isa, shape, alike):
    """A row of only this number is uniform, as in PyTorch; beside other numbers it masks. A row of -inf gives zeros."""
    q, k, v, _, scale = attention_arguments(shape)
    rows, keys = shape[2:4]
    mask = torch.full((1, 1, 1 if alike else rows, keys), torch.finfo(torch.float32).min)
    if not alike:
        mask[:, :, 3, 5:9] = 0.0
        mask[:, :, 4] = -torch.inf
    out, _ = cpu.attention(q, k, v, mask.expand(*shape[:2], rows, keys), scale)
    expected, _ = reference.attention(q.double(), k.double(), v.double(), mask.expand(*shape[:2], rows, keys), scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_ignores_what_is_masked(isa, dtype):
    """Padded keys give the result of only the kept keys, whatever finite numbers the padding holds."""
    q, k, v, _, scale = attention_arguments((2, 3, 40, 200, 24), dtype)
    kept = torch.tensor([77, 150])
    mask = (torch.arange(200) < kept[:, None])[:, None, None].expand(2, 3, 40, 200)
    out, _ = cpu.attention(q, k, v, mask, scale)
    for row, n in enumerate(kept.tolist()):
        alone, _ = cpu.attention(q[row : row + 1], k[row : row + 1, :, :n], v[row : row + 1, :, :n], None, scale)
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(out[row : row + 1], alone, rtol=tolerance, atol=tolerance)
    k[0, :, 77:], v[0, :, 77:] = 1e4, -1e4
    k[1, :, 150:], v[1, :, 150:] = -1e4, 1e4
    assert torch.equal(cpu.attention(q, k, v, mask, scale)[0], out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [case for case in CASES["attention"] if case.acceptance], ids=str)
def test_attention_error_is_at_most_twice_that_of_pytorch(case, dtype):
    """Errors are against float64, for the sizes of the benchmarks; half a unit in the last place is always allowed."""
    for data in ("normal", "large_logits", "constant", "one_hot"):
        small = replace(case, B=1, H=min(case.H, 2), N=min(case.N, 300), data=data)
        q, k, v = (make_inputs("attention", small, dtype)[key] for key in "qkv")
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        out, peer = cpu.attention(q, k, v, None, case.D**-0.5)[0], F.scaled_dot_product_attention(q, k, v)
        error, allowed = ((t.double() - exact).abs().max().item() for t in (out, peer))
        rounding = torch.finfo(dtype).eps / 2 * exact.abs().max().item()
        assert error <= 2 * allowed + rounding, data


PEAK_OF_WIDE_HEAD = """
import sys, torch
from ldm_fast.ops import cpu, native
def memory(which):
    return int(open("/proc/self/status").read().split(which + ":")[1].split()[0]) * 1024
torch.set_num_threads(2)
q, k, v = torch.randn(3, 1, 1, 4096, 512).to(getattr(torch, sys.argv[1]))
small = q[:, :, :64]
cpu.attention(small, small, small, None, 0.1)
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
out, lse = cpu.attention(q, k, v, None, 512**-0.5)
print(memory("VmHWM") - before)
"""


@LINUX
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_with_a_wide_head_needs_little_memory(dtype):
    """A first stage at 512² needs less than 64 MB, 8 MB for the result. The scores would be 67 MB in float32."""
    done = subprocess.run([sys.executable, "-c", PEAK_OF_WIDE_HEAD, dtype], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64e6


def test_nearest_codebook_is_the_same_on_every_isa():
    z, codebook = codebook_arguments(500, 1500, 9)
    z[0, 0], z[0, 1, 3], codebook[:3] = float("nan"), float("inf"), float("nan")
    found = []
    for isa in ISAS:
        before = native.extension().isa()
        native.extension().set_isa(isa)
        found.append(cpu.nearest_codebook(z, codebook)[0])
        native.extension().set_isa(before)
    assert found[0][0] == 0
    assert (found[0][2:] < 750).all() or (found[0][2:] >= 3).all()
    for index in found[1:]:
        assert torch.equal(index, found[0])


def exp(x):
    y = torch.full_like(x, float("nan"))
    native.extension().exp_array(x.data_ptr(), y.data_ptr(), x.numel())
    return y


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_exp_accuracy(isa):
    """For every 997th float32 between -110 and 95 the relative error is at most (2 + 1.25 |x|) 2^-24."""
    bits = torch.arange(0, 0x7F800000, 997, dtype=torch.int32)
    x = bits.view(torch.float32)
    x = torch.cat([x[x <= 95], -x[x <= 110]])
    expected = x.double().exp()
    error = (exp(x).double() - expected).abs()
    overflow = expected > torch.finfo(torch.float32).max
    assert (exp(x)[overflow & (x > 88.8)] == float("inf")).all()
    allowed = (2 + 1.25 * x.double().abs()) * 2.0**-24 * expected + 2.0**-149
    assert (error <= allowed)[~overflow].all()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_exp_special_values_and_bounds(isa):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, inf, nan, 0.0, -0.0, -3e38, 3e38])
    expected = torch.tensor([0.0, inf, nan, 1.0, 1.0, 0.0, inf])
    torch.testing.assert_close(exp(x), expected, rtol=0, atol=0, equal_nan=True)
    for n in range(35):  # no element after the first n is touched
        guarded = torch.full((n + 20,), 7.0)
        x = torch.zeros(n)
        native.extension().exp_array(x.data_ptr(), guarded.data_ptr(), n)
        assert (guarded[:n] == 1).all() and (guarded[n:] == 7).all()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_fused_multiply_adds_are_done(isa):
    """Every lane of every chain converges to 1, so their sum is the number of lanes."""
    result = torch.full((3,), float("nan"))
    count = native.extension().fused_multiply_adds(100, 0.5, result.data_ptr(), 3)
    assert (result == count / (100 * 3)).all() and count > 0


def test_unknown_isa_is_an_error():
    with pytest.raises(ValueError, match="no quantum"):
        native.extension().set_isa("quantum")


def test_the_kernels_take_only_whole_records():
    """A missing or extra field, or one of another type, raises a TypeError: nothing is read beyond the tuple."""
    x, stats = torch.randn(1, 4, 3), torch.empty(1, 2, 3, dtype=torch.float64)
    record, _ = cpu._norm(Norm(x, 2))
    native.extension().group_norm_stats(record, stats.data_ptr())
    assert torch.equal(stats, cpu.group_norm_stats(x, 2))
    q = torch.randn(1, 1, 3, 4)
    forward = cpu._attention(q, q, q, None, 1.0, q, torch.empty(1, 1, 3))
    few_strides = (*forward[:13], (4, 4), *forward[14:])
    for wrong in (record[:-1], (*record, 0), (), list(record), (*record[:7], None, *record[8:]), ("f", *record[1:])):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            native.extension().group_norm_stats(wrong, stats.data_ptr())
    for wrong in (forward[:-1], few_strides, (*forward[:13], 4, *forward[14:]), record):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            native.extension().attention(wrong)
        with pytest.raises(TypeError, match="incompatible function arguments"):
            native.extension().attention_backward((wrong, 0, q.stride(), 0, 0, 0))


ONE_RUNTIME = """
import os, torch
from ldm_fast.ops import cpu, native
from ldm_fast.ops.arguments import Norm
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
x = torch.randn(8, 64, 32, 32)
norm = Norm(x, 32, activation="silu")
y, statistics = cpu.group_norm_silu(norm)
print("started", len(os.listdir("/proc/self/task")) - before)
cpu.group_norm_silu_backward(x, norm, statistics)
q = torch.randn(2, 8, 256, 40)
cpu.attention(q, q, q, None, 0.1)
cpu.nearest_codebook(torch.randn(1, 1000, 4), torch.randn(1000, 4))
torch.randn(500, 500) @ torch.randn(500, 500)
print("all", len(os.listdir("/proc/self/task")) - before)
print("runtimes", len(native.openmp_runtimes()), "used", native.find_openmp()[0] in native.openmp_runtimes())
"""


@LINUX
def test_threads_come_from_the_one_openmp_runtime_of_torch():
    """The kernels start two threads besides the main one, and after that neither they nor torch start others."""
    done = subprocess.run([sys.executable, "-c", ONE_RUNTIME], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["started 2", "all 2", "runtimes 1 used True"]
