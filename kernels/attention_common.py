"""What the attention kernels share: layout, tiles in two pieces, scores and probabilities, how work is divided.

Layout   q (B, H, N, D), k and v (B, H, M, D), any strides with a unit last one; out and the gradients are
         (B, H, N, D) tensors whose memory is (B, N, H, D), so that the projection after them reads them without a copy.
         lse (B, H, N) is the natural logarithm of each row's sum of exponentials; -inf marks a fully masked row, whose
         output is zero.
Widths   A tile's width is a power of two. Instead of padding 40 to 64, a width is two pieces: 40 = 32 + 16,
         80 = 64 + 16, 160 = 128 + 32, and 77 keys = 64 + 16. Columns beyond the width are loaded as zeros.
Scores   are kept in units of log2: exp2 is what the hardware computes.

How work is divided depends on N, M and D alone, never on B or H, and nothing is accumulated with atomics: a row of a
batch has the same bits as the row alone.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

BOTH, ONE = 128, 160  # widest heads of which a long program keeps both dk and dv of its keys, and one of them
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
def head_of(index, H):
    """The batch and the head of a (B·H) index, in 64 bits: offsets of whole images pass 2³¹."""
    return (index // H).to(tl.int64), (index % H).to(tl.int64)


@triton.jit
def load(ptr, row, rows, stride, col, D: tl.constexpr):
    """Rows `row` and columns `col` of a matrix with `rows` rows and D columns, zero outside.  # (R, C)"""
    inside = (row < rows)[:, None] & (col < D)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def store(ptr, row, rows, stride, col, D: tl.constexpr, value):
    inside = (row < rows)[:, None] & (col < D)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * stride + col[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load2(ptr, row, rows, stride, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Whole rows, as pieces of D0 and D1 columns (without a second piece, the first one stands in for it)."""
    first = load(ptr, row, rows, stride, tl.arange(0, D0), D)
    second = first
    if D1 > 0:
        second = load(ptr, row, rows, stride, D0 + tl.arange(0, D1), D)
    return first, second


@triton.jit
def dot(a, b, acc):
    # "ieee": the product of two float32 tiles is not rounded to tf32
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def product(a0, a1, b0, b1, D1: tl.constexpr):
    """a bᵀ of rows in two pieces.  # (R, D), (S, D) -> (R, S)"""
    s = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1 > 0:
        s = dot(a1, tl.trans(b1), s)
    return s


@triton.jit
def wide_product(
    a_ptr, a_row, a_rows, a_stride, b_ptr, b_row, b_rows, b_stride, width,
    D: tl.constexpr, D0: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """a bᵀ of rows too wide to be kept, D0 columns at a time.  # (R, D), (S, D) -> (R, S)

    width is D at run time: a known number of steps would be unrolled, which takes more registers than there are.
    """
    s = tl.zeros((R, S), tl.float32)
    for start in range(0, width, D0):
        col = start + tl.arange(0, D0)
        a = load(a_ptr, a_row, a_rows, a_stride, col, D)
        b = load(b_ptr, b_row, b_rows, b_stride, col, D)
        s = dot(a, tl.trans(b), s)
    return s


@triton.jit
def scores(product, scale_log2, mask_ptr, mask_n, mask_m, row, rows, key, keys, PER_QUERY: tl.constexpr):
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
def probabilities(s, lse, mask_ptr):
    """exp(score - lse), lse broadcast along the keys; a fully masked row has only zeros."""
    exponent = s - tl.where(lse == -INF, 0.0, lse) * LOG2E
    if mask_ptr is not None:
        # rounding of huge negative scores must not make a probability above one
        exponent = tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(exponent)


def pieces_of(width: int) -> tuple[int, int]:
    """A width as one power of two, or as two; each at least 16, the least that a matrix instruction takes."""
    high = max(16, 1 << (width.bit_length() - 1))
    if width <= high:
        return high, 0
    rest = max(16, 1 << (width - high - 1).bit_length())
    return (high, rest) if rest < high else (2 * high, 0)


def _strides(x: torch.Tensor) -> list[int]:
    """Strides of all but the last dimension; those of a dimension of one element are never used and may be anything."""
    return [stride if size > 1 else 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]


def unit_of(*tensors: torch.Tensor) -> int:
    """The number of elements, at most 16 bytes, that divides every stride.

    Triton knows of an integer argument only whether 16 divides it. Rows of 40 halves start at multiples of 16 bytes all
    the same, so strides are passed in units that the kernel multiplies out.
    """
    return math.gcd(16 // tensors[0].element_size(), *(s for x in tensors for s in _strides(x)))


def in_units(unit: int, *tensors: torch.Tensor) -> list[int]:
    return [stride // unit for x in tensors for stride in _strides(x)]


def mask_arguments(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, list[int], bool]:
    """The mask as the kernels take it, its strides, and whether it differs from query to query."""
    if mask is None:
        return None, [0, 0, 0, 0], False
    strides = [stride if size > 1 else 0 for stride, size in zip(mask.stride(), mask.shape, strict=True)]
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask), strides, strides[2] != 0


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """A (B, H, N, D) tensor whose memory is (B, N, H, D)."""
    b, h, n, d = x.shape
    return torch.empty((b, n, h, d), dtype=x.dtype, device=x.device).transpose(1, 2)


class Plan(NamedTuple):
    """How a long kernel divides the work."""

    columns: dict[str, int]  # the two pieces of a head that a program keeps whole, or the pieces of a wider one
    own: int  # rows that a program owns
    step: int  # rows of a step along the other side
    warps: int


def plan(d: int, half: bool, masked: bool, backward: bool = False, keys: bool = False) -> Plan:
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
    d0, d1 = pieces_of(d) if d <= narrow else (piece, 0)
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
    return Plan({"D0": d0, "D1": d1, "PIECES": pieces}, own, step, warps)
