"""The backward pass of `attention` in Triton: dq, dk and dv from what the forward pass returned, deterministic.

p = exp(s - lse);  dv = pᵀ g;  dp = g vᵀ;  ds = p (dp - Σ p dp);  dq = scale · ds k;  dk = scale · dsᵀ q

Short    At most 128 keys and 80 columns: a program keeps all of K and V, computes each score once, writes dq, and
         leaves a partial dk and dv, which are summed afterwards in fixed order. Five products per tile instead of the
         long form's seven: (2, 8, 4096, 77, 40) takes 3.36 GFLOP instead of 5.03, and the long form has no more than
         32 programs for dk and dv.
Long     A program owns a tile of queries (dq) or of keys (dk and dv) and walks over the other side.
Wide     A head too wide to be kept: as the long form, but a program owns a piece of the gradient's columns
         (PIECES > 1) and recomputes the scores, D0 columns at a time.
Apart    Heads of which the registers hold dk or dv, but not both: each has programs of its own (APART). A program of
         both spills at 160 columns, and at 512 in pieces of 256; in pieces of 128 it does not, but recomputes the
         scores twice as often, which makes a quarter more products.

Figures are for sm_80, by `benchmarks/gpu_static.py`. Layouts, and tiles in two pieces: `attention_common`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Launch, cdiv, next_power_of_2
from .attention_common import (
    BOTH,
    GENERAL,
    INF,
    LOG2E,
    REGISTERS,
    Inputs,
    dot,
    dot2,
    empty_like,
    launch_of,
    load,
    load2,
    one_head,
    pieces_of,
    plan,
    probabilities,
    product,
    scores,
    store,
    store2,
    wide_product,
    zeros2,
)

SHORT_KEYS = 128  # the most keys that a program keeps
SHORT_GRADIENT = 80  # the widest head whose dk and dv for all those keys stay in a program's registers


@triton.jit
def _recompute(
    k0, k1, v0, v1, q0, q1, g0, g1, row_lse, scale_log2, mask, mask_n, mask_m, row, N, key, M,
    D1: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """p and dp of some keys, transposed.  # (M0 or M1, BLOCK_N)"""
    s = product(k0, k1, q0, q1, D1)
    s = scores(s, scale_log2, mask, mask_n, mask_m, row[None, :], N, key[:, None], M, PER_QUERY, True)
    return probabilities(s, row_lse, mask), product(v0, v1, g0, g1, D1)


@triton.jit(do_not_specialize=GENERAL)
def _backward_short(
    grad, q, k, v, mask, lse, dq, dk_parts, dv_parts,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, mask_b, mask_h, mask_n, mask_m,
    H, N, M, tiles, scale, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, M0: tl.constexpr, M1: tl.constexpr,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """tiles · BLOCK_N queries of one head: their dq, and what they add to dk and dv.

    Tiles are transposed, keys × queries, and each warp has 16 keys of its own: keys and their gradients then take few
    registers, and p and ds are left operands as they are. A second piece has only 16 keys, so there the warps divide
    queries and columns. A second piece of 16 columns would be too narrow for that: all columns are one piece then.
    """
    tl.static_assert(M1 == 0 or D1 == 0)
    pid, groups = tl.program_id(0), tl.cdiv(N, BLOCK_N * tiles)
    first = (pid % groups) * (BLOCK_N * tiles)
    b, h, q, k, v, lse = one_head(pid // groups, q, k, v, lse, q_b, q_h, k_b, k_h, v_b, v_h, H, N, UNIT)
    grad += (b * g_b + h * g_h) * UNIT
    dq += (b * N * H + h) * D
    dk_parts += pid.to(tl.int64) * M * D
    dv_parts += pid.to(tl.int64) * M * D
    if mask is not None:
        mask += b * mask_b + h * mask_h

    key = tl.arange(0, M0)
    k0, k1 = load2(k, key, M, k_m * UNIT, 0, D, D0, D1)  # (M0, D0), (M0, D1)
    v0, v1 = load2(v, key, M, v_m * UNIT, 0, D, D0, D1)
    dk0, dk1 = zeros2(M0, D0, D1)
    dv0, dv1 = zeros2(M0, D0, D1)
    if M1 > 0:
        rest = M0 + tl.arange(0, M1)
        dk_rest = tl.zeros((M1, D0), tl.float32)
        dv_rest = tl.zeros((M1, D0), tl.float32)
    for tile in range(tiles):
        row = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        q0, q1 = load2(q, row, N, q_n * UNIT, 0, D, D0, D1)  # (BLOCK_N, D0), (BLOCK_N, D1)
        g0, g1 = load2(grad, row, N, g_n * UNIT, 0, D, D0, D1)
        row_lse = tl.load(lse + row, mask=row < N, other=INF)[None, :]  # beyond N: probabilities of zero

        p, dp = _recompute(
            k0, k1, v0, v1, q0, q1, g0, g1, row_lse, scale_log2, mask, mask_n, mask_m, row, N, key, M, D1, PER_QUERY
        )
        delta = tl.sum(p * dp, 0)[None, :]
        if M1 > 0:
            k_rest = load(k, rest, M, k_m * UNIT, tl.arange(0, D0), D)  # (M1, D0)
            v_rest = load(v, rest, M, v_m * UNIT, tl.arange(0, D0), D)
            p_rest, dp_rest = _recompute(
                k_rest, k_rest, v_rest, v_rest, q0, q1, g0, g1, row_lse, scale_log2, mask, mask_n, mask_m, row, N,
                rest, M, D1, PER_QUERY,
            )  # fmt: skip
            delta += tl.sum(p_rest * dp_rest, 0)[None, :]
            ds_rest = (p_rest * (dp_rest - delta)).to(q.dtype.element_ty)
            p_rest = p_rest.to(q.dtype.element_ty)
        ds = (p * (dp - delta)).to(q.dtype.element_ty)
        p = p.to(q.dtype.element_ty)
        dv0 = dot(p, g0, dv0)
        dk0 = dot(ds, q0, dk0)
        if D1 > 0:
            dv1 = dot(p, g1, dv1)
            dk1 = dot(ds, q1, dk1)
        if M1 > 0:  # last: if the compiler for sm_80 sees them first, every warp computes the whole products
            dv_rest = dot(p_rest, g0, dv_rest)
            dk_rest = dot(ds_rest, q0, dk_rest)

        # In branches of their own: the compiler divides products that it sees together among the warps in one way, and
        # what suits keys times columns does not suit queries times columns. The keys are loaded once more, from the
        # first-level cache: as right operands they would fill the registers of every warp.
        if first + tile * BLOCK_N < N:
            right = load(k, key, M, k_m * UNIT, tl.arange(0, D0), D)
            part = tl.dot(tl.trans(ds), right, input_precision="ieee")  # (BLOCK_N, D0)
            if M1 > 0:
                right = load(k, rest, M, k_m * UNIT, tl.arange(0, D0), D)
                part = dot(tl.trans(ds_rest), right, part)
            store(dq, row, N, H * D, tl.arange(0, D0), D, part * scale)
        if D1 > 0:
            if first + tile * BLOCK_N < N:
                right = load(k, key, M, k_m * UNIT, D0 + tl.arange(0, D1), D)
                part = tl.dot(tl.trans(ds), right, input_precision="ieee")  # (BLOCK_N, D1)
                store(dq, row, N, H * D, D0 + tl.arange(0, D1), D, part * scale)

    store2(dk_parts, key, M, D, 0, D, D0, D1, dk0 * scale, dk1 * scale)
    store2(dv_parts, key, M, D, 0, D, D0, D1, dv0, dv1)
    if M1 > 0:
        store(dk_parts, rest, M, D, tl.arange(0, D0), D, dk_rest * scale)
        store(dv_parts, rest, M, D, tl.arange(0, D0), D, dv_rest)


@triton.jit(do_not_specialize=GENERAL)
def _sum_parts(dk_parts, dv_parts, dk, dv, H, M, groups, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of one head's dk and dv: the partial sums of its query groups, added in their order."""
    blocks = tl.cdiv(M * D, BLOCK)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < M * D
    dk_parts += bh * groups * M * D
    dv_parts += bh * groups * M * D
    sum_k = tl.zeros((BLOCK,), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    for group in range(groups):
        sum_k += tl.load(dk_parts + group * M * D + place, mask=inside, other=0.0)
        sum_v += tl.load(dv_parts + group * M * D + place, mask=inside, other=0.0)
    target = (bh // H * M * H + bh % H) * D + (place // D).to(tl.int64) * (H * D) + place % D
    tl.store(dk + target, sum_k.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + target, sum_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=GENERAL)
def _backward_queries(
    grad, q, k, v, mask, out, lse, dq, delta,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, o_b, o_h, o_n, mask_b, mask_h, mask_n, mask_m,
    H, N, M, width, scale, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BOUND: tl.constexpr, UNIT: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """dq (one piece of its columns) and delta = Σ grad · out of BLOCK_N queries of one head; reads k and v once."""
    pid, tiles = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    start = pid % PIECES * D0  # the piece's first column
    row = (pid // PIECES % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, h, q, k, v, lse = one_head(pid // PIECES // tiles, q, k, v, lse, q_b, q_h, k_b, k_h, v_b, v_h, H, N, UNIT)
    grad += (b * g_b + h * g_h) * UNIT
    out += (b * o_b + h * o_h) * UNIT
    dq += (b * N * H + h) * D
    delta += (b * H + h) * N
    if mask is not None:
        mask += b * mask_b + h * mask_h

    if PIECES > 1:
        row_delta = tl.zeros((BLOCK_N,), tl.float32)
        for col in range(0, width, D0):
            g = load(grad, row, N, g_n * UNIT, col + tl.arange(0, D0), D).to(tl.float32)
            o = load(out, row, N, o_n * UNIT, col + tl.arange(0, D0), D).to(tl.float32)
            row_delta += tl.sum(g * o, 1)
    else:
        q0, q1 = load2(q, row, N, q_n * UNIT, 0, D, D0, D1)  # (BLOCK_N, D0), (BLOCK_N, D1)
        g0, g1 = load2(grad, row, N, g_n * UNIT, 0, D, D0, D1)
        o0, o1 = load2(out, row, N, o_n * UNIT, 0, D, D0, D1)
        row_delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
        if D1 > 0:
            row_delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    tl.store(delta + row, row_delta, mask=row < N)
    row_lse = tl.load(lse + row, mask=row < N, other=INF)[:, None]

    dq0, dq1 = zeros2(BLOCK_N, D0, D1)
    for first in range(0, M, BLOCK_M):
        key = first + tl.arange(0, BLOCK_M)
        if PIECES > 1:
            s = wide_product(q, row, N, q_n * UNIT, k, key, M, k_m * UNIT, width, D, D0)
            dp = wide_product(grad, row, N, g_n * UNIT, v, key, M, v_m * UNIT, width, D, D0)
        k0, k1 = load2(k, key, M, k_m * UNIT, start, D, D0, D1)  # (BLOCK_M, D0), (BLOCK_M, D1)
        if PIECES == 1:
            v0, v1 = load2(v, key, M, v_m * UNIT, 0, D, D0, D1)
            s, dp = product(q0, q1, k0, k1, D1), product(g0, g1, v0, v1, D1)  # (BLOCK_N, BLOCK_M)
        s = scores(s, scale_log2, mask, mask_n, mask_m, row[:, None], N, key[None, :], M, PER_QUERY, BOUND)
        ds = (probabilities(s, row_lse, mask) * (dp - row_delta[:, None])).to(q.dtype.element_ty)
        dq0, dq1 = dot2(ds, k0, k1, dq0, dq1, D1)
    store2(dq, row, N, H * D, start, D, D0, D1, dq0 * scale, dq1 * scale)


@triton.jit
def _key_gradients(
    grad, q, k, v, mask, lse, delta, dk, dv, g_n, q_n, k_m, v_m, mask_n, mask_m, key, start,
    H, N, M, width, scale, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNIT: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """dk and dv, or whichever is not None, of one head's keys `key`, in the columns from `start` on.

    The pointers are to that head. Scores are transposed, keys × queries, so that they are left operands as they are.
    Keys beyond M need no care: a key's row of the gradients depends on that key alone, and those rows are not stored.
    """
    if PIECES == 1:
        k0, k1 = load2(k, key, M, k_m * UNIT, 0, D, D0, D1)  # (BLOCK_M, D0), (BLOCK_M, D1)
        if dk is not None:
            v0, v1 = load2(v, key, M, v_m * UNIT, 0, D, D0, D1)
    dk0, dk1 = zeros2(BLOCK_M, D0, D1)
    dv0, dv1 = zeros2(BLOCK_M, D0, D1)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        if PIECES > 1:
            s = wide_product(k, key, M, k_m * UNIT, q, row, N, q_n * UNIT, width, D, D0)
            if dk is not None:
                dp = wide_product(v, key, M, v_m * UNIT, grad, row, N, g_n * UNIT, width, D, D0)
        q0, q1 = load2(q, row, N, q_n * UNIT, start, D, D0, D1)  # (BLOCK_N, D0), (BLOCK_N, D1)
        g0, g1 = load2(grad, row, N, g_n * UNIT, start, D, D0, D1)
        if PIECES == 1:
            s = product(k0, k1, q0, q1, D1)  # (BLOCK_M, BLOCK_N)
            if dk is not None:
                dp = product(v0, v1, g0, g1, D1)
        s = scores(s, scale_log2, mask, mask_n, mask_m, row[None, :], N, key[:, None], M, PER_QUERY, False)
        row_lse = tl.load(lse + row, mask=row < N, other=INF)[None, :]  # beyond N: probabilities of zero
        p = probabilities(s, row_lse, mask)
        if dk is not None:
            row_delta = tl.load(delta + row, mask=row < N, other=0.0)[None, :]
            dk0, dk1 = dot2((p * (dp - row_delta)).to(q.dtype.element_ty), q0, q1, dk0, dk1, D1)
        if dv is not None:
            dv0, dv1 = dot2(p.to(q.dtype.element_ty), g0, g1, dv0, dv1, D1)
    if dk is not None:
        store2(dk, key, M, H * D, start, D, D0, D1, dk0 * scale, dk1 * scale)
    if dv is not None:
        store2(dv, key, M, H * D, start, D, D0, D1, dv0, dv1)


@triton.jit(do_not_specialize=GENERAL)
def _backward_keys(
    grad, q, k, v, mask, lse, delta, dk, dv,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, mask_b, mask_h, mask_n, mask_m,
    H, N, M, width, scale, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PIECES: tl.constexpr, APART: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNIT: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_M keys of one head: one piece of their columns and, if APART, one of the two.

    Reads q, grad, lse and delta once.
    """
    PARTS: tl.constexpr = 2 * PIECES if APART else PIECES
    pid, tiles = tl.program_id(0), tl.cdiv(M, BLOCK_M)
    start = pid % PIECES * D0  # the piece's first column
    key = (pid // PARTS % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    b, h, q, k, v, lse = one_head(pid // PARTS // tiles, q, k, v, lse, q_b, q_h, k_b, k_h, v_b, v_h, H, N, UNIT)
    grad += (b * g_b + h * g_h) * UNIT
    dk += (b * M * H + h) * D
    dv += (b * M * H + h) * D
    delta += (b * H + h) * N
    if mask is not None:
        mask += b * mask_b + h * mask_h

    if APART:
        if pid // PIECES % 2 == 0:
            _key_gradients(
                grad, q, k, v, mask, lse, delta, dk, None, g_n, q_n, k_m, v_m, mask_n, mask_m, key, start,
                H, N, M, width, scale, scale_log2, D, D0, D1, PIECES, BLOCK_N, BLOCK_M, UNIT, PER_QUERY,
            )  # fmt: skip
        else:
            _key_gradients(
                grad, q, k, v, mask, lse, delta, None, dv, g_n, q_n, k_m, v_m, mask_n, mask_m, key, start,
                H, N, M, width, scale, scale_log2, D, D0, D1, PIECES, BLOCK_N, BLOCK_M, UNIT, PER_QUERY,
            )  # fmt: skip
    else:
        _key_gradients(
            grad, q, k, v, mask, lse, delta, dk, dv, g_n, q_n, k_m, v_m, mask_n, mask_m, key, start,
            H, N, M, width, scale, scale_log2, D, D0, D1, PIECES, BLOCK_N, BLOCK_M, UNIT, PER_QUERY,
        )  # fmt: skip


def backward_launches(
    grad: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, gradients: tuple[Tensor, Tensor, Tensor]
) -> list[Launch]:
    """What `attention_backward` launches, in this order, to fill the gradients of q, k and v."""
    q, k, v, mask, scale = inputs
    (b, h, n, d), m, masked, (dq, dk, dv) = q.shape, k.shape[2], mask is not None, gradients
    tensors, scales = (grad, q, k, v, inputs.mask_bytes), (scale, scale * LOG2E.value)
    strides, options = inputs.strides(grad, q, k, v)
    options["num_stages"] = 1
    if m <= SHORT_KEYS and inputs.half and d <= SHORT_GRADIENT:
        (d0, d1), (m0, m1) = pieces_of(d), (max(16, next_power_of_2(m)), 0)
        if mask is None and 16 < d <= 64 and pieces_of(m) == (64, 16):
            # 80 keys instead of 128 save more than 64 columns instead of 48 cost: 17 % fewer products
            (d0, d1), (m0, m1) = (next_power_of_2(d), 0), (64, 16)
        block = 64 if d0 + d1 <= 48 else 16 if masked and d > 64 else 32
        tiles = max(1, min(16, n // (8 * block)))
        groups = cdiv(n, block * tiles)
        parts = torch.empty((2, b * h * groups, m, d), dtype=torch.float32, device=q.device)
        options.update(D0=d0, D1=d1, M0=m0, M1=m1, BLOCK_N=block, num_warps=8 if m0 > 64 else 4)
        args = (*tensors, lse, dq, *parts, *strides, h, n, m, tiles, *scales)
        add, blocks = {"D": d, "BLOCK": 256, "num_warps": 2}, cdiv(m * d, 256)
        return [
            launch_of(_backward_short, b * h * groups, args, options),
            Launch(_sum_parts, b * h * blocks, (*parts, dk, dv, h, m, groups), add, 8),
        ]
    delta = torch.empty_like(lse)
    options.update(REGISTERS if d > 128 else {})
    keys = plan(d, inputs.half, masked, backward=True, keys=True)
    apart = keys.columns["D0"] + keys.columns["D1"] > BOTH
    for_keys = {**options, "APART": apart, "BLOCK_N": keys.step, "BLOCK_M": keys.own}
    args = (*tensors, lse, delta, dk, dv, *strides, h, n, m, d, *scales)
    launch = keys.launch(_backward_keys, b * h * (2 if apart else 1), m, args, for_keys)
    strides, units = inputs.strides(grad, q, k, v, out)
    queries = plan(d, inputs.half, masked, backward=True)
    options.update(units, BLOCK_N=queries.own, BLOCK_M=queries.step, BOUND=m % queries.step > 0)
    args = (*tensors, out, lse, dq, delta, *strides, h, n, m, d, *scales)
    return [queries.launch(_backward_queries, b * h, n, args, options), launch]


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), from what the forward returned."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()  # the gradient of a sum has strides of zero
    gradients = empty_like(q), empty_like(k), empty_like(v)
    for launch in backward_launches(grad, Inputs(q, k, v, mask, scale), out, lse, gradients):
        launch.run()
    return gradients
