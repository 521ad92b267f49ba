"""Fused attention in Triton: out = softmax(q kᵀ · scale + mask) v, forward and backward, deterministic.

Layout   q (B, H, N, D), k and v (B, H, M, D), any strides with a unit last one; out and the gradients are
         (B, H, N, D) tensors whose memory is (B, N, H, D), so that the projection after them reads them without a copy.
         lse (B, H, N) is the natural logarithm of each row's sum of exponentials; -inf marks a fully masked row, whose
         output is zero.
Widths   A tile's width is a power of two. Instead of padding 40 to 64, a width is two pieces: 40 = 32 + 16,
         80 = 64 + 16, 160 = 128 + 32, and 77 keys = 64 + 16. Columns beyond the width are loaded as zeros.
Short    M <= 128: a program keeps all of K and V, walks over its query tiles and needs one softmax pass without
         rescaling. Its backward computes each score once, writes dq, and leaves one partial dk and dv, summed
         afterwards in fixed order.
Long     A program owns a tile of queries (forward, dq) or of keys (dk and dv) and walks over the other side, with
         Milakov and Gimelshein's online softmax (arXiv:1805.02867) as in FlashAttention-2 (arXiv:2307.08691). Where
         registers hold dk or dv, but not both, each has programs of its own.
Wide     A head too wide to be kept: as long, but a program owns a piece of the output's columns and recomputes the
         scores, D0 columns at a time.

Scores are kept in units of log2: exp2 is what the hardware computes. How work is divided depends on N, M and D alone,
never on B or H, and nothing is accumulated with atomics: a row of a batch has the same bits as the row alone.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import Launch, refuse, unavailable

__all__ = ["attention", "attention_backward", "attention_unsupported", "unavailable"]

SHORT_KEYS = 128  # keys that a program keeps
SHORT_WIDTH = 192  # widest head with which they fit
# Keys, and keys times columns, both padded, that a program keeps: sm_86, sm_89 and sm_120 have 99 KB for it
SHORT_UNMASKED, SHORT_MASKED = (128, 16384), (96, 12800)
SHORT_GRADIENT = 80  # widest head whose dk and dv for all those keys stay in a program's registers
BOTH, ONE = 128, 160  # widest heads of which a long program keeps both dk and dv of its keys, and one of them
WIDEST = 1024
RESIDENT_WARPS = 8  # that a multiprocessor is meant to hold: two for each scheduler, at up to 255 registers a thread
# As many registers as RESIDENT_WARPS leave: left alone, the compiler makes room for more programs and spills, for sm_80
# in the forward pass of 32 columns, for sm_100 in wide heads.
REGISTERS = {"maxnreg": 255}
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32
INF = tl.constexpr(float("inf"))
# Arguments of which a kernel needs to know nothing in advance: what matters of strides is in UNIT. So one compiled
# kernel serves every number of images, heads, queries and keys that is divided alike.
GENERAL = (
    *("g_b", "g_h", "g_n", "q_b", "q_h", "q_n", "k_b", "k_h", "k_m", "v_b", "v_h", "v_m", "o_b", "o_h", "o_n"),
    *("H", "N", "M", "width", "tiles", "groups"),
)


@triton.jit
def _where(index, H):
    """The batch and the head of a (B·H) index, in 64 bits: offsets of whole images pass 2³¹."""
    return (index // H).to(tl.int64), (index % H).to(tl.int64)


@triton.jit
def _load(ptr, row, rows, stride, col, D: tl.constexpr):
    """Rows `row` and columns `col` of a matrix with `rows` rows and D columns, zero outside.  # (R, C)"""
    inside = (row < rows)[:, None] & (col < D)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def _store(ptr, row, rows, stride, col, D: tl.constexpr, value):
    inside = (row < rows)[:, None] & (col < D)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * stride + col[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load2(ptr, row, rows, stride, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Whole rows, as pieces of D0 and D1 columns (without a second piece, the first one stands in for it)."""
    first = _load(ptr, row, rows, stride, tl.arange(0, D0), D)
    second = first
    if D1 > 0:
        second = _load(ptr, row, rows, stride, D0 + tl.arange(0, D1), D)
    return first, second


@triton.jit
def _dot(a, b, acc):
    # "ieee": the product of two float32 tiles is not rounded to tf32
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _product(a0, a1, b0, b1, D1: tl.constexpr):
    """a bᵀ of rows in two pieces.  # (R, D), (S, D) -> (R, S)"""
    s = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1 > 0:
        s = _dot(a1, tl.trans(b1), s)
    return s


@triton.jit
def _wide_product(
    a_ptr, a_row, a_rows, a_stride, b_ptr, b_row, b_rows, b_stride, width,
    D: tl.constexpr, D0: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """a bᵀ of rows too wide to be kept, D0 columns at a time.  # (R, D), (S, D) -> (R, S)

    width is D at run time: a known number of steps would be unrolled, which takes more registers than there are.
    """
    s = tl.zeros((R, S), tl.float32)
    for start in range(0, width, D0):
        col = start + tl.arange(0, D0)
        a = _load(a_ptr, a_row, a_rows, a_stride, col, D)
        b = _load(b_ptr, b_row, b_rows, b_stride, col, D)
        s = _dot(a, tl.trans(b), s)
    return s


@triton.jit
def _scores(product, scale_log2, mask_ptr, mask_n, mask_m, row, rows, key, keys, PER_QUERY: tl.constexpr):
    """product · scale + mask in units of log2.

    row and key are (R, 1) and (1, S), or (1, R) and (S, 1) for a transposed tile. A mask with one value per key (key
    padding) is read once per key. A boolean mask arrives as uint8.
    """
    s = product * scale_log2
    if mask_ptr is not None:
        if PER_QUERY:
            place = mask_ptr + row.to(tl.int64) * mask_n + key.to(tl.int64) * mask_m
            value = tl.load(place, mask=(row < rows) & (key < keys), other=0)
        else:
            value = tl.load(mask_ptr + key.to(tl.int64) * mask_m, mask=key < keys, other=0)
        if mask_ptr.dtype.element_ty == tl.uint8:
            s = tl.where(value != 0, s, -INF)
        else:
            # float32's lowest value stays finite in units of log2: a row of it alone is uniform, not masked
            value = value.to(tl.float32)
            s += tl.where(value == -INF, -INF, tl.maximum(value * LOG2E, LOWEST, propagate_nan=tl.PropagateNan.ALL))
    return s


@triton.jit
def _probabilities(s, lse, mask_ptr):
    """exp(score - lse), lse broadcast along the keys; a fully masked row has only zeros."""
    exponent = s - tl.where(lse == -INF, 0.0, lse) * LOG2E
    if mask_ptr is not None:
        # rounding of huge negative scores must not make a probability above one
        exponent = tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(exponent)


@triton.jit(do_not_specialize=GENERAL)
def _forward_short(
    q, k, v, mask, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, mask_b, mask_h, mask_n, mask_m,
    H, N, M, tiles, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, M0: tl.constexpr, M1: tl.constexpr,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """tiles · BLOCK_N queries of one head over all of its keys; moves q, k, v and out once."""
    groups = tl.cdiv(N, BLOCK_N * tiles)
    b, h = _where(tl.program_id(0) // groups, H)
    first = (tl.program_id(0) % groups) * (BLOCK_N * tiles)
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    out += (b * N * H + h) * D
    lse += (b * H + h) * N
    if mask is not None:
        mask += b * mask_b + h * mask_h

    key0 = tl.arange(0, M0)
    k00, k01 = _load2(k, key0, M, k_m * UNIT, D, D0, D1)  # (M0, D0), (M0, D1)
    v00, v01 = _load2(v, key0, M, v_m * UNIT, D, D0, D1)
    if M1 > 0:
        key1 = M0 + tl.arange(0, M1)
        k10, k11 = _load2(k, key1, M, k_m * UNIT, D, D0, D1)  # (M1, D0), (M1, D1)
        v10, v11 = _load2(v, key1, M, v_m * UNIT, D, D0, D1)

    for tile in range(tiles):
        row = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        q0, q1 = _load2(q, row, N, q_n * UNIT, D, D0, D1)  # (BLOCK_N, D0), (BLOCK_N, D1)

        s0 = _product(q0, q1, k00, k01, D1)  # (BLOCK_N, M0)
        s0 = _scores(s0, scale_log2, mask, mask_n, mask_m, row[:, None], N, key0[None, :], M, PER_QUERY)
        s0 = tl.where(key0[None, :] < M, s0, -INF)
        top = tl.max(s0, 1)
        if M1 > 0:
            s1 = _product(q0, q1, k10, k11, D1)  # (BLOCK_N, M1)
            s1 = _scores(s1, scale_log2, mask, mask_n, mask_m, row[:, None], N, key1[None, :], M, PER_QUERY)
            s1 = tl.where(key1[None, :] < M, s1, -INF)
            top = tl.maximum(top, tl.max(s1, 1))
        top = tl.where(top == -INF, 0.0, top)

        p0 = tl.exp2(s0 - top[:, None])
        total = tl.sum(p0, 1)
        p0 = p0.to(v.dtype.element_ty)
        if M1 > 0:
            p1 = tl.exp2(s1 - top[:, None])
            total += tl.sum(p1, 1)
            p1 = p1.to(v.dtype.element_ty)
        share = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]

        # one piece of the output after the other: together they may be more than the registers hold
        acc = tl.dot(p0, v00, input_precision="ieee")  # (BLOCK_N, D0)
        if M1 > 0:
            acc = _dot(p1, v10, acc)
        _store(out, row, N, H * D, tl.arange(0, D0), D, acc * share)
        if D1 > 0:
            acc = tl.dot(p0, v01, input_precision="ieee")  # (BLOCK_N, D1)
            if M1 > 0:
                acc = _dot(p1, v11, acc)
            _store(out, row, N, H * D, D0 + tl.arange(0, D1), D, acc * share)
        tl.store(lse + row, (top + tl.log2(total)) * LN2, mask=row < N)


@triton.jit(do_not_specialize=GENERAL)
def _forward_long(
    q, k, v, mask, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, mask_b, mask_h, mask_n, mask_m,
    H, N, M, width, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr, UNIT: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """BLOCK_N queries of one head, one of PIECES pieces of the output's columns; reads k and v once."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_N)
    row = (pid // PIECES % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, h = _where(pid // PIECES // tiles, H)
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    out += (b * N * H + h) * D
    lse += (b * H + h) * N
    if mask is not None:
        mask += b * mask_b + h * mask_h
    col0 = tl.arange(0, D0)
    if PIECES > 1:
        col0 += pid % PIECES * D0
    else:
        q0, q1 = _load2(q, row, N, q_n * UNIT, D, D0, D1)  # (BLOCK_N, D0), (BLOCK_N, D1)

    top = tl.full((BLOCK_N,), -INF, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc0 = tl.zeros((BLOCK_N, D0), tl.float32)
    acc1 = acc0
    if D1 > 0:
        acc1 = tl.zeros((BLOCK_N, D1), tl.float32)
    for start in range(0, M, BLOCK_M):
        key = start + tl.arange(0, BLOCK_M)
        if PIECES > 1:
            s = _wide_product(q, row, N, q_n * UNIT, k, key, M, k_m * UNIT, width, D, D0, BLOCK_N, BLOCK_M)
        else:
            k0, k1 = _load2(k, key, M, k_m * UNIT, D, D0, D1)  # (BLOCK_M, D0), (BLOCK_M, D1)
            s = _product(q0, q1, k0, k1, D1)  # (BLOCK_N, BLOCK_M)
        s = _scores(s, scale_log2, mask, mask_n, mask_m, row[:, None], N, key[None, :], M, PER_QUERY)
        if not EVEN_M:
            s = tl.where(key[None, :] < M, s, -INF)

        new_top = tl.maximum(top, tl.max(s, 1))
        safe_top = tl.where(new_top == -INF, 0.0, new_top)
        rescale = tl.exp2(top - safe_top)
        p = tl.exp2(s - safe_top[:, None])
        total = total * rescale + tl.sum(p, 1)
        p = p.to(v.dtype.element_ty)
        acc0 = _dot(p, _load(v, key, M, v_m * UNIT, col0, D), acc0 * rescale[:, None])
        if D1 > 0:
            acc1 = _dot(p, _load(v, key, M, v_m * UNIT, D0 + tl.arange(0, D1), D), acc1 * rescale[:, None])
        top = new_top

    share = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    _store(out, row, N, H * D, col0, D, acc0 * share)
    if D1 > 0:
        _store(out, row, N, H * D, D0 + tl.arange(0, D1), D, acc1 * share)
    # every piece computes the same lse: all of them store it rather than branch
    tl.store(lse + row, (tl.where(total == 0.0, 0.0, top) + tl.log2(total)) * LN2, mask=row < N)


@triton.jit
def _recompute(
    k0, k1, v0, v1, q0, q1, g0, g1, row_lse, scale_log2, mask, mask_n, mask_m, row, N, key, M,
    D1: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """p and dp of some keys, transposed.  # (keys, BLOCK_N)"""
    s = _product(k0, k1, q0, q1, D1)
    s = _scores(s, scale_log2, mask, mask_n, mask_m, row[None, :], N, key[:, None], M, PER_QUERY)
    p = _probabilities(tl.where(key[:, None] < M, s, -INF), row_lse, mask)
    return p, _product(v0, v1, g0, g1, D1)


@triton.jit(do_not_specialize=GENERAL)
def _backward_short(
    grad, q, k, v, mask, lse, dq, dk_parts, dv_parts,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, mask_b, mask_h, mask_n, mask_m,
    H, N, M, tiles, scale, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, M0: tl.constexpr, M1: tl.constexpr,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """tiles · BLOCK_N queries of one head: their dq, and what they add to dk and dv.

    p = exp(s - lse);  dv = pᵀ g;  dp = g vᵀ;  ds = p (dp - Σ p dp);  dq = scale · ds k;  dk = scale · dsᵀ q

    Tiles are transposed, keys × queries, each warp with 16 keys of its own: keys and their gradients then take few
    registers, and p and ds are left operands as they come. Of a second piece, 16 keys, the warps divide queries and
    columns, which 16 columns would be too few for: then all columns are one piece.
    """
    tl.static_assert(M1 == 0 or D1 == 0)
    groups = tl.cdiv(N, BLOCK_N * tiles)
    pid = tl.program_id(0)
    b, h = _where(pid // groups, H)
    first = (pid % groups) * (BLOCK_N * tiles)
    grad += (b * g_b + h * g_h) * UNIT
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    dq += (b * N * H + h) * D
    lse += (b * H + h) * N
    dk_parts += pid.to(tl.int64) * M * D
    dv_parts += pid.to(tl.int64) * M * D
    if mask is not None:
        mask += b * mask_b + h * mask_h

    key = tl.arange(0, M0)
    k0, k1 = _load2(k, key, M, k_m * UNIT, D, D0, D1)  # (M0, D0), (M0, D1)
    v0, v1 = _load2(v, key, M, v_m * UNIT, D, D0, D1)
    dk0 = tl.zeros((M0, D0), tl.float32)
    dv0 = tl.zeros((M0, D0), tl.float32)
    if D1 > 0:
        dk1 = tl.zeros((M0, D1), tl.float32)
        dv1 = tl.zeros((M0, D1), tl.float32)
    if M1 > 0:
        rest = M0 + tl.arange(0, M1)
        dk_rest = tl.zeros((M1, D0), tl.float32)
        dv_rest = tl.zeros((M1, D0), tl.float32)
    for tile in range(tiles):
        row = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        q0, q1 = _load2(q, row, N, q_n * UNIT, D, D0, D1)  # (BLOCK_N, D0), (BLOCK_N, D1)
        g0, g1 = _load2(grad, row, N, g_n * UNIT, D, D0, D1)
        row_lse = tl.load(lse + row, mask=row < N, other=INF)[None, :]  # beyond N: probabilities of zero

        p, dp = _recompute(
            k0, k1, v0, v1, q0, q1, g0, g1, row_lse, scale_log2, mask, mask_n, mask_m, row, N, key, M, D1, PER_QUERY
        )
        delta = tl.sum(p * dp, 0)[None, :]
        if M1 > 0:
            k_rest = _load(k, rest, M, k_m * UNIT, tl.arange(0, D0), D)  # (M1, D0)
            v_rest = _load(v, rest, M, v_m * UNIT, tl.arange(0, D0), D)
            p_rest, dp_rest = _recompute(
                k_rest, k_rest, v_rest, v_rest, q0, q1, g0, g1, row_lse, scale_log2, mask, mask_n, mask_m, row, N,
                rest, M, D1, PER_QUERY,
            )  # fmt: skip
            delta += tl.sum(p_rest * dp_rest, 0)[None, :]
            ds_rest = (p_rest * (dp_rest - delta)).to(q.dtype.element_ty)
            p_rest = p_rest.to(q.dtype.element_ty)
        ds = (p * (dp - delta)).to(q.dtype.element_ty)
        p = p.to(q.dtype.element_ty)
        dv0 = _dot(p, g0, dv0)
        dk0 = _dot(ds, q0, dk0)
        if D1 > 0:
            dv1 = _dot(p, g1, dv1)
            dk1 = _dot(ds, q1, dk1)
        if M1 > 0:  # last: if the compiler for sm_80 sees them first, every warp computes the whole products
            dv_rest = _dot(p_rest, g0, dv_rest)
            dk_rest = _dot(ds_rest, q0, dk_rest)

        # In branches of their own: the compiler divides products that it sees together among the warps in one way, and
        # keys times columns is not the way for queries times columns. As right operands the keys come from the
        # first-level cache: they would fill the registers of every warp.
        if first + tile * BLOCK_N < N:
            right = _load(k, key, M, k_m * UNIT, tl.arange(0, D0), D)
            part = tl.dot(tl.trans(ds), right, input_precision="ieee")  # (BLOCK_N, D0)
            if M1 > 0:
                right = _load(k, rest, M, k_m * UNIT, tl.arange(0, D0), D)
                part = _dot(tl.trans(ds_rest), right, part)
            _store(dq, row, N, H * D, tl.arange(0, D0), D, part * scale)
        if D1 > 0:
            if first + tile * BLOCK_N < N:
                right = _load(k, key, M, k_m * UNIT, D0 + tl.arange(0, D1), D)
                part = tl.dot(tl.trans(ds), right, input_precision="ieee")  # (BLOCK_N, D1)
                _store(dq, row, N, H * D, D0 + tl.arange(0, D1), D, part * scale)

    _store(dk_parts, key, M, D, tl.arange(0, D0), D, dk0 * scale)
    _store(dv_parts, key, M, D, tl.arange(0, D0), D, dv0)
    if D1 > 0:
        _store(dk_parts, key, M, D, D0 + tl.arange(0, D1), D, dk1 * scale)
        _store(dv_parts, key, M, D, D0 + tl.arange(0, D1), D, dv1)
    if M1 > 0:
        _store(dk_parts, rest, M, D, tl.arange(0, D0), D, dk_rest * scale)
        _store(dv_parts, rest, M, D, tl.arange(0, D0), D, dv_rest)


@triton.jit(do_not_specialize=GENERAL)
def _sum_parts(dk_parts, dv_parts, dk, dv, H, M, groups, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of one head's dk and dv: the partial sums of its query groups, added in their order."""
    blocks = tl.cdiv(M * D, BLOCK)
    bh = tl.program_id(0) // blocks
    b, h = _where(bh, H)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < M * D
    dk_parts += bh.to(tl.int64) * groups * M * D
    dv_parts += bh.to(tl.int64) * groups * M * D
    sum_k = tl.zeros((BLOCK,), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    for group in range(groups):
        sum_k += tl.load(dk_parts + group * M * D + place, mask=inside, other=0.0)
        sum_v += tl.load(dv_parts + group * M * D + place, mask=inside, other=0.0)
    target = (b * M * H + h) * D + (place // D).to(tl.int64) * (H * D) + place % D
    tl.store(dk + target, sum_k.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + target, sum_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=GENERAL)
def _backward_queries(
    grad, q, k, v, mask, out, lse, dq, delta,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, o_b, o_h, o_n, mask_b, mask_h, mask_n, mask_m,
    H, N, M, width, scale, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr, UNIT: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """dq (one piece of its columns) and delta = Σ grad · out of BLOCK_N queries of one head; reads k and v once."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_N)
    row = (pid // PIECES % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, h = _where(pid // PIECES // tiles, H)
    grad += (b * g_b + h * g_h) * UNIT
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    out += (b * o_b + h * o_h) * UNIT
    dq += (b * N * H + h) * D
    lse += (b * H + h) * N
    delta += (b * H + h) * N
    if mask is not None:
        mask += b * mask_b + h * mask_h

    col0 = tl.arange(0, D0)
    if PIECES > 1:
        col0 += pid % PIECES * D0
        row_delta = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, width, D0):
            g = _load(grad, row, N, g_n * UNIT, start + tl.arange(0, D0), D).to(tl.float32)
            o = _load(out, row, N, o_n * UNIT, start + tl.arange(0, D0), D).to(tl.float32)
            row_delta += tl.sum(g * o, 1)
    else:
        q0, q1 = _load2(q, row, N, q_n * UNIT, D, D0, D1)  # (BLOCK_N, D0), (BLOCK_N, D1)
        g0, g1 = _load2(grad, row, N, g_n * UNIT, D, D0, D1)
        o0, o1 = _load2(out, row, N, o_n * UNIT, D, D0, D1)
        row_delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
        if D1 > 0:
            row_delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    tl.store(delta + row, row_delta, mask=row < N)
    row_lse = tl.load(lse + row, mask=row < N, other=INF)[:, None]

    dq0 = tl.zeros((BLOCK_N, D0), tl.float32)
    dq1 = dq0
    if D1 > 0:
        dq1 = tl.zeros((BLOCK_N, D1), tl.float32)
    for start in range(0, M, BLOCK_M):
        key = start + tl.arange(0, BLOCK_M)
        if PIECES > 1:
            s = _wide_product(q, row, N, q_n * UNIT, k, key, M, k_m * UNIT, width, D, D0, BLOCK_N, BLOCK_M)
            dp = _wide_product(grad, row, N, g_n * UNIT, v, key, M, v_m * UNIT, width, D, D0, BLOCK_N, BLOCK_M)
            k0 = _load(k, key, M, k_m * UNIT, col0, D)
        else:
            k0, k1 = _load2(k, key, M, k_m * UNIT, D, D0, D1)  # (BLOCK_M, D0), (BLOCK_M, D1)
            v0, v1 = _load2(v, key, M, v_m * UNIT, D, D0, D1)
            s = _product(q0, q1, k0, k1, D1)  # (BLOCK_N, BLOCK_M)
            dp = _product(g0, g1, v0, v1, D1)
        s = _scores(s, scale_log2, mask, mask_n, mask_m, row[:, None], N, key[None, :], M, PER_QUERY)
        if not EVEN_M:
            s = tl.where(key[None, :] < M, s, -INF)
        p = _probabilities(s, row_lse, mask)
        ds = (p * (dp - row_delta[:, None])).to(q.dtype.element_ty)
        dq0 = _dot(ds, k0, dq0)
        if D1 > 0:
            dq1 = _dot(ds, k1, dq1)
    _store(dq, row, N, H * D, col0, D, dq0 * scale)
    if D1 > 0:
        _store(dq, row, N, H * D, D0 + tl.arange(0, D1), D, dq1 * scale)


@triton.jit
def _key_gradients(
    grad, q, k, v, mask, lse, delta, dk, dv, g_n, q_n, k_m, v_m, mask_n, mask_m, key, piece,
    H, N, M, width, scale, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNIT: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """One piece of the columns of dk and dv, or of that which is not None, of the keys `key` of one head.

    The pointers are to that head. Scores are transposed, keys × queries, so that they are left operands as they come.
    Keys beyond M need no care: a key's row of the gradients depends on that key alone, and those rows are not stored.
    """
    col0 = piece * D0 + tl.arange(0, D0)
    if PIECES == 1:
        k0, k1 = _load2(k, key, M, k_m * UNIT, D, D0, D1)  # (BLOCK_M, D0), (BLOCK_M, D1)
        if dk is not None:
            v0, v1 = _load2(v, key, M, v_m * UNIT, D, D0, D1)
    if dk is not None:
        dk0 = tl.zeros((BLOCK_M, D0), tl.float32)
        if D1 > 0:
            dk1 = tl.zeros((BLOCK_M, D1), tl.float32)
    if dv is not None:
        dv0 = tl.zeros((BLOCK_M, D0), tl.float32)
        if D1 > 0:
            dv1 = tl.zeros((BLOCK_M, D1), tl.float32)
    for start in range(0, N, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        if PIECES > 1:
            s = _wide_product(k, key, M, k_m * UNIT, q, row, N, q_n * UNIT, width, D, D0, BLOCK_M, BLOCK_N)
            if dk is not None:
                dp = _wide_product(v, key, M, v_m * UNIT, grad, row, N, g_n * UNIT, width, D, D0, BLOCK_M, BLOCK_N)
            q0 = _load(q, row, N, q_n * UNIT, col0, D)
            g0 = _load(grad, row, N, g_n * UNIT, col0, D)
        else:
            q0, q1 = _load2(q, row, N, q_n * UNIT, D, D0, D1)  # (BLOCK_N, D0), (BLOCK_N, D1)
            g0, g1 = _load2(grad, row, N, g_n * UNIT, D, D0, D1)
            s = _product(k0, k1, q0, q1, D1)  # (BLOCK_M, BLOCK_N)
            if dk is not None:
                dp = _product(v0, v1, g0, g1, D1)
        s = _scores(s, scale_log2, mask, mask_n, mask_m, row[None, :], N, key[:, None], M, PER_QUERY)
        row_lse = tl.load(lse + row, mask=row < N, other=INF)[None, :]  # beyond N: probabilities of zero
        p = _probabilities(s, row_lse, mask)
        if dk is not None:
            row_delta = tl.load(delta + row, mask=row < N, other=0.0)[None, :]
            ds = (p * (dp - row_delta)).to(q.dtype.element_ty)
            dk0 = _dot(ds, q0, dk0)
            if D1 > 0:
                dk1 = _dot(ds, q1, dk1)
        if dv is not None:
            p = p.to(q.dtype.element_ty)
            dv0 = _dot(p, g0, dv0)
            if D1 > 0:
                dv1 = _dot(p, g1, dv1)
    if dk is not None:
        _store(dk, key, M, H * D, col0, D, dk0 * scale)
        if D1 > 0:
            _store(dk, key, M, H * D, D0 + tl.arange(0, D1), D, dk1 * scale)
    if dv is not None:
        _store(dv, key, M, H * D, col0, D, dv0)
        if D1 > 0:
            _store(dv, key, M, H * D, D0 + tl.arange(0, D1), D, dv1)


@triton.jit(do_not_specialize=GENERAL)
def _backward_keys(
    grad, q, k, v, mask, lse, delta, dk, dv,
    g_b, g_h, g_n, q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, mask_b, mask_h, mask_n, mask_m,
    H, N, M, width, scale, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PIECES: tl.constexpr, APART: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNIT: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """dk and dv (one piece of their columns; APART: one of the two) of BLOCK_M keys of one head; reads q, grad, lse and
    delta once.
    """
    PARTS: tl.constexpr = 2 * PIECES if APART else PIECES
    pid = tl.program_id(0)
    piece = pid % PIECES
    tiles = tl.cdiv(M, BLOCK_M)
    key = (pid // PARTS % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    b, h = _where(pid // PARTS // tiles, H)
    grad += (b * g_b + h * g_h) * UNIT
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    dk += (b * M * H + h) * D
    dv += (b * M * H + h) * D
    lse += (b * H + h) * N
    delta += (b * H + h) * N
    if mask is not None:
        mask += b * mask_b + h * mask_h

    if APART:
        if pid // PIECES % 2 == 0:
            _key_gradients(
                grad, q, k, v, mask, lse, delta, dk, None, g_n, q_n, k_m, v_m, mask_n, mask_m, key, piece,
                H, N, M, width, scale, scale_log2, D, D0, D1, PIECES, BLOCK_N, BLOCK_M, UNIT, PER_QUERY,
            )  # fmt: skip
        else:
            _key_gradients(
                grad, q, k, v, mask, lse, delta, None, dv, g_n, q_n, k_m, v_m, mask_n, mask_m, key, piece,
                H, N, M, width, scale, scale_log2, D, D0, D1, PIECES, BLOCK_N, BLOCK_M, UNIT, PER_QUERY,
            )  # fmt: skip
    else:
        _key_gradients(
            grad, q, k, v, mask, lse, delta, dk, dv, g_n, q_n, k_m, v_m, mask_n, mask_m, key, piece,
            H, N, M, width, scale, scale_log2, D, D0, D1, PIECES, BLOCK_N, BLOCK_M, UNIT, PER_QUERY,
        )  # fmt: skip


def _pieces(width: int) -> tuple[int, int]:
    """A width as one power of two, or as two; each at least 16, the least that a matrix instruction takes."""
    high = max(16, 1 << (width.bit_length() - 1))
    if width <= high:
        return high, 0
    rest = max(16, 1 << (width - high - 1).bit_length())
    return (high, rest) if rest < high else (2 * high, 0)


def _strides(x: torch.Tensor) -> list[int]:
    """Strides of all but the last dimension; those of a dimension of one element are never used and may be anything."""
    return [stride if size > 1 else 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]


def _unit(*tensors: torch.Tensor) -> int:
    """The number of elements, at most 16 bytes, that divides every stride.

    Triton knows of an integer argument only whether 16 divides it. Rows of 40 halves start at multiples of 16 bytes all
    the same, so strides are passed in units that the kernel multiplies out.
    """
    return math.gcd(16 // tensors[0].element_size(), *(s for x in tensors for s in _strides(x)))


def _in_units(unit: int, *tensors: torch.Tensor) -> list[int]:
    return [stride // unit for x in tensors for stride in _strides(x)]


def _mask_arguments(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, list[int], bool]:
    """The mask as the kernels take it, its strides, and whether it differs from query to query."""
    if mask is None:
        return None, [0, 0, 0, 0], False
    strides = [stride if size > 1 else 0 for stride, size in zip(mask.stride(), mask.shape, strict=True)]
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask), strides, strides[2] != 0


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """A (B, H, N, D) tensor whose memory is (B, N, H, D)."""
    b, h, n, d = x.shape
    return torch.empty((b, n, h, d), dtype=x.dtype, device=x.device).transpose(1, 2)


class _Plan(NamedTuple):
    """How a long kernel divides the work."""

    columns: dict[str, int]  # the two pieces of a head that a program keeps whole, or the pieces of a wider one
    own: int  # rows that a program owns
    step: int  # rows of a step along the other side
    warps: int


def _plan(d: int, half: bool, masked: bool, backward: bool = False, keys: bool = False) -> _Plan:
    """The largest tiles that the compiler fits into the registers of sm_80 without spilling.

    half: two bytes per element; masked: the mask's values take registers, too; keys: a program owns keys (for dk, dv or
    both) rather than queries.
    """
    narrow, piece = 256 if half else 128, 256 if half and not masked else 128
    if keys:
        narrow, piece = ONE if half else BOTH, 128 if half and d > 192 else 64
        if half and not masked and d > 256 and triton.cdiv(d, 128) % 2 == 0:
            piece = 256  # of one gradient: scores for fewer pieces, and no more padding
    elif backward and not half:
        narrow, piece = 80, 64
    d0, d1 = _pieces(d) if d <= narrow else (piece, 0)
    pieces = 1 if d <= narrow else triton.cdiv(d, piece)
    width = d0 + d1
    if not half:
        own, step, warps = 32, 16 if keys else 32, 8
    elif pieces > 1:
        own, step, warps = 64, 32, 4 if piece == 64 else 8
    elif backward:
        own, step, warps = 64, 16 if width > 128 or (keys and masked) else 32, 4
    elif masked or width > 128:
        own, step, warps = 64, 32, 4
    else:
        own, step, warps = 128, 64, 4 if width <= 64 else 8
    return _Plan({"D0": d0, "D1": d1, "PIECES": pieces}, own, step, warps)


def _is_short(m: int, d: int, masked: bool) -> bool:
    """Whether a program of the forward pass can keep all keys."""
    keys, columns = sum(_pieces(m)), sum(_pieces(d))
    most_keys, most_elements = SHORT_MASKED if masked else SHORT_UNMASKED
    return d <= SHORT_WIDTH and keys <= most_keys and keys * columns <= most_elements


def attention_unsupported(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> str | None:
    """Why these (validated) inputs cannot run, None if they can."""
    if mask is not None and mask.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
        return f"the Triton kernel takes boolean, float16, bfloat16 and float32 masks, not {mask.dtype}"
    if q.shape[-1] > WIDEST:
        return f"the Triton kernel takes heads of at most {WIDEST} columns, not {q.shape[-1]}"
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, k, v)):
        return "the Triton kernel needs q, k and v with a unit last stride: call .contiguous() first"
    return refuse(q)


def forward_launches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> list[Launch]:
    """What `attention` launches to fill out and lse."""
    (b, h, n, d), m = q.shape, k.shape[2]
    unit, half = _unit(q, k, v), q.element_size() == 2
    mask, mask_strides, per_query = _mask_arguments(mask)
    tensors = (q, k, v, mask, out, lse, *_in_units(unit, q, k, v), *mask_strides)
    options = {"D": d, "UNIT": unit, "PER_QUERY": per_query, "num_stages": 2, "enable_fp_fusion": True}
    if half and _is_short(m, d, mask is not None):
        (d0, d1), (m0, m1) = _pieces(d), _pieces(m)
        block, warps = 64, 4
        if (d0, d1) == (128, 0):  # 16 more keys are too few columns for the warps of a smaller tile
            block, warps = 128, 8
            options["num_stages"] = 1  # two tiles of queries and the keys are more than 99 KB
        # more tiles per program spread the loading of k and v, fewer leave programs for every processor
        tiles = max(1, min(4, n // (8 * block)))
        options.update(D0=d0, D1=d1, M0=m0, M1=m1, BLOCK_N=block, num_warps=warps)
        args = (*tensors, h, n, m, tiles, scale * LOG2E.value)
        programs = b * h * triton.cdiv(n, block * tiles)
        return [Launch(_forward_short, programs, args, options, RESIDENT_WARPS // warps)]
    columns, own, step, warps = _plan(d, half, mask is not None)
    if columns["PIECES"] > 1 and m % step:
        step = 16  # the condition on the keys takes registers
    if columns["PIECES"] > 1 and not half:
        options["num_stages"] = 1  # and so do float32 tiles that are loaded ahead
    options.update(columns, **REGISTERS, BLOCK_N=own, BLOCK_M=step, EVEN_M=m % step == 0, num_warps=warps)
    args = (*tensors, h, n, m, d, scale * LOG2E.value)
    programs = b * h * triton.cdiv(n, own) * columns["PIECES"]
    return [Launch(_forward_long, programs, args, options, RESIDENT_WARPS // warps)]


def backward_launches(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> list[Launch]:
    """What `attention_backward` launches, in this order, to fill dq, dk and dv."""
    (b, h, n, d), m = q.shape, k.shape[2]
    unit, half = _unit(grad, q, k, v, out), q.element_size() == 2
    mask, mask_strides, per_query = _mask_arguments(mask)
    strides = _in_units(unit, grad, q, k, v)
    scales = (scale, scale * LOG2E.value)
    options = {"D": d, "UNIT": unit, "PER_QUERY": per_query, "num_stages": 1, "enable_fp_fusion": True}
    if m <= SHORT_KEYS and half and d <= SHORT_GRADIENT:
        (d0, d1), (m0, m1) = _pieces(d), (max(16, triton.next_power_of_2(m)), 0)
        if mask is None and 16 < d <= 64 and _pieces(m) == (64, 16):
            # 80 keys instead of 128 save more than 64 columns instead of 48 cost
            (d0, d1), (m0, m1) = (triton.next_power_of_2(d), 0), (64, 16)
        block = 64 if d0 + d1 <= 48 else 16 if mask is not None and d > 64 else 32
        tiles = max(1, min(16, n // (8 * block)))
        groups = triton.cdiv(n, block * tiles)
        dk_parts, dv_parts = torch.empty((2, b * h * groups, m, d), dtype=torch.float32, device=q.device)
        args = (grad, q, k, v, mask, lse, dq, dk_parts, dv_parts, *strides, *mask_strides, h, n, m, tiles, *scales)
        warps = 8 if m0 > 64 else 4
        options.update(D0=d0, D1=d1, M0=m0, M1=m1, BLOCK_N=block, num_warps=warps)
        add = {"D": d, "BLOCK": 256, "num_warps": 2, "enable_fp_fusion": True}
        return [
            Launch(_backward_short, b * h * groups, args, options, RESIDENT_WARPS // warps),
            Launch(_sum_parts, b * h * triton.cdiv(m * d, 256), (dk_parts, dv_parts, dk, dv, h, m, groups), add, 8),
        ]
    delta = torch.empty_like(lse)
    sizes = (*mask_strides, h, n, m, d, *scales)
    columns, own, step, warps = _plan(d, half, mask is not None, backward=True)
    even = m % step == 0
    args = (grad, q, k, v, mask, out, lse, dq, delta, *strides, *_in_units(unit, out), *sizes)
    options.update(REGISTERS if d > 128 else {})
    for_queries = {**options, **columns, "BLOCK_N": own, "BLOCK_M": step, "EVEN_M": even, "num_warps": warps}
    programs = b * h * triton.cdiv(n, own) * columns["PIECES"]
    queries = Launch(_backward_queries, programs, args, for_queries, RESIDENT_WARPS // warps)
    columns, own, step, warps = _plan(d, half, mask is not None, backward=True, keys=True)
    args = (grad, q, k, v, mask, lse, delta, dk, dv, *strides, *sizes)
    apart = columns["D0"] + columns["D1"] > BOTH
    for_keys = {**options, **columns, "APART": apart, "BLOCK_N": step, "BLOCK_M": own, "num_warps": warps}
    programs = b * h * triton.cdiv(m, own) * columns["PIECES"] * (2 if apart else 1)
    return [queries, Launch(_backward_keys, programs, args, for_keys, RESIDENT_WARPS // warps)]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of validated inputs; mask expanded to (B, H, N, M) or None."""
    out = _empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for launch in forward_launches(q, k, v, mask, scale, out, lse):
        launch.run()
    return out, lse


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), from what the forward returned."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()  # the gradient of a sum has strides of zero
    dq, dk, dv = _empty_like(q), _empty_like(k), _empty_like(v)
    for launch in backward_launches(grad, q, k, v, mask, scale, out, lse, dq, dk, dv):
        launch.run()
    return dq, dk, dv
