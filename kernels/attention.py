"""Fused attention in Triton: out = softmax(q kᵀ · scale + mask) v, deterministic. The backward pass has its own file.

Short    At most 128 keys, 96 with a mask: a program keeps all of K and V, walks over its tiles of queries, and needs
         one pass of softmax without rescaling. 77 keys are 80, not 128 as in the long form: (2, 8, 4096, 77, 40) takes
         1.01 GFLOP instead of 1.61, in 128 registers instead of 233.
Long     A program owns a tile of queries and walks over the keys with Milakov and Gimelshein's online softmax
         (arXiv:1805.02867), as in FlashAttention-2 (arXiv:2307.08691).
Wide     A head of more than 256 columns: as the long form, but a program owns a piece of the output's columns
         (PIECES > 1) and recomputes the scores, D0 columns at a time. A program that keeps all of 512 columns takes
         135 KB of shared memory and computes half of its products twice.

Figures are for sm_80, by `benchmarks/gpu_static.py`. Layouts, and tiles in two pieces: `attention_common`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Launch, capability, cdiv, refuse, unavailable
from .attention_backward import attention_backward
from .attention_common import (
    GENERAL,
    INF,
    LN2,
    LOG2E,
    REGISTERS,
    Inputs,
    dot,
    empty_like,
    launch_of,
    load2,
    one_head,
    pieces_of,
    plan,
    product,
    scores,
    store,
    store2,
    wide_product,
    zeros2,
)

__all__ = ["attention", "attention_backward", "attention_unsupported", "unavailable"]

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
SHORT_WIDTH = 192  # the widest head whose keys a program keeps
# The most keys, and keys times columns, both padded, that a program keeps: sm_86, sm_89 and sm_120 have 99 KB for it,
# and Triton before 3.5 takes 101 KB for 80 keys of 192 columns.
SHORT_UNMASKED, SHORT_MASKED = (128, 16384 if TRITON >= (3, 5) else 12800), (96, 12800)
WIDEST = 1024


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
    first = (tl.program_id(0) % groups) * (BLOCK_N * tiles)
    b, h, q, k, v, lse = one_head(tl.program_id(0) // groups, q, k, v, lse, q_b, q_h, k_b, k_h, v_b, v_h, H, N, UNIT)
    out += (b * N * H + h) * D
    if mask is not None:
        mask += b * mask_b + h * mask_h

    key0 = tl.arange(0, M0)
    k00, k01 = load2(k, key0, M, k_m * UNIT, 0, D, D0, D1)  # (M0, D0), (M0, D1)
    v00, v01 = load2(v, key0, M, v_m * UNIT, 0, D, D0, D1)
    if M1 > 0:
        key1 = M0 + tl.arange(0, M1)
        k10, k11 = load2(k, key1, M, k_m * UNIT, 0, D, D0, D1)  # (M1, D0), (M1, D1)
        v10, v11 = load2(v, key1, M, v_m * UNIT, 0, D, D0, D1)

    for tile in range(tiles):
        row = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        q0, q1 = load2(q, row, N, q_n * UNIT, 0, D, D0, D1)  # (BLOCK_N, D0), (BLOCK_N, D1)

        s0 = product(q0, q1, k00, k01, D1)  # (BLOCK_N, M0)
        s0 = scores(s0, scale_log2, mask, mask_n, mask_m, row[:, None], N, key0[None, :], M, PER_QUERY, True)
        top = tl.max(s0, 1)
        if M1 > 0:
            s1 = product(q0, q1, k10, k11, D1)  # (BLOCK_N, M1)
            s1 = scores(s1, scale_log2, mask, mask_n, mask_m, row[:, None], N, key1[None, :], M, PER_QUERY, True)
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

        # one piece of the output after the other: both may be more than the registers hold
        acc = tl.dot(p0, v00, input_precision="ieee")  # (BLOCK_N, D0)
        if M1 > 0:
            acc = dot(p1, v10, acc)
        store(out, row, N, H * D, tl.arange(0, D0), D, acc * share)
        if D1 > 0:
            acc = tl.dot(p0, v01, input_precision="ieee")  # (BLOCK_N, D1)
            if M1 > 0:
                acc = dot(p1, v11, acc)
            store(out, row, N, H * D, D0 + tl.arange(0, D1), D, acc * share)
        tl.store(lse + row, (top + tl.log2(total)) * LN2, mask=row < N)


@triton.jit(do_not_specialize=GENERAL)
def _forward_long(
    q, k, v, mask, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, mask_b, mask_h, mask_n, mask_m,
    H, N, M, width, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BOUND: tl.constexpr, UNIT: tl.constexpr, PER_QUERY: tl.constexpr,
):  # fmt: skip
    """BLOCK_N queries of one head, one of PIECES pieces of the output's columns; reads k and v once."""
    pid, tiles = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    start = pid % PIECES * D0  # the piece's first column
    row = (pid // PIECES % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, h, q, k, v, lse = one_head(pid // PIECES // tiles, q, k, v, lse, q_b, q_h, k_b, k_h, v_b, v_h, H, N, UNIT)
    out += (b * N * H + h) * D
    if mask is not None:
        mask += b * mask_b + h * mask_h
    if PIECES == 1:
        q0, q1 = load2(q, row, N, q_n * UNIT, 0, D, D0, D1)  # (BLOCK_N, D0), (BLOCK_N, D1)

    top = tl.full((BLOCK_N,), -INF, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc0, acc1 = zeros2(BLOCK_N, D0, D1)
    for first in range(0, M, BLOCK_M):
        key = first + tl.arange(0, BLOCK_M)
        if PIECES > 1:
            s = wide_product(q, row, N, q_n * UNIT, k, key, M, k_m * UNIT, width, D, D0)
        else:
            k0, k1 = load2(k, key, M, k_m * UNIT, 0, D, D0, D1)  # (BLOCK_M, D0), (BLOCK_M, D1)
            s = product(q0, q1, k0, k1, D1)  # (BLOCK_N, BLOCK_M)
        s = scores(s, scale_log2, mask, mask_n, mask_m, row[:, None], N, key[None, :], M, PER_QUERY, BOUND)

        new_top = tl.maximum(top, tl.max(s, 1))
        safe_top = tl.where(new_top == -INF, 0.0, new_top)
        rescale = tl.exp2(top - safe_top)
        p = tl.exp2(s - safe_top[:, None])
        total = total * rescale + tl.sum(p, 1)
        p = p.to(v.dtype.element_ty)
        v0, v1 = load2(v, key, M, v_m * UNIT, start, D, D0, D1)
        acc0 = dot(p, v0, acc0 * rescale[:, None])
        if D1 > 0:
            acc1 = dot(p, v1, acc1 * rescale[:, None])
        top = new_top

    share = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    store2(out, row, N, H * D, start, D, D0, D1, acc0 * share, acc1 * share)
    # every piece computes the same lse: all of them store it rather than branch
    tl.store(lse + row, (tl.where(total == 0.0, 0.0, top) + tl.log2(total)) * LN2, mask=row < N)


def _is_short(m: int, d: int, masked: bool) -> bool:
    """Whether a program of the forward pass can keep all keys."""
    keys, columns = sum(pieces_of(m)), sum(pieces_of(d))
    most_keys, most_elements = SHORT_MASKED if masked else SHORT_UNMASKED
    return d <= SHORT_WIDTH and keys <= most_keys and keys * columns <= most_elements


def attention_unsupported(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> str | None:
    """Why these (validated) inputs cannot run, None if they can."""
    if mask is not None and mask.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
        return f"the Triton kernel takes boolean, float16, bfloat16 and float32 masks, not {mask.dtype}"
    if q.shape[-1] > WIDEST:
        return f"the Triton kernel takes heads of at most {WIDEST} columns, not {q.shape[-1]}"
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, k, v)):
        return "the Triton kernel needs q, k and v with a unit last stride: call .contiguous() first"
    reason = refuse(q)
    if reason is None and q.is_cuda and TRITON < (3, 3) and capability(q.device) >= (9, 0):
        # an assertion in its compiler, for the backward pass of 77 keys and for heads wider than 256
        return f"Triton {triton.__version__} aborts the process for this GPU: `pip install 'triton>=3.3'` (PyTorch 2.7)"
    return reason


def forward_launches(inputs: Inputs, out: Tensor, lse: Tensor) -> list[Launch]:
    """What `attention` launches to fill out and lse."""
    q, k, v, mask, scale = inputs
    (b, h, n, d), m, masked = q.shape, k.shape[2], mask is not None
    strides, options = inputs.strides(q, k, v)
    args = (q, k, v, inputs.mask_bytes, out, lse, *strides, h, n, m)
    options["num_stages"] = 2
    if inputs.half and _is_short(m, d, masked):
        (d0, d1), (m0, m1) = pieces_of(d), pieces_of(m)
        block, warps = 64, 4
        if (d0, d1) == (128, 0):  # 16 more keys are too few columns for the warps of a smaller tile
            block, warps = 128, 8
            options["num_stages"] = 1  # two tiles of queries and the keys take more than 99 KB
        # more tiles to a program: k and v are loaded less often; fewer: there are programs for every multiprocessor
        tiles = max(1, min(4, n // (8 * block)))
        options.update(D0=d0, D1=d1, M0=m0, M1=m1, BLOCK_N=block, num_warps=warps)
        programs = b * h * cdiv(n, block * tiles)
        return [launch_of(_forward_short, programs, (*args, tiles, scale * LOG2E.value), options)]
    division = plan(d, inputs.half, masked)
    if division.columns["PIECES"] > 1 and m % division.step:
        division = division._replace(step=16)  # bounding the keys takes registers
    if division.columns["PIECES"] > 1 and not inputs.half:
        options["num_stages"] = 1  # loading float32 tiles ahead takes over 255 registers
    options.update(REGISTERS, BLOCK_N=division.own, BLOCK_M=division.step, BOUND=m % division.step > 0)
    return [division.launch(_forward_long, b * h, n, (*args, d, scale * LOG2E.value), options)]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of validated inputs; mask expanded to (B, H, N, M) or None."""
    out = empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for launch in forward_launches(Inputs(q, k, v, mask, scale), out, lse):
        launch.run()
    return out, lse
