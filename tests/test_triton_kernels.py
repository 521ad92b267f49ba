"""The Triton kernels against the reference in float64: every kernel, and every way to divide the work.

Triton decides as it decorates a kernel whether to interpret it. Without a GPU, therefore, the class `TestKernels` runs
in other processes, which the last test here starts. The interpreter runs programs one after another, so it shows no
races.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ldm_fast import kernels
from ldm_fast.kernels import (
    attention,
    attention_backward,
    attention_common,
    group_norm_silu,
    group_norm_silu_backward,
    group_norm_silu_common,
)
from ldm_fast.ops import reference
from ldm_fast.ops.arguments import Norm
from ldm_fast.ops.cases import Attention, GroupNormSilu, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_HERE = kernels.interpreting() or DEVICE == "cuda"
SHORT, LONG = {"_forward_short"}, {"_forward_long"}
SHORT_GRADIENT, LONG_GRADIENT = {"_backward_short", "_sum_parts"}, {"_backward_queries", "_backward_keys"}
GROUP, SPLIT = {"_forward_group"}, {"_stats", "_merge", "_apply"}
GROUP_GRADIENT, SPLIT_GRADIENT = {"_backward_group"}, {"_grad_sums", "_merge_grads", "_grad_apply"}
PARAMETERS = {"_grad_parameters"}

# Each case with the kernels that it goes through in float16. The relative L2 error allowed in float32 is 2e-6.
ATTENTION = [
    (Attention(1, 1, 1, 1, 1), SHORT | SHORT_GRADIENT),
    (Attention(2, 1, 33, 77, 40, layout="heads_last"), SHORT | SHORT_GRADIENT),  # pieces of both widths
    (Attention(1, 1, 1030, 5, 16), SHORT | SHORT_GRADIENT),  # programs with several tiles, the last one partial
    (Attention(1, 1, 530, 79, 33), SHORT | SHORT_GRADIENT),  # backward also has two pieces of keys
    (Attention(1, 2, 19, 64, 80, mask="additive"), SHORT | SHORT_GRADIENT),  # one piece of keys, two of columns
    (Attention(1, 1, 7, 128, 24), SHORT | SHORT_GRADIENT),
    (Attention(1, 1, 7, 128, 24, mask="masked_row"), LONG | SHORT_GRADIENT),  # a mask takes registers
    (Attention(1, 1, 9, 31, 24, mask="masked_row"), SHORT | SHORT_GRADIENT),
    (Attention(1, 1, 33, 77, 160, mask="key_padding"), SHORT | LONG_GRADIENT),
    *((Attention(1, 1, 35, 77, D), SHORT | SHORT_GRADIENT) for D in (24, 48, 64)),
    *((Attention(1, 1, 35, 77, D), SHORT | LONG_GRADIENT) for D in (96, 128)),
    (Attention(1, 2, 77, 77, 32, layout="one_projection"), SHORT | SHORT_GRADIENT),
    (Attention(1, 1, 35, 77, 80, mask="bool"), SHORT | SHORT_GRADIENT),
    (Attention(1, 1, 1, 77, 160), SHORT | LONG_GRADIENT),
    (Attention(1, 1, 70, 1, 40), SHORT | SHORT_GRADIENT),
    (Attention(2, 2, 67, 131, 40, mask="masked_row", layout="heads_last"), LONG | LONG_GRADIENT),
    (Attention(1, 1, 13, 192, 32, mask="masked_row_additive"), LONG | LONG_GRADIENT),  # whole tiles of keys
    (Attention(1, 1, 9, 150, 48), LONG | LONG_GRADIENT),  # a partial tile of keys without a mask
    (Attention(2, 1, 5, 130, 24, mask="key_padding", layout="rows_sliced"), LONG | LONG_GRADIENT),
    (Attention(1, 1, 5, 19, 512), LONG | LONG_GRADIENT),
    (Attention(1, 1, 11, 3, 300, mask="bool"), LONG | LONG_GRADIENT),
    (Attention(1, 2, 37, 1, 384), LONG | LONG_GRADIENT),
    (Attention(1, 1, 17, 33, 576, mask="masked_row"), LONG | LONG_GRADIENT),
    (Attention(1, 1, 9, 18, 960), LONG | LONG_GRADIENT),
    (Attention(1, 1, 3, 4096, 16), LONG | LONG_GRADIENT),  # what is rounded once for each tile of keys adds up
]
GROUP_NORM_SILU = [
    (GroupNormSilu((2, 6), 2), GROUP | GROUP_GRADIENT | PARAMETERS),
    (GroupNormSilu((2, 10, 7), 5, modulation="both", float32_affine=True), GROUP | GROUP_GRADIENT | PARAMETERS),
    (GroupNormSilu((1, 8, 5, 7), 2, affine="none", activation=None), GROUP | GROUP_GRADIENT),
    (GroupNormSilu((1, 40, 4, 4), 1, "channels_last", modulation="scale"), GROUP | GROUP_GRADIENT | PARAMETERS),
    (GroupNormSilu((1, 4, 51, 50), 1), GROUP | SPLIT_GRADIENT | PARAMETERS),  # chunks of pixels, the last one partial
    (GroupNormSilu((1, 4, 70, 67), 1, modulation="both", data="offset"), SPLIT | SPLIT_GRADIENT | PARAMETERS),
    (GroupNormSilu((2, 36, 9, 7), 3, "channels_last", modulation="both"), SPLIT | SPLIT_GRADIENT | PARAMETERS),
    (GroupNormSilu((1, 2, 3, 5, 7), 2, "channels_last", affine="weight"), SPLIT | SPLIT_GRADIENT | PARAMETERS),
    (GroupNormSilu((1, 40, 17, 1), 1, "channels_last", affine="bias"), GROUP | GROUP_GRADIENT | PARAMETERS),
]


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Errors allowed in half precision: relative L2, in units in the last place. Rounding a result costs 0.41 of them. The
# probabilities, and the gradients of the scores, are rounded for their product as well, which makes it 0.6.
OUT_ROUNDINGS = 0.8


def gradient_roundings(case: Attention) -> float:
    """Gradients over few keys are small differences; of many numbers, the mean error hardly varies."""
    return 1.8 if case.M <= 5 else 0.9 if min(case.N, case.M) < 30 else 0.68


def arguments(op: str, case: Any, dtype: torch.dtype, device: str = DEVICE) -> list[Any]:
    """Return the arguments that an op would pass to an implementation."""
    inputs = make_inputs(op, case, dtype, "cpu" if device == "meta" else device)
    if op == "attention":
        mask, shape = inputs["mask"], (case.B, case.H, case.N, case.M)
        inputs["mask"] = None if mask is None else mask.expand(shape)
        inputs["scale"] = case.D**-0.5
    values = [value.to(device) if isinstance(value, torch.Tensor) else value for value in inputs.values()]
    if op == "attention":
        return values
    return [Norm(*values)]


def launches(op: str, case: Any, dtype: torch.dtype) -> list[kernels.Launch]:
    """Return the launches of a forward and a backward pass, on tensors without memory."""
    args = arguments(op, case, dtype, "meta")
    if op == "attention":
        inputs = attention_common.Inputs(*args)
        q, lse = inputs.q, torch.empty(inputs.q.shape[:3], device="meta")
        forward = attention.forward_launches(inputs, q, lse)
        return forward + attention_backward.backward_launches(q, inputs, q, lse, inputs[:3])
    (norm,) = args
    statistics = torch.empty(2, norm.x.shape[0], norm.num_groups, device="meta")
    forward = group_norm_silu.forward_launches(norm, norm.x, statistics)
    gradients = (norm.x, *norm.vectors)
    return forward + group_norm_silu_backward.backward_launches(norm.x, norm, statistics, gradients)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.cpu().double() - wanted).norm() / wanted.norm().clamp_min(1e-6))


def in_float64(args: list[Any]) -> list[Any]:
    return [a.cpu().double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Make torch.empty fill with NaN, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def exact_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bfloat16 numbers as integers, and truncates instead of rounding."""
    if not kernels.interpreting():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    multiply, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def widened(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return multiply(self, a, b, d, *options)
        return interpreter.TensorHandle(widened(a.data) @ widened(b.data) + d.data, d.dtype.scalar)

    def convert_float(values: np.ndarray, given: Any, wanted: Any, rounding: Any) -> np.ndarray:
        if (given, wanted) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
            return rounded.view(torch.uint16).numpy().reshape(values.shape)
        if (given, wanted) == (tl.bfloat16, tl.float32):
            return widened(values).view(np.uint32)
        return convert(values, given, wanted, rounding)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's: log2(0) of a masked row, exp of large numbers
@pytest.mark.usefixtures("exact_bfloat16")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", [case for case, _ in ATTENTION], ids=str)
    def test_attention(self, case: Attention, dtype: torch.dtype, nan_filled: None) -> None:
        torch.manual_seed(0)
        args = arguments("attention", case, dtype)
        out, lse = attention.attention(*args)
        # the gradient is a view that is contiguous in no order
        grad = torch.randn(case.B, case.D, case.N, case.H).to(DEVICE, dtype).permute(0, 3, 2, 1)
        gradients = attention.attention_backward(grad, *args, out, lse)
        exact, exact_lse = reference.attention(*in_float64(args))
        exact_gradients = reference.attention_backward(grad.cpu().double(), *in_float64(args), exact, exact_lse)

        unit = torch.finfo(dtype).eps / 2
        allowed = 2e-6 if dtype == torch.float32 else OUT_ROUNDINGS * unit
        in_gradients = 2e-6 if dtype == torch.float32 else gradient_roundings(case) * unit
        torch.testing.assert_close(lse.cpu(), exact_lse.float(), rtol=1e-5, atol=1e-5)
        assert out.transpose(1, 2).is_contiguous()
        assert relative_error(out, exact) <= allowed
        for name, got, wanted in zip("qkv", gradients, exact_gradients, strict=True):
            # a softmax over one key is constant, so the gradients of q and k are zero except for rounding
            scale = wanted.norm() if case.M > 1 else exact_gradients[2].norm()
            assert (got.cpu().double() - wanted).norm() <= in_gradients * scale, f"gradient of {name}"

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", [case for case, _ in GROUP_NORM_SILU], ids=str)
    def test_group_norm_silu(self, case: GroupNormSilu, dtype: torch.dtype, nan_filled: None) -> None:
        (norm,) = arguments("group_norm_silu", case, dtype)
        x = norm.x
        y, statistics = group_norm_silu.group_norm_silu(norm)
        assert y.stride() == x.stride()
        grad = torch.randn(x.shape).to(DEVICE, dtype)  # contiguous, whatever x is
        gradients = group_norm_silu.group_norm_silu_backward(grad, norm, statistics)
        in_double = Norm(*in_float64(norm))
        exact = reference.group_norm_silu(in_double)
        exact_gradients = reference.group_norm_silu_backward(grad.cpu().double(), in_double, exact[1])

        allowed = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        if case.data == "offset":  # the mean itself is known to half a unit in its last place, 3e-5 deviations
            allowed = max(allowed, 1e-4)
        (mean, rstd), (exact_mean, exact_rstd) = statistics, exact[1]
        for name, got, wanted in (("y", y, exact[0]), ("mean", mean, exact_mean), ("rstd", rstd, exact_rstd)):
            assert relative_error(got, wanted) <= allowed, name
        names = ("x", "weight", "bias", "scale", "shift")
        for name, got, wanted in zip(names, gradients, exact_gradients, strict=True):
            assert (got is None) == (wanted is None), name
            assert got is None or relative_error(got, wanted) <= allowed, f"gradient of {name}"

    @pytest.mark.parametrize(
        "case",
        [
            Attention(2, 2, 67, 77, 40),
            Attention(2, 2, 67, 140, 80, mask="key_padding"),
            Attention(2, 2, 35, 77, 160),
            Attention(2, 2, 5, 33, 300),
            GroupNormSilu((2, 36, 9, 7), 3, modulation="both"),
            GroupNormSilu((2, 36, 9, 7), 3, "channels_last", modulation="both"),
        ],
        ids=str,
    )
    def test_a_row_alone_has_the_same_bits(self, case: Attention | GroupNormSilu) -> None:
        """The second image (and head) has the same bits with and without the first one, and in a second run."""
        if isinstance(case, Attention):
            args, backward = arguments("attention", case, torch.float16), attention.attention_backward
            alone = [a[1:, 1:] if isinstance(a, torch.Tensor) else a for a in args]
            results = [attention.attention(*a) for a in (args, args, alone)]
            inputs = [[r[0], *a, *r] for r, a in zip(results, (args, args, alone), strict=True)]
            one, head = slice(1, None), slice(1, None)
        else:
            (norm,), backward = (
                arguments("group_norm_silu", case, torch.float16),
                group_norm_silu.group_norm_silu_backward,
            )
            alone = Norm(*(a[1:] if isinstance(a, torch.Tensor) and a.ndim > 1 else a for a in norm))
            results = [group_norm_silu.group_norm_silu(n) for n in (norm, norm, alone)]
            inputs = [[r[0], n, r[1]] for r, n in zip(results, (norm, norm, alone), strict=True)]
            results = [(y, *statistics) for y, statistics in results]
            one, head = slice(1, None), slice(None)
        # gradients of weights are sums over all images
        gradients = [[g for g in backward(*i) if g is not None and g.ndim > 1] for i in inputs]
        for together, again, single in (results, gradients):
            assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
            assert all(torch.equal(a[one, head], b) for a, b in zip(together, single, strict=True))

    @pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
    def test_several_tiles_of_a_program(self, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """If nothing is summed, the division of the work does not matter. Large images have fewer, longer programs."""
        case, results = GroupNormSilu((2, 8, 90, 91), 2, layout, modulation="both"), []
        (norm,) = arguments("group_norm_silu", case, torch.float32)
        for spread in (group_norm_silu_common.SPREAD, 1):
            monkeypatch.setattr(group_norm_silu_common, "SPREAD", spread)
            assert (group_norm_silu_common.split_of(norm.x).steps_apply > 1) == (spread == 1)
            y, statistics = group_norm_silu.group_norm_silu(norm)
            results.append([y, group_norm_silu.group_norm_silu_backward(y, norm, statistics)[0]])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("shape", [(1, 6, 5, 7), (1, 4, 71, 67)], ids=("group", "split"))
    def test_a_constant_has_no_deviation(self, shape: tuple[int, ...]) -> None:
        """The summed mean is off by some units in the last place, which is many times the square root of eps."""
        x = torch.full(shape, 1e5 / 3, device=DEVICE)
        y, (mean, rstd) = group_norm_silu.group_norm_silu(Norm(x, 1, eps=1e-6))
        assert (y == 0).all() and (mean == x[0, 0, 0, 0]).all()
        torch.testing.assert_close(rstd, torch.full_like(rstd, 1e3))

    def test_the_lowest_additive_mask_is_no_missing_key(self) -> None:
        """Libraries mask with the lowest finite number. PyTorch's softmax of a row of only this number is uniform."""
        q, k, v = (torch.randn(1, 1, n, 16, device=DEVICE) for n in (3, 5, 5))
        mask = torch.zeros(3, 5, device=DEVICE).masked_fill_(
            torch.tensor([[0], [1], [0]], device=DEVICE).bool(), -3.4e38
        )
        out, lse = attention.attention(q, k, v, mask.expand(1, 1, 3, 5), 0.25)
        torch.testing.assert_close(out[0, 0, 1], v[0, 0].mean(0), rtol=1e-4, atol=1e-5)
        gradients = attention.attention_backward(out, q, k, v, mask.expand(1, 1, 3, 5), 0.25, out, lse)
        assert all(gradient.isfinite().all() for gradient in gradients)

    def check_strides(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> None:
        out, lse = attention.attention(q, k, v, mask, 0.2)
        grad = torch.randn(out.shape).to(DEVICE, out.dtype)
        got = (out, *attention.attention_backward(grad, q, k, v, mask, 0.2, out, lse))
        exact = reference.attention(*in_float64([q, k, v, mask, 0.2]))
        wanted = reference.attention_backward(grad.cpu().double(), *in_float64([q, k, v, mask, 0.2]), *exact)
        # a wrong address gives something else altogether; with few keys, gradients are small differences
        assert all(relative_error(a, b) <= 1e-2 for a, b in zip(got, (exact[0], *wanted), strict=True))

    @pytest.mark.parametrize(("keys", "width"), [(21, 24), (21, 96), (140, 24), (21, 270)])
    def test_each_tensor_has_its_own_strides(self, keys: int, width: int) -> None:
        """The table above has q, k and v in the same layout; here they differ."""
        q = torch.randn(2, 2, 19, width).to(DEVICE, torch.float16)
        k = torch.randn(2, keys, 2, width).to(DEVICE, torch.float16).transpose(1, 2)
        v = torch.randn(keys, 2, 2, width + 8).to(DEVICE, torch.float16).permute(2, 1, 0, 3)[..., :width]
        mask = (torch.randn(19, 2, keys, 2, device=DEVICE) > -1).permute(3, 1, 0, 2)
        mask[..., 0] = True
        self.check_strides(q, k, v, mask)

    @pytest.mark.parametrize("far", ("images", "rows"))
    @pytest.mark.parametrize("width", (16, 96))  # backward, short and long
    def test_offsets_beyond_32_bits(self, far: str, width: int) -> None:
        """The offsets reach far into memory that is hardly touched."""
        shape, strides = ((3, 1, 3), (1 << 30, 0, 300)) if far == "images" else ((1, 1, 3), (0, 0, 1 << 30))
        memory = torch.empty((1 << 31) + 1024, dtype=torch.float16, device=DEVICE)
        q, k, v = (memory.as_strided((*shape, width), (*strides, 1), i * width) for i in range(3))
        flags = torch.empty((1 << 31) + 1024, dtype=torch.bool, device=DEVICE)
        mask = flags.as_strided((*shape, shape[2]), (*strides, 1))
        for tensor in (q, k, v):
            tensor.copy_(torch.randn(tensor.shape))
        mask.copy_(torch.ones(shape[2], shape[2], dtype=torch.bool).tril())
        self.check_strides(q, k, v, mask)

    @pytest.mark.parametrize("keys", (5, 150))  # short and long
    @pytest.mark.parametrize("where", ("q", "mask"))
    def test_nan_stays_nan(self, where: str, keys: int) -> None:
        """A minimum or maximum that ignores NaN would turn it into a number, and nobody would notice."""
        args = arguments("attention", Attention(1, 1, 4, keys, 16, mask="masked_row_additive"), torch.float16)
        args[3] = args[3].clone()
        (args[0] if where == "q" else args[3])[0, 0, 1, 2] = float("nan")
        out, lse = attention.attention(*args)
        grad = torch.randn(1, 1, 4, 16).to(DEVICE, torch.float16)
        gradients = attention.attention_backward(grad, *args, out, lse)
        exact = reference.attention(*in_float64(args))
        wanted = reference.attention_backward(grad.cpu().double(), *in_float64(args), *exact)
        for got, right in zip((out, *gradients), (exact[0], *wanted), strict=True):
            assert right.isnan().any() and torch.equal(got.cpu().isnan(), right.isnan())

    def test_very_negative_scores(self) -> None:
        """Keys beyond the last one score zero; beside the scores here, their exponentials would overflow."""
        q = torch.full((1, 1, 3, 48), 5.0, device=DEVICE)
        k, v = -q[:, :, :1].expand(1, 1, 150, 48), torch.randn(1, 1, 150, 48, device=DEVICE)
        out, lse = attention.attention(q, k, v, None, 1.0)
        torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=1e-4, atol=1e-5)
        dq, dk, dv = attention.attention_backward(out, q, k, v, None, 1.0, out, lse)
        torch.testing.assert_close(dv, (out.sum(2, keepdim=True) / 150).expand_as(dv), rtol=1e-3, atol=1e-6)
        assert dq.isfinite().all() and dk.isfinite().all()


@pytest.mark.skipif(kernels.interpreting(), reason="interpreted kernels do not keep their source")
def test_the_table_misses_no_kernel() -> None:
    for op, modules, table in (
        ("attention", (attention, attention_backward, attention_common), ATTENTION),
        ("group_norm_silu", (group_norm_silu, group_norm_silu_backward, group_norm_silu_common), GROUP_NORM_SILU),
    ):
        ran = set()
        for case, expected in table:
            names = {launch.kernel.__name__ for launch in launches(op, case, torch.float16)}
            assert names == expected, case
            ran |= names
        defined = {name: value for module in modules for name, value in vars(module).items()}
        assert ran == {name for name, value in defined.items() if "tl.program_id" in getattr(value, "src", "")}


@pytest.mark.parametrize(
    ("width", "pieces"),
    [
        (1, (16, 0)),
        (16, (16, 0)),
        (17, (32, 0)),
        (24, (32, 0)),
        (40, (32, 16)),
        (48, (32, 16)),
        (77, (64, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (97, (128, 0)),
        (128, (128, 0)),
        (160, (128, 32)),
        (256, (256, 0)),
    ],
)
def test_a_width_is_at_most_two_powers_of_two(width: int, pieces: tuple[int, int]) -> None:
    assert attention_common.pieces_of(width) == pieces


@pytest.mark.parametrize("op", ("attention", "group_norm_silu"))
def test_the_work_is_divided_alike_for_any_batch(op: str) -> None:
    """Otherwise the last bits of a row would depend on the rest of its batch."""
    if op == "attention":
        pairs = [(Attention(1, 1, n, m, d), Attention(7, 5, n, m, d)) for n, m, d in ((4096, 77, 40), (999, 555, 80))]
    else:
        pairs = [(GroupNormSilu((1, 64, s, s), 32), GroupNormSilu((9, 64, s, s), 32)) for s in (4, 80)]
    for one, many in pairs:
        for a, b in zip(launches(op, one, torch.float16), launches(op, many, torch.float16), strict=True):
            assert (a.options == b.options and a.programs < b.programs) or a.kernel.__name__ == "_grad_parameters"


def test_offsets_of_groups_on_chip_fit_32_bits() -> None:
    small, large = (torch.empty(1, channels, 1 << 11, device="meta") for channels in (1 << 19, 1 << 20))
    assert group_norm_silu_common.on_chip(small, 8, group_norm_silu_common.ON_CHIP) == (8, 1 << 11)
    assert group_norm_silu_common.on_chip(large, 8, group_norm_silu_common.ON_CHIP) is None


def test_refusals_say_what_is_needed() -> None:
    q = torch.zeros(1, 1, 4, 8)
    wide = torch.zeros(1, 1, 4, 1025)
    assert "1024" in attention.attention_unsupported(wide, wide, wide, None, 1.0)
    assert "unit last stride" in attention.attention_unsupported(q, q.mT.contiguous().mT, q, None, 1.0)
    assert "torch.float64" in attention.attention_unsupported(q.double(), q.double(), q.double(), None, 1.0)
    assert "torch.float64" in attention.attention_unsupported(q, q, q, torch.zeros(1, 1, 4, 4).double(), 1.0)
    x = torch.zeros(2, 4, 6)
    assert "contiguous" in group_norm_silu.group_norm_silu_unsupported(Norm(x[..., ::2], 2))
    assert "weight" in group_norm_silu.group_norm_silu_unsupported(Norm(x, 2, torch.zeros(4).double()))
    if not RUNS_HERE:
        assert "CUDA" in attention.attention_unsupported(q, q, q, None, 1.0)
        assert "CUDA" in kernels.unavailable()


@pytest.mark.skipif(kernels.interpreting(), reason="the interpreter runs everywhere")
def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs before sm_80 have too little shared memory. PyTorch for AMD's GPUs calls these CUDA devices."""
    on_gpu = SimpleNamespace(dtype=torch.float16, is_cuda=True, device="cuda:0")
    for capability in ((7, 5), (8, 0), (12, 0)):
        kernels.capability.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert (kernels.refuse(on_gpu) is None) == (capability >= (8, 0))
    kernels.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for version in (None, "12.4"):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert (kernels.unavailable() is None) == (version is not None)


@pytest.mark.skipif(kernels.interpreting(), reason="the interpreter does not compile")
def test_a_compiler_that_aborts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.6 brings Triton 3.2, which compiles these kernels for sm_80 but aborts the process for sm_90."""
    q = SimpleNamespace(dtype=torch.float16, is_cuda=True, device="cuda:0", shape=(1, 1, 4, 8), stride=lambda dim: 1)
    for version, capability, refused in (((3, 2), (9, 0), True), ((3, 2), (8, 0), False), ((3, 3), (9, 0), False)):
        kernels.capability.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(attention, "TRITON", version)
        assert (attention.attention_unsupported(q, q, q, None, 1.0) is not None) == refused
    kernels.capability.cache_clear()


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_the_kernels_in_the_interpreter() -> None:
    """In three processes at the same time, each on one thread: the matrices are small, and threads would wait."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestKernels", "-k"]
    started = [
        subprocess.Popen(
            [*command, which],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for which in ("torch.float16", "torch.bfloat16", "not (torch.float16 or torch.bfloat16)")
    ]
    passed = 0
    for process in started:
        output, _ = process.communicate()
        assert process.returncode == 0, output[-5000:]
        passed += int(re.search(r"(\d+) passed", output)[1])
    assert passed == len(DTYPES) * (len(ATTENTION) + len(GROUP_NORM_SILU)) + 24
