"""All ops, in every implementation that can run here, on the cases of `ldm_fast.ops.cases`.

The truth is a separate formula in float64 with PyTorch's autograd; `ldm_fast.ops.reference` is tested like the others.
The error of an implementation may be twice that of PyTorch in the same dtype, plus `TOLERANCE`.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_fast import ops, use_impl
from ldm_fast.ops import codebook_op, cpu, dispatch, pytorch
from ldm_fast.ops.arguments import Norm
from ldm_fast.ops.cases import CASES, TOLERANCE, Attention, GroupNormSilu, NearestCodebook, make_inputs, wrong_codes
from ldm_fast.ops.explain import explain
from ldm_fast.ops.op import OPS

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("attention", "group_norm_silu")
ACCELERATOR = "cuda" if torch.cuda.is_available() else "cpu"  # the Triton interpreter takes CPU tensors
FORMATS = {
    **dict.fromkeys((2, 3), (torch.contiguous_format,)),
    4: (torch.contiguous_format, torch.channels_last),
    5: (torch.contiguous_format, torch.channels_last_3d),
}
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def small_cases(op: str) -> list[Any]:
    return [case for case in CASES[op] if not case.acceptance]


def name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def device_of(impl: str) -> str:
    return ACCELERATOR if impl in ("triton", "cuda") else "cpu"


def skip_unless_it_runs(op: str, impl: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip if this implementation cannot take even ordinary inputs here. If it refuses only some cases, these fail."""
    reason = why_not(op, impl, dtype)
    if reason is not None:
        pytest.skip(f"{op} by {impl}, {name(dtype)}: {reason}")


@functools.cache
def why_not(op: str, impl: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why ordinary inputs of this dtype cannot run here, as `explain` tells it; None if they can."""
    device = device_of(impl)
    return dispatch.why_not(op, impl, OPS[op].ordinary(lambda *shape: torch.zeros(shape, dtype=dtype, device=device)))


def positional(op: str, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments in the order that implementations take them, with the defaults filled in."""
    values = dict(inputs)
    if op == "attention":
        q, k = values["q"], values["k"]
        if values["mask"] is not None:
            values["mask"] = values["mask"].expand(*q.shape[:3], k.shape[2])
        values["scale"] = values["scale"] or q.shape[-1] ** -0.5
    if op in ("group_norm_silu", "group_norm_apply"):
        stats = [values.pop("stats")] if "stats" in values else []
        return Norm(**values), *stats
    return tuple(values.values())


def impls(op: str) -> list[str]:
    return list(dispatch.IMPLEMENTATIONS[op])


def table(cases: dict[str, Any]) -> list[Any]:
    """Return each implementation of each op with each case. One that cannot run here at all is one skipped line."""
    rows = []
    for op, impl in [(name, impl) for name in cases for impl in impls(name)]:
        reason = why_not(op, impl)
        if reason is None:
            rows += [pytest.param(op, impl, case, id=f"{op}-{impl}-{case}") for case in cases[op]]
        else:
            skip = pytest.mark.skip(reason=f"{op} by {impl}: {reason}")
            rows.append(pytest.param(op, impl, None, id=f"{op}-{impl}", marks=skip))
    return rows


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Make torch.empty fill with NaN (or the largest integer), so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- the truth ----


def attention_formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """PyTorch's own attention. It gives NaN for a row without keys, so such a row attends to all and then becomes 0."""
    if k.shape[2] == 0:
        return 0 * q + 0 * (k.sum() + v.sum())
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    alive = (mask if mask.dtype == torch.bool else mask > float("-inf")).any(-1, keepdim=True)
    mask = mask | ~alive if mask.dtype == torch.bool else mask.masked_fill(~alive, 0).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale) * alive


def group_norm_silu_formula(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    if x.numel() == 0:
        return x + 0 * sum(t.sum() for t in (weight, bias, scale, shift) if t is not None)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # PyTorch 2.13 fails in the backward pass of a bias without weight
    x = x.contiguous()  # for channels_last PyTorch takes E[x²] - E[x]², which loses the digits of a large mean
    h = torch.group_norm(x, num_groups, weight, bias, eps)
    per_channel = (*x.shape[:2], *(1,) * (x.ndim - 2))
    if scale is not None:
        h = h * (1 + scale.reshape(per_channel))
    if shift is not None:
        h = h + shift.reshape(per_channel)
    return F.silu(h) if activation == "silu" else h


FORMULA: dict[str, Callable[..., Tensor]] = {
    "attention": attention_formula,
    "group_norm_silu": group_norm_silu_formula,
}


def with_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Any], grad: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the result ("out") and the gradient of every tensor except the mask, for dL/dout = grad."""
    leaves = {
        key: value.detach().requires_grad_()
        for key, value in inputs.items()
        if isinstance(value, Tensor) and key != "mask"
    }
    out = function(**{**inputs, **leaves})
    grad = random_gradient(out) if grad is None else grad
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def random_gradient(out: Tensor) -> Tensor:
    """Return the same numbers for every dtype and device, exact in each, with other strides than those of `out`."""
    return torch.randint(-64, 65, out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype) / 32


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().cpu().double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in on_cpu(inputs).items()
    }


def on_cpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in inputs.items()}


def logit_size(inputs: dict[str, Any]) -> float:
    """Return the largest score, but at least 1; for an op without scores return 1."""
    if "q" not in inputs or 0 in (inputs["q"].numel(), inputs["k"].numel()):
        return 1.0
    q, k = (inputs[key].detach().cpu().double() for key in "qk")
    return max(1.0, (q @ k.transpose(-1, -2)).abs().max().item() * (inputs["scale"] or q.shape[-1] ** -0.5))


def assert_close(
    got: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float, logits: float = 1.0
) -> None:
    """Compare results. Errors are relative to the largest element of the same tensor.

    If a gradient is zero except for rounding (that of q, if M = 1), its error is relative to the largest element of all
    gradients.
    """
    largest = max((e.abs().max().item() for key, e in exact.items() if key != "out" and e.numel()), default=0.0)
    for key, truth in exact.items():
        if truth.numel() == 0:
            assert got[key].shape == truth.shape
            continue
        own = truth.abs().max().item()
        scale = own if key == "out" or own > 1e-3 * largest else largest
        value, other = got[key].cpu().double(), eager[key].cpu().double()
        assert value.isfinite().all(), f"{key}: not finite"
        # a backward pass gets the probabilities from a float32 log-sum-exp, whose rounding error grows with the logits
        own_tolerance = tolerance if key == "out" else tolerance + 2**-23 * (logits - 1)
        error, allowed = (value - truth).abs().max(), 2 * (other - truth).abs().max() + own_tolerance * scale
        assert error <= allowed, f"{key}: error {error:.3g}, allowed {allowed:.3g}, largest element {own:.3g}"


def strides(tensor: Tensor) -> list[int]:
    """Return the strides that matter: those of dimensions with more than one element."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def promised(op: str, inputs: dict[str, Any]) -> Tensor:
    """Return a tensor with the shape, strides, dtype and device that the result must have."""
    if op == "attention":
        q = inputs["q"]
        return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    x = inputs["x"]
    keeps = any(x.is_contiguous(memory_format=f) for f in FORMATS[x.ndim])
    return torch.empty_like(x, memory_format=torch.preserve_format if keeps else torch.contiguous_format)


# ---- forward and backward ----


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=name)
@pytest.mark.parametrize(("op", "impl", "case"), table({op: small_cases(op) for op in DIFFERENTIABLE}))
def test_forward_and_gradients(op: str, impl: str, case: Any, dtype: torch.dtype, nan_filled: None) -> None:
    skip_unless_it_runs(op, impl, dtype)
    inputs = make_inputs(op, case, dtype, device_of(impl))
    got = with_gradients(lambda **kwargs: getattr(ops, op)(**kwargs, impl=impl), inputs)
    wanted = promised(op, inputs)
    for of in (lambda t: t.dtype, lambda t: t.device, lambda t: t.shape, strides):
        assert of(got["out"]) == of(wanted)
    for key, gradient in got.items():
        assert key == "out" or (gradient.dtype, gradient.shape) == (inputs[key].dtype, inputs[key].shape)
    exact = with_gradients(FORMULA[op], in_float64(inputs))
    eager = with_gradients(FORMULA[op], on_cpu(inputs))
    assert_close(got, eager, exact, TOLERANCE[dtype], logit_size(inputs))
    if case.data == "offset" and dtype == torch.float32:
        error = (got["out"].cpu().double() - exact["out"]).abs().max() / exact["out"].abs().max()
        assert error <= 1e-4
    if op == "attention" and case.mask.startswith("masked_row"):
        assert (got["out"][0, 0, case.N // 2] == 0).all() and (got["q"][0, 0, case.N // 2] == 0).all()
        assert (got["out"][-1, -1, -1] == 0).all() and (got["q"][-1, -1, -1] == 0).all()


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op}-{case}")
        for op in DIFFERENTIABLE
        for case in small_cases(op)
        if not getattr(case, "float32_affine", False)
    ],
)
def test_reference_in_float64(op: str, case: Any) -> None:
    """The reference, which defines "correct", agrees with PyTorch to the last digits, gradients included."""
    inputs = make_inputs(op, case, torch.float64)
    exact = with_gradients(FORMULA[op], in_float64(inputs))
    got = with_gradients(lambda **kwargs: getattr(ops, op)(**kwargs, impl="reference"), inputs)
    # a mean of 1e3 costs three of the sixteen digits, a constant group is amplified by 1 / sqrt(eps)
    assert_close(got, exact, exact, 1e-9 if case.data in ("offset", "constant", "large_logits") else 1e-12)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("attention", Attention(2, 2, 3, 4, 3, mask="masked_row")),
        ("attention", Attention(1, 2, 3, 3, 4, layout="one_projection", scale=0.7)),
        ("group_norm_silu", GroupNormSilu((2, 4, 3), 2, modulation="both")),
        ("group_norm_silu", GroupNormSilu((2, 4, 2, 2), 2, "channels_last", activation=None)),
    ],
    ids=name,
)
def test_gradcheck(op: str, case: Any) -> None:
    inputs = make_inputs(op, case, torch.float64)
    keys = [key for key, value in inputs.items() if isinstance(value, Tensor) and key != "mask"]

    def function(*tensors: Tensor) -> Tensor:
        return getattr(ops, op)(**{**inputs, **dict(zip(keys, tensors, strict=True))}, impl="reference")

    assert torch.autograd.gradcheck(function, [inputs[key].detach().requires_grad_() for key in keys])


SOME = {
    "attention": (
        Attention(3, 2, 37, 77, 40, mask="key_padding", layout="heads_last"),
        Attention(3, 2, 70, 150, 24),
        Attention(3, 1, 19, 33, 512),
    ),
    "group_norm_silu": (
        GroupNormSilu((3, 64, 9, 9), 32, modulation="both"),
        GroupNormSilu((3, 64, 9, 9), 32, "channels_last"),
    ),
    "group_norm_stats": (GroupNormSilu((3, 64, 9, 9), 32), GroupNormSilu((3, 64, 60, 60), 32, "channels_last")),
    "group_norm_apply": (
        GroupNormSilu((3, 64, 9, 9), 32, modulation="both"),
        GroupNormSilu((3, 64, 9, 9), 32, "channels_last"),
    ),
    "nearest_codebook": (NearestCodebook(63, 300, 4), NearestCodebook(63, 300, 40), NearestCodebook(63, 257, 3)),
    "nearest_codebook_stats": (NearestCodebook(63, 30, 4), NearestCodebook(63, 300, 40)),
}


def run(op: str, impl: str, inputs: dict[str, Any], grad: Tensor | None = None) -> dict[str, Tensor]:
    def function(**kwargs: Any) -> Tensor:
        return getattr(ops, op)(**kwargs, impl=impl)

    if op in DIFFERENTIABLE:
        return with_gradients(function, inputs, grad)
    out = function(**inputs)
    return {"out": out} if isinstance(out, Tensor) else dict(zip(("out", "counts", "sums"), out, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=name)
@pytest.mark.parametrize(("op", "impl", "case"), table(SOME))
def test_deterministic(op: str, impl: str, case: Any, dtype: torch.dtype) -> None:
    """Two runs, and runs with any number of threads, agree bit for bit."""
    skip_unless_it_runs(op, impl, dtype)
    inputs = make_inputs(op, case, dtype, device_of(impl))
    first = run(op, impl, inputs)
    threads = torch.get_num_threads()
    try:
        # the reference uses PyTorch's matrix products, which are split differently for other numbers of threads
        for count in (threads, *(() if impl == "reference" else (1, 2, 3))):
            torch.set_num_threads(count)
            for key, value in run(op, impl, inputs).items():
                assert torch.equal(first[key], value), f"{key} differs with {count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=name)
@pytest.mark.parametrize(("op", "impl", "case"), table(SOME))
def test_batch_invariant(op: str, impl: str, case: Any, dtype: torch.dtype) -> None:
    """A row gives the same bits by itself as in a batch, except in sums over the batch."""
    skip_unless_it_runs(op, impl, dtype)
    if impl == "reference" and op in DIFFERENTIABLE:
        pytest.skip("PyTorch's matrix products and sums choose their order by the size of the batch")
    inputs = make_inputs(op, case, dtype, device_of(impl))
    batched = ("q", "k", "v", "mask", "x", "stats", "scale", "shift", "z")
    whole = run(op, impl, inputs)
    grad = random_gradient(whole["out"])
    for row in range(3):
        part = slice(row, row + 1)
        sliced = {k: v[part] if k in batched and isinstance(v, Tensor) else v for k, v in inputs.items()}
        for key, value in run(op, impl, sliced, grad[part]).items():
            if key in batched or key == "out":
                assert torch.equal(whole[key][part], value), f"{key} of row {row} differs"


@pytest.mark.parametrize("impl", impls("attention"))
def test_attention_gradient_of_any_strides(impl: str) -> None:
    """dL/dout may be expanded (from a sum), transposed or sliced; the gradients are those for a contiguous one."""
    skip_unless_it_runs("attention", impl)
    inputs = make_inputs("attention", Attention(2, 3, 5, 7, 8), torch.float32, device_of(impl))
    q, k, v = (inputs[key].requires_grad_() for key in "qkv")
    out = ops.attention(q, k, v, impl=impl)
    dense = random_gradient(out)
    for grad in (
        torch.ones((), device=q.device).expand(out.shape),
        dense.transpose(-1, -2).contiguous().transpose(-1, -2),
        torch.cat([dense, dense], -1)[..., :8],
    ):
        expected = torch.autograd.grad(out, (q, k, v), grad.contiguous(), retain_graph=True)
        for a, b in zip(torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_only_the_gradients_asked_for(op: str) -> None:
    inputs = make_inputs(op, SOME[op][0], torch.float32)
    key = "k" if op == "attention" else "weight"
    inputs[key] = inputs[key].requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(ops, op)(**inputs).sum(), inputs[key])
    exact = in_float64({**inputs, key: inputs[key].detach()})
    exact[key] = exact[key].requires_grad_()
    (truth,) = torch.autograd.grad(FORMULA[op](**exact).sum(), exact[key])
    assert (gradient.double() - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives_raise(op: str) -> None:
    """The ops have no second derivatives, and a gradient penalty must not silently get zeros."""
    inputs = make_inputs(op, SOME[op][1], torch.float32)
    key = "q" if op == "attention" else "x"
    inputs[key] = inputs[key].requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(ops, op)(**inputs).square().sum(), inputs[key], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode_raises(op: str) -> None:
    """The ops have no forward-mode derivatives, and their users must not silently get zeros."""
    inputs = make_inputs(op, SOME[op][1], torch.float32)
    for key in ("q", "k", "v") if op == "attention" else ("x", "weight", "bias"):
        x = inputs[key].detach()
        with pytest.raises(NotImplementedError, match=f"{op}: has no forward-mode derivative, but {key} has a tangent"):
            torch.func.jvp(lambda x, key=key: getattr(ops, op)(**{**inputs, key: x}), (x,), (torch.ones_like(x),))


# ---- group_norm_silu in two calls ----


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=name)
@pytest.mark.parametrize(("op", "impl", "case"), table({"group_norm_stats": small_cases("group_norm_stats")}))
def test_group_norm_stats(op: str, impl: str, case: GroupNormSilu, dtype: torch.dtype, nan_filled: None) -> None:
    skip_unless_it_runs(op, impl, dtype)
    x = make_inputs(op, case, dtype, device_of(impl))["x"]
    stats = ops.group_norm_stats(x, case.groups, impl=impl)
    assert stats.dtype == torch.float64 and stats.shape == (case.shape[0], case.groups, 3)
    if x.numel() == 0:
        assert not stats.any()
        return
    groups = x.cpu().double().reshape(*stats.shape[:2], -1)
    count, mean, squares = stats.cpu().unbind(-1)
    deviation, truth = groups.std(-1, correction=0), groups.mean(-1)
    assert (count == groups.shape[-1]).all()
    # Errors are relative to the deviation: a mean of 1e3 must not cost it digits. Float32 sums of numbers with few
    # digits round the same way again and again.
    tolerance = 1e-6 if dtype == torch.float32 else 5e-6
    assert ((mean - truth).abs() <= tolerance * deviation + 1e-7 * truth.abs()).all()
    variance, squares = deviation.square(), squares / count
    assert ((squares - variance).abs() <= 2 * tolerance * variance + 1e-8 * truth.abs() * (deviation + 1e-4)).all()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=name)
@pytest.mark.parametrize(("op", "impl", "case"), table({"group_norm_apply": small_cases("group_norm_apply")}))
def test_group_norm_apply(op: str, impl: str, case: GroupNormSilu, dtype: torch.dtype, nan_filled: None) -> None:
    skip_unless_it_runs(op, impl, dtype)
    inputs = make_inputs(op, case, dtype, device_of(impl))
    y, wanted = ops.group_norm_apply(**inputs, impl=impl), promised(op, inputs)
    for of in (lambda t: t.dtype, lambda t: t.device, lambda t: t.shape, strides):
        assert of(y) == of(wanted)
    if y.numel() == 0:
        return
    x, stats, groups, *parameters, eps, activation, scale, shift = in_float64(inputs).values()
    weight, bias, scale, shift = (None if p is None else p for p in (*parameters, scale, shift))
    count, mean, squares = (s.repeat_interleave(x.shape[1] // groups, 1) for s in stats.unbind(-1))
    per_channel = (*x.shape[:2], *(1,) * (x.ndim - 2))
    h = (x - mean.reshape(per_channel)) * (squares / count + eps).rsqrt().reshape(per_channel)
    h = h * (1 if weight is None else weight.reshape(per_channel[1:]))
    h = h + (0 if bias is None else bias.reshape(per_channel[1:]))
    h = h * (1 if scale is None else 1 + scale.reshape(per_channel))
    h = h + (0 if shift is None else shift.reshape(per_channel))
    truth = F.silu(h) if activation == "silu" else h
    error = (y.cpu().double() - truth).abs().max()
    assert error <= 2 * TOLERANCE[dtype] * truth.abs().max()


@pytest.mark.parametrize("rows", ((9,), (4, 5), (1, 3, 0, 5)), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("impl", impls("group_norm_stats"))
def test_parts_give_what_the_whole_gives(impl: str, layout: str, rows: tuple[int, ...]) -> None:
    skip_unless_it_runs("group_norm_stats", impl)
    case = GroupNormSilu((2, 64, 9, 7), 32, layout, modulation="both", data="offset")
    inputs = make_inputs("group_norm_silu", case, torch.float32, device_of(impl))
    whole = group_norm_silu_formula(**in_float64(inputs))
    x, groups = inputs.pop("x"), inputs["num_groups"]
    parts = x.split(rows, dim=2)
    stats = ops.merge_group_norm_stats([ops.group_norm_stats(part, groups, impl=impl) for part in parts])
    torch.testing.assert_close(stats, ops.group_norm_stats(x, groups, impl="reference"), rtol=1e-5, atol=0)
    y = torch.cat([ops.group_norm_apply(part, stats, **inputs, impl=impl) for part in parts], dim=2)
    assert (y.cpu() - whole).abs().max() <= 2e-5 * whole.abs().max()


def test_merging_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="^merge_group_norm_stats: parts must be at least one"):
        ops.merge_group_norm_stats([])


@pytest.mark.parametrize("op", ("group_norm_stats", "group_norm_apply"))
def test_split_form_refuses_gradients(op: str) -> None:
    inputs = make_inputs(op, SOME[op][0], torch.float32)
    inputs["x"] = inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op}: has no gradient"):
        getattr(ops, op)(**inputs).sum().backward()


# ---- nearest_codebook ----


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=name)
@pytest.mark.parametrize(("op", "impl", "case"), table({"nearest_codebook": small_cases("nearest_codebook")}))
def test_nearest_codebook(op: str, impl: str, case: NearestCodebook, dtype: torch.dtype, nan_filled: None) -> None:
    skip_unless_it_runs(op, impl, dtype)
    if case.data == "huge" and dtype == torch.float16:
        pytest.skip("beyond the range of float16")
    inputs = make_inputs(op, case, dtype, device_of(impl))
    z, codebook = inputs["z"], inputs["codebook"]
    indices = ops.nearest_codebook(z, codebook, impl=impl)
    assert indices.dtype == torch.int64 and indices.device == z.device and indices.is_contiguous()
    assert indices.shape == ((z.shape[0], *z.shape[2:]) if z.ndim == 4 else (z.shape[0],))
    rows = z if z.ndim == 2 else z.permute(0, 2, 3, 1).reshape(-1, case.d)
    assert ((indices >= 0) & (indices < case.K)).all()
    assert not wrong_codes(rows.cpu(), codebook.cpu(), indices.flatten().cpu()).any()
    if case.data == "lattice":  # no rounding, so there is one right answer
        distances = (rows.cpu().double()[:, None] - codebook.cpu().double()).square().sum(-1)
        first = (distances == distances.amin(1, keepdim=True)).int().argmax(1)
        assert torch.equal(indices.flatten().cpu(), first)


@pytest.mark.parametrize("width", (1, 3, 4, 16, 40))
@pytest.mark.parametrize("impl", impls("nearest_codebook"))
def test_nearest_codebook_nan(impl: str, width: int) -> None:
    skip_unless_it_runs("nearest_codebook", impl)
    case = NearestCodebook(40, 300, width)
    inputs = make_inputs("nearest_codebook", case, torch.float32, device_of(impl))
    z, codebook = inputs["z"], inputs["codebook"]
    expected = ops.nearest_codebook(z, codebook, impl=impl)
    z[5, width - 1] = float("nan")
    z[17] = float("nan")
    expected[5] = expected[17] = 0
    assert torch.equal(ops.nearest_codebook(z, codebook, impl=impl), expected), (
        "a NaN row gives 0, and other rows do not change"
    )
    codebook = torch.cat([torch.full_like(codebook[:3], float("nan")), codebook])
    expected = torch.where(z.isnan().any(1), 0, expected + 3)
    assert torch.equal(ops.nearest_codebook(z, codebook, impl=impl), expected), "a NaN code is never nearest"
    far = torch.full_like(codebook[:2], 1e30)  # its distance overflows float32
    far[0] = float("nan")
    assert (ops.nearest_codebook(torch.zeros_like(z), far, impl=impl) == 1).all(), "infinitely far is nearer than NaN"
    codebook = torch.full_like(codebook, float("nan"))
    assert (ops.nearest_codebook(z, codebook, impl=impl) == 0).all()


@pytest.mark.parametrize("impl", impls("nearest_codebook"))
def test_nearest_codebook_split_of_the_batch(impl: str) -> None:
    skip_unless_it_runs("nearest_codebook", impl)
    for width in (3, 4, 24):
        case = NearestCodebook(509, 1025, width)
        inputs = make_inputs("nearest_codebook", case, torch.float32, device_of(impl))
        whole = ops.nearest_codebook(**inputs, impl=impl)
        for size in (1, 7, 128):
            parts = [ops.nearest_codebook(z, inputs["codebook"], impl=impl) for z in inputs["z"].split(size)]
            assert torch.equal(torch.cat(parts), whole)


def test_wrong_codes_are_recognised() -> None:
    """The judge of the tests above must accept only what float32 rounding or equality can explain."""
    inputs = make_inputs("nearest_codebook", NearestCodebook(100, 50, 4), torch.float32)
    right = ops.nearest_codebook(**inputs, impl="reference")
    assert not wrong_codes(**inputs, indices=right).any()
    assert wrong_codes(**inputs, indices=(right + 1) % 50).all()
    twice = torch.cat([inputs["codebook"]] * 2)
    assert not wrong_codes(inputs["z"], twice, right).any()
    assert wrong_codes(inputs["z"], twice, right + 50).all(), "among equal codes the first one is right"
    nudged = torch.cat([inputs["codebook"][right[:1]] * (1 + 1e-2), inputs["codebook"]])
    both = [wrong_codes(inputs["codebook"][right[:1]], nudged, torch.tensor([i])) for i in (0, 1 + int(right[0]))]
    assert [bool(b) for b in both] == [True, False]


# ---- registration ----


@pytest.mark.parametrize("op", ["group_norm_silu", "group_norm_silu_backward", "group_norm_apply"])
def test_a_field_of_the_record_is_an_argument_of_the_registered_op(op: str) -> None:
    arguments = getattr(torch.ops.ldm_fast, op).default._schema.arguments
    first = 1 if op.endswith("backward") else 0
    assert [a.name for a in arguments][first : first + len(Norm._fields)] == list(Norm._fields)
    optional = {name for name, kind in get_type_hints(Norm).items() if type(None) in get_args(kind)}
    assert {a.name for a in arguments if str(a.type).startswith("Optional")} == {*optional, "impl"}


def op_arguments(op: str, impl: str, case: Any, dtype: torch.dtype, *, requires_grad: bool) -> tuple[Any, ...]:
    """Return what `ops.<op>` passes to the registered operator."""
    arguments = list(positional(op, make_inputs(op, case, dtype, device_of(impl))))
    if isinstance(arguments[0], Norm):
        arguments = [*arguments[0], *arguments[1:]]
    if op.startswith("nearest_codebook"):
        arguments[0] = codebook_op._vectors(arguments[0])
    if requires_grad:
        mask = 3 if op == "attention" else None
        arguments = [
            a.detach().requires_grad_() if isinstance(a, Tensor) and i != mask else a for i, a in enumerate(arguments)
        ]
    return (*arguments, impl)


OPCHECK = {
    "attention": (
        Attention(2, 2, 5, 7, 8),
        Attention(2, 2, 5, 5, 8, layout="one_projection", mask="key_padding"),
        Attention(2, 2, 5, 7, 8, layout="rows_sliced", mask="masked_row_additive"),
    ),
    "group_norm_silu": (
        GroupNormSilu((2, 6, 3, 5), 3, modulation="both"),
        GroupNormSilu((2, 6, 3, 5), 3, "channels_last", modulation="scale", float32_affine=True),
        GroupNormSilu((2, 6, 2, 3, 5), 3, "channels_last", affine="weight"),
        GroupNormSilu((2, 6), 3, affine="none", activation=None),
    ),
    "group_norm_stats": (GroupNormSilu((2, 6, 3, 5), 3), GroupNormSilu((2, 6, 3, 5), 3, "channels_last")),
    "group_norm_apply": (
        GroupNormSilu((2, 6, 3, 5), 3, modulation="both"),
        GroupNormSilu((2, 6, 3, 5), 3, "channels_last", modulation="scale", float32_affine=True),
        GroupNormSilu((2, 6), 3, affine="none", activation=None),
    ),
    "nearest_codebook": (
        NearestCodebook(9, 7, 4),
        NearestCodebook(10, 7, 4, map=(2, 5, 1)),
        NearestCodebook(9, 7, 4, layout="columns"),
    ),
    "nearest_codebook_stats": (
        NearestCodebook(9, 7, 4),
        NearestCodebook(10, 7, 4, map=(2, 5, 1)),
        NearestCodebook(9, 7, 4, layout="columns"),
    ),
}


# PyTorch 2.6 compares only with its own tolerances.
OPCHECK_TOLERANCE = {"rtol": 1e-2, "atol": 1e-2} if "rtol" in signature(torch.library.opcheck).parameters else {}


@pytest.mark.parametrize(("op", "impl", "case"), table(OPCHECK))
def test_opcheck(op: str, impl: str, case: Any) -> None:
    dtype = torch.float16 if getattr(case, "layout", "") in ("one_projection", "channels_last") else torch.float32
    requires_grad = op in DIFFERENTIABLE
    arguments = op_arguments(op, impl, case, dtype, requires_grad=requires_grad)
    operator = getattr(torch.ops.ldm_fast, op).default
    with torch.random.fork_rng():
        torch.library.opcheck(operator, arguments, **OPCHECK_TOLERANCE)
    if not requires_grad:
        return
    with torch.no_grad():
        results = operator(*arguments)
        plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        backward = getattr(torch.ops.ldm_fast, f"{op}_backward").default
        given = (random_gradient(results[0]), *plain[:-1], *(results if op == "attention" else results[1:]), impl)
        torch.library.opcheck(backward, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", dispatch.IMPLEMENTATIONS)
def test_compile(op: str) -> None:
    """Each op compiles into one opaque node, forward and backward, whichever implementation is chosen."""
    inputs = make_inputs(op, SOME[op][1], torch.float32)
    keys = [key for key, value in inputs.items() if isinstance(value, Tensor) and key != "mask"]

    def function(*tensors: Tensor) -> Tensor:
        # other ops come before and after, so that they would notice a wrong stride in the fake
        tensors = tuple(t * 1.5 for t in tensors)
        out = getattr(ops, op)(**{**inputs, **dict(zip(keys, tensors, strict=True))})
        if op == "nearest_codebook_stats":
            return torch.cat([part.flatten() * 2.0 for part in out])
        return out + 1 if op == "nearest_codebook" else out.transpose(1, 2).reshape(out.shape[0], -1) * 2

    torch._dynamo.reset()
    tensors = [inputs[key].detach().requires_grad_(op in DIFFERENTIABLE) for key in keys]
    compiled, plain = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors), function(*tensors)
    assert torch.equal(compiled, plain)
    if op in DIFFERENTIABLE:
        grad = random_gradient(plain)
        for a, b in zip(
            torch.autograd.grad(compiled, tensors, grad), torch.autograd.grad(plain, tensors, grad), strict=True
        ):
            assert torch.equal(a, b)


class Watching(TorchDispatchMode):
    """Records what passes the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", dispatch.IMPLEMENTATIONS)
def test_whoever_watches_sees_the_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nobody watches, PyTorch's dispatcher is left out, with the same result."""
    inputs = make_inputs(op, SOME[op][1], torch.float32)
    key, first = next((key, value) for key, value in inputs.items() if isinstance(value, Tensor))
    call = functools.partial(getattr(ops, op), **inputs)
    dispatched: list[str] = []
    operator = OPS[op]
    registered = operator._dispatched
    monkeypatch.setattr(operator, "_dispatched", lambda *args: dispatched.append(op) or registered(*args))

    def seen(result: Any, wanted: Any) -> bool:
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)
        was = bool(dispatched)
        dispatched.clear()
        return was

    with Watching() as watching:
        wanted = call()
    assert f"ldm_fast.{op}.default" in watching.seen
    assert seen(wanted, wanted)
    assert not seen(call(), wanted)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert seen(call(), wanted)
    assert any(event.name == f"ldm_fast::{op}" for event in profile.events())
    graph = make_fx(lambda x: getattr(ops, op)(**{**inputs, key: x}))(first).graph
    assert any(str(node.target) == f"ldm_fast.{op}.default" for node in graph.nodes)
    dispatched.clear()
    with torch.inference_mode():
        assert not seen(call(), wanted)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        call(**{key: fakes.from_tensor(first)})
        assert dispatched
    dispatched.clear()
    call(**{name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()})
    assert dispatched


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float32)], ids=str)
def test_attention_takes_part_in_autocast(dtypes: tuple[torch.dtype, ...]) -> None:
    """Like PyTorch's own attention, it computes in the lower dtype, and gradients have the dtypes of the inputs."""
    q, k, v = (torch.randn(1, 2, 3, 4).to(dtype).requires_grad_() for dtype in dtypes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, wanted = ops.attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
        compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")(q, k, v)
    assert out.dtype == compiled.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
    assert torch.equal(out, compiled)
    gradients = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert tuple(gradient.dtype for gradient in gradients) == dtypes
    assert ops.attention(*(t.detach().double() for t in (q, k, v))).dtype == torch.float64


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_with_and_without_the_dispatcher(op: str) -> None:
    inputs = make_inputs(op, SOME[op][1], torch.float32)
    names = [key for key, value in inputs.items() if isinstance(value, Tensor) and key != "mask"]

    def gradients() -> tuple[Tensor, ...]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        y = getattr(ops, op)(**{**inputs, **leaves})
        return torch.autograd.grad(y, list(leaves.values()), random_gradient(y))

    with Watching() as watching:
        wanted = gradients()
    assert {f"ldm_fast.{op}.default", f"ldm_fast.{op}_backward.default"} <= set(watching.seen)
    torch.testing.assert_close(gradients(), wanted, rtol=0, atol=0)


# ---- choice of the implementation ----


def test_use_impl(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("nearest_codebook", NearestCodebook(3, 5, 4), torch.float32)
    ran: list[str] = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *args: ran.append(choose(*args)) or ran[-1])

    def chosen(**kwargs: Any) -> str:
        ops.nearest_codebook(**inputs, **kwargs)
        return ran[-1]

    best = chosen()
    assert best == next(c.chosen for c in explain().choices if c.op == "nearest_codebook" and c.device == "cpu")
    with use_impl("reference"):
        assert chosen() == "reference"
        with use_impl(None):
            assert chosen() == best
        with use_impl("triton"):
            assert chosen() == best, "an op without an implementation of that name chooses as usual"
        assert chosen() == "reference"
        if best != "reference":
            assert chosen(impl=best) == best, "an explicit impl= takes precedence"
    assert chosen() == best
    with pytest.raises(KeyError), use_impl("reference"):
        raise KeyError
    assert chosen() == best, "an exception must not leave the setting behind"
    with pytest.raises(ValueError, match="use_impl: name must be one of .*cpu.*'gpu'"), use_impl("gpu"):
        pass


@pytest.mark.skipif(why_not("attention", "torch") is not None, reason=str(why_not("attention", "torch")))
def test_pytorchs_attention_is_chosen_if_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was faster in bfloat16 on tile units (AMX), where our kernels reach a half to a fifth of PyTorch's speed."""

    def chosen(keys: int, width: int, dtype: torch.dtype = torch.bfloat16, mask: Tensor | None = None) -> str:
        q, k = torch.zeros(1, 2, 16, width, dtype=dtype), torch.zeros(1, 2, keys, width, dtype=dtype)
        return dispatch.choose("attention", None, (q, k, k, mask, 1.0))

    usual = chosen(1024, 40, torch.float32)
    monkeypatch.setattr(pytorch, "amx_is_used", lambda: True)
    assert chosen(1024, 40) == chosen(77, 160) == chosen(4096, 512) == "torch"
    assert chosen(77, 40) == chosen(77, 80) == usual
    assert chosen(1024, 40, torch.float32) == chosen(1024, 40, torch.float16) == usual
    assert chosen(1024, 40, mask=torch.ones(1, 2, 16, 1024, dtype=torch.bool)) == usual, "masks have not been measured"
    with use_impl("reference"):
        assert chosen(1024, 40) == "reference"
    monkeypatch.setattr(pytorch, "flash_attention_for_cpu", None)
    assert chosen(1024, 40) == usual
    with pytest.raises(ValueError, match="impl='torch' cannot run here: PyTorch .* has no attention for CPUs that"):
        ops.attention(*torch.zeros(3, 1, 1, 2, 8), impl="torch")


def test_use_impl_of_threads_that_overlap() -> None:
    first, second = use_impl("reference"), use_impl("cpu")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.forced() == "cpu"
    second.__exit__(None, None, None)
    assert dispatch.forced() is None


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_backward_runs_what_forward_ran(op: str) -> None:
    """The gradients are right even if `use_impl` is left before the backward pass."""
    inputs = make_inputs(op, SOME[op][0], torch.float32)
    key = "q" if op == "attention" else "x"
    inputs[key] = inputs[key].requires_grad_()
    with use_impl("reference"):
        out = getattr(ops, op)(**inputs)
        (inside,) = torch.autograd.grad(out.sum(), inputs[key], retain_graph=True)
    (outside,) = torch.autograd.grad(out.sum(), inputs[key])
    torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "impl"), [(op, impl) for op in dispatch.IMPLEMENTATIONS for impl in impls(op)])
def test_explicit_impl_runs_or_says_why(op: str, impl: str) -> None:
    inputs = make_inputs(op, SOME[op][0], torch.float32)
    reason = dispatch.why_not(op, impl, positional(op, inputs))
    told = {c.op: {"": c.chosen, **dict(c.passed_over)} for c in explain().choices if c.device == "cpu"}[op]
    if reason is None:
        getattr(ops, op)(**inputs, impl=impl)
        assert told[""] == impl or impl not in told
        return
    with pytest.raises(ValueError) as error:
        getattr(ops, op)(**inputs, impl=impl)
    assert str(error.value) == f"{op}: impl={impl!r} cannot run here: {reason}"
    assert impl in told and "\n" not in reason and len(reason) > 20
    with use_impl(impl), pytest.raises(ValueError, match="cannot run here"):
        getattr(ops, op)(**inputs)


@pytest.mark.parametrize("op", dispatch.IMPLEMENTATIONS)
def test_float64_is_for_the_reference(op: str) -> None:
    inputs = make_inputs(op, SOME[op][0], torch.float64)
    ours, theirs = getattr(ops, op)(**inputs), getattr(ops, op)(**inputs, impl="reference")
    for a, b in zip(*((out if isinstance(out, tuple) else (out,)) for out in (ours, theirs)), strict=True):
        assert torch.equal(a, b)
    for impl in impls(op):
        if impl != "reference":
            with pytest.raises(ValueError, match=f"^{op}: impl='{impl}' cannot run here: "):
                getattr(ops, op)(**inputs, impl=impl)
    if why_not(op, "cpu") is None:
        with pytest.raises(ValueError, match="float64"):
            getattr(ops, op)(**inputs, impl="cpu")


def test_explain_is_a_table() -> None:
    explanation = explain()
    assert {c.op for c in explanation.choices} == set(dispatch.IMPLEMENTATIONS)
    for choice in explanation.choices:
        assert f"{choice.op} on {choice.device}: {choice.chosen}" in str(explanation)
        order = impls(choice.op)
        assert [impl for impl, _ in choice.passed_over] == order[: order.index(choice.chosen)]
        assert all(reason in str(explanation) for _, reason in choice.passed_over)


def test_explain_tells_what_runs_inside_use_impl() -> None:
    """`explain` asks the function that chooses, so it knows of `use_impl` and of what cannot run here."""
    plain = {(c.op, c.device): c for c in explain().choices}
    for impl in dispatch.IMPLEMENTATION_NAMES:
        with use_impl(impl):
            choices = explain().choices
        for choice in choices:
            if impl not in impls(choice.op):
                assert choice == plain[choice.op, choice.device], "an op without that implementation chooses as usual"
            elif choice.chosen is None:
                assert [name for name, _ in choice.passed_over] == [impl]
            else:
                assert (choice.chosen, choice.passed_over) == (impl, ())
    with use_impl("reference"):
        assert all(choice.chosen == "reference" for choice in explain().choices)
        assert "attention on cpu: reference" in str(explain())


@pytest.mark.skipif(why_not("attention", "triton") is None, reason="Triton runs here")
def test_explain_inside_a_use_impl_that_cannot_run() -> None:
    with use_impl("triton"):
        told = str(explain())
    assert f"attention on cpu: cannot run\n    not triton: {why_not('attention', 'triton')}" in told


# ---- bad arguments ----

X = torch.zeros
BAD_CALLS = [
    # op, the arguments changed, the error, a pattern in its message
    ("attention", {"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    ("attention", {"k": X(2, 3, 5, 8, dtype=torch.int64)}, TypeError, "k must have a floating-point dtype"),
    ("attention", {"q": X(2, 4, 8)}, ValueError, r"\(B, H, N, D\)"),
    ("attention", {"k": X(2, 1, 5, 8), "v": X(2, 1, 5, 8)}, ValueError, "with the B, H and D of q"),
    ("attention", {"k": X(2, 3, 5, 9), "v": X(2, 3, 5, 9)}, ValueError, "with the B, H and D of q"),
    ("attention", {"v": X(2, 3, 6, 8)}, ValueError, r"got q .*\(2, 3, 6, 8\)"),
    ("attention", {key: X(2, 3, 4, 0) for key in "qkv"}, ValueError, "head width"),
    ("attention", {"v": X(2, 3, 5, 8, dtype=torch.float16)}, TypeError, "one dtype"),
    ("attention", {"k": X(2, 3, 5, 8, device="meta")}, ValueError, "one device"),
    ("attention", {"mask": "causal"}, TypeError, "mask must be a tensor, got str"),
    ("attention", {"mask": X(4, 5, dtype=torch.int64)}, TypeError, "boolean or floating point"),
    ("attention", {"mask": X(4, 6)}, ValueError, r"broadcast to .*\(2, 3, 4, 5\), got \(4, 6\)"),
    ("attention", {"mask": X(1, 1, 1, 4, 5)}, ValueError, "broadcast"),
    ("attention", {"mask": X(4, 5, device="meta")}, ValueError, "device of q"),
    ("attention", {"mask": X(4, 5, requires_grad=True)}, ValueError, "detach"),
    ("attention", {"scale": "large"}, TypeError, "scale must be a number"),
    ("attention", {"impl": "cuda"}, ValueError, "one of triton, cpu, torch, reference, got 'cuda'"),
    ("group_norm_silu", {"x": None}, TypeError, "x must be a tensor"),
    ("group_norm_silu", {"x": X(6)}, ValueError, "0 to 3 spatial dims"),
    ("group_norm_silu", {"x": X(2, 6, 1, 1, 1, 1)}, ValueError, "0 to 3 spatial dims"),
    ("group_norm_silu", {"x": X(2, 6, 5, dtype=torch.int32)}, TypeError, "floating-point"),
    ("group_norm_silu", {"num_groups": 4}, ValueError, "must divide the 6 channels of x, got 4"),
    ("group_norm_silu", {"num_groups": 0}, ValueError, "num_groups"),
    ("group_norm_silu", {"num_groups": -3}, ValueError, "num_groups"),
    ("group_norm_silu", {"num_groups": 3.0}, TypeError, "num_groups must be an integer"),
    ("group_norm_silu", {"weight": X(5)}, ValueError, r"weight must have shape \(6,\), got \(5,\)"),
    ("group_norm_silu", {"bias": X(6, 1)}, ValueError, "bias must have shape"),
    ("group_norm_silu", {"scale": X(6)}, ValueError, r"scale must have shape \(2, 6\)"),
    ("group_norm_silu", {"shift": X(1, 6)}, ValueError, "shift must have shape"),
    ("group_norm_silu", {"weight": X(6, dtype=torch.int64)}, TypeError, "weight must have a floating-point dtype"),
    ("group_norm_silu", {"bias": X(6, device="meta")}, ValueError, "bias must be on the device of x"),
    ("group_norm_silu", {"eps": 0.0}, ValueError, "eps must be above 0"),
    ("group_norm_silu", {"eps": float("nan")}, ValueError, "eps must be above 0"),
    ("group_norm_silu", {"activation": "relu"}, ValueError, "\"silu\" or None, got 'relu'"),
    ("group_norm_silu", {"impl": "fast"}, ValueError, "impl must be None or one of"),
    ("group_norm_stats", {"x": X(6)}, ValueError, "0 to 3 spatial dims"),
    ("group_norm_stats", {"num_groups": 4}, ValueError, "must divide the 6 channels of x, got 4"),
    ("group_norm_stats", {"impl": "cuda"}, ValueError, "one of triton, cpu, reference, got 'cuda'"),
    ("group_norm_apply", {"stats": None}, TypeError, "stats must be a tensor"),
    ("group_norm_apply", {"stats": X(2, 3, 2)}, ValueError, r"stats must be \(2, 3, 3\) in float64, got \(2, 3, 2\)"),
    ("group_norm_apply", {"stats": X(2, 3, 3)}, ValueError, "in torch.float32"),
    ("group_norm_apply", {"stats": X(2, 3, 3, device="meta").double()}, ValueError, "device of x"),
    ("group_norm_apply", {"bias": X(5)}, ValueError, "bias must have shape"),
    ("group_norm_apply", {"eps": 0.0}, ValueError, "eps must be above 0"),
    ("group_norm_apply", {"activation": "relu"}, ValueError, "\"silu\" or None, got 'relu'"),
    ("nearest_codebook", {"z": 3}, TypeError, "z must be a tensor, got int"),
    ("nearest_codebook", {"z": X(4, 3, 5)}, ValueError, r"\(N, d\) or \(B, d, H, W\)"),
    ("nearest_codebook", {"z": X(4, 3, dtype=torch.int64)}, TypeError, "floating-point"),
    ("nearest_codebook", {"z": X(4, 2)}, ValueError, "codebook's 3 numbers"),
    ("nearest_codebook", {"z": X(4, 5, 3, 3)}, ValueError, "codebook's 3 numbers"),
    ("nearest_codebook", {"codebook": X(0, 3)}, ValueError, "at least 1"),
    ("nearest_codebook", {"codebook": X(4, 0), "z": X(5, 0)}, ValueError, "at least 1"),
    ("nearest_codebook", {"codebook": X(4)}, ValueError, r"codebook must be \(K, d\)"),
    ("nearest_codebook", {"codebook": X(4, 3, dtype=torch.float16)}, TypeError, "one dtype"),
    ("nearest_codebook", {"codebook": X(4, 3, device="meta")}, ValueError, "one device"),
    ("nearest_codebook", {"impl": "triton"}, ValueError, "one of cuda, cpu, reference, got 'triton'"),
    ("nearest_codebook_stats", {"z": X(4, 2)}, ValueError, "codebook's 3 numbers"),
    ("nearest_codebook_stats", {"codebook": [1.0]}, TypeError, "codebook must be a tensor, got list"),
    ("nearest_codebook_stats", {"impl": "triton"}, ValueError, "one of cuda, cpu, reference, got 'triton'"),
]
GOOD = {
    "attention": {"q": X(2, 3, 4, 8), "k": X(2, 3, 5, 8), "v": X(2, 3, 5, 8)},
    "group_norm_silu": {"x": X(2, 6, 5), "num_groups": 3, "weight": X(6), "bias": X(6)},
    "group_norm_stats": {"x": X(2, 6, 5), "num_groups": 3},
    "group_norm_apply": {
        "x": X(2, 6, 5),
        "stats": torch.ones(2, 3, 3).double(),
        "num_groups": 3,
        "weight": X(6),
        "bias": X(6),
    },
    "nearest_codebook": {"z": X(4, 3), "codebook": X(7, 3)},
    "nearest_codebook_stats": {"z": X(4, 3), "codebook": X(7, 3)},
}


@pytest.mark.parametrize(
    ("op", "change", "error", "words"),
    [pytest.param(*call, id=f"{call[0]}-{'-'.join(call[1])}-{number}") for number, call in enumerate(BAD_CALLS)],
)
def test_bad_arguments(op: str, change: dict[str, Any], error: type[Exception], words: str) -> None:
    getattr(ops, op)(**GOOD[op])
    with pytest.raises(error, match=f"(?s)^{op}: .*{words}"):
        getattr(ops, op)(**{**GOOD[op], **change})


def test_mask_of_any_rank_and_dtype() -> None:
    """Any mask that broadcasts to (B, H, N, M) is accepted, and means the same as in PyTorch."""
    q, k, v = (make_inputs("attention", Attention(2, 3, 4, 5, 8), torch.float32)[key] for key in "qkv")
    generator = torch.Generator().manual_seed(3)
    shapes = ((), (5,), (4, 1), (1, 5), (3, 1, 1), (2, 1, 1, 5), (2, 3, 4, 5))
    for shape, kind in itertools.product(shapes, (torch.bool, torch.float32, torch.float16, torch.float64)):
        draw = torch.randn(shape, generator=generator)
        mask = draw > -2 if kind == torch.bool else draw.to(kind)
        expected = attention_formula(q, k, v, mask.expand(2, 3, 4, 5))
        torch.testing.assert_close(ops.attention(q, k, v, mask=mask), expected, rtol=1e-4, atol=1e-5)


# ---- Triton without a GPU ----

# A few cases for every kernel and branch. All take minutes: TRITON_INTERPRET=1 pytest tests/test_ops.py -k triton
INTERPRETED = (
    "attention-triton-1x1x1x1x1-float32",
    "attention-triton-2x3x7x13x3-float16",
    "attention-triton-2x3x13x13x5-one_projection-float32",
    "attention-triton-2x3x11x19x8-masked_row-float32",
    "attention-triton-1x1x67x257x40-float32",
    "attention-triton-1x1x19x23x257-float32",
    "attention-triton-2x2x37x77x40-float16",
    "group_norm_silu-triton-2x12x5x3-g4-modulation_both-float32",
    "group_norm_silu-triton-2x12x5x3-g4-channels_last-affine_none-modulation_both-float32",
    "group_norm_silu-triton-1x26x13x11-g2-float16",
    "group_norm_silu-triton-2x6x5x7-g3-sliced-float32",
)
INTERPRETED_PARTS = ("contiguous-(4, 5)", "channels_last-(1, 3, 0, 5)")


@pytest.mark.skipif(INTERPRETING or ACCELERATOR == "cuda", reason="the Triton kernels run in this process")
def test_triton_in_the_interpreter() -> None:
    """The same tests run in another process, since Triton decides as it decorates a kernel whether to interpret it."""
    pytest.importorskip("triton")
    tests = [f"{__file__}::test_forward_and_gradients[{case}]" for case in INTERPRETED]
    tests += [f"{__file__}::test_parts_give_what_the_whole_gives[triton-{case}]" for case in INTERPRETED_PARTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{len(tests)} passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_attention_backward_takes_any_layout_of_what_was_saved(impl):
    """torch.compile may keep q, k, v and the result in other layouts, for example with heads last."""
    if impl == "cpu" and cpu.unavailable():
        pytest.skip(str(cpu.unavailable()))
    q, k, v, grad = torch.randn(4, 2, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    out, lse = torch.ops.ldm_fast.attention(q, k, v, None, 0.3, impl)
    wanted = torch.ops.ldm_fast.attention_backward(grad, q, k, v, None, 0.3, out, lse, impl)
    heads_last = (t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for t in (grad, q, k, v))
    grad, q, k, v = heads_last
    out = out.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert q.stride(-1) != 1
    got = torch.ops.ldm_fast.attention_backward(grad, q, k, v, None, 0.3, out, lse, impl)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
