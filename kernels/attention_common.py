"""What the attention kernels share: layouts, tiles in two pieces, scores and probabilities, how work is divided.

Layout   q is (B, H, N, D), k and v are (B, H, M, D), with any strides but a unit last one. out and the gradients are
         (B, H, N, D) tensors whose memory is (B, N, H, D), so that the projection after them reads them without a copy.
         lse (B, H, N) is the natural logarithm of each row's sum of exponentials; -inf marks a fully masked row, whose
         output is zero.
Widths   A tile's width is a power of two. Instead of padding 40 to 64, a width is two pieces: 40 = 32 + 16,
         80 = 64 + 16, 160 = 128 + 32, and 77 keys = 64 + 16. Columns beyond the width are loaded as zeros. Padded,
         these three heads take 1.33 to 1.6 times the matrix instructions, and the forward pass spills.
Scores   They are in units of log2: exp2 is what the hardware computes.

How work is divided depends on N, M and D alone, never on B or H, and nothing is accumulated with atomics: a row of a
batch has the same bits as the row alone.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Launch, cdiv

BOTH, ONE = 128, 160  # the widest heads of which a long program keeps both dk and dv of its keys, and one of them
RESIDENT_WARPS = 8  # that a multiprocessor is meant to hold: two for each scheduler, at up to 255 registers a thread
# As many registers as RESIDENT_WARPS leave. Left alone, the compiler makes room for more programs and spills: for sm_80
# in the forward pass of 32 columns, for sm_100 in the backward pass of 512.
REGISTERS = {"maxnreg": 255}
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32
INF = tl.constexpr(float("inf"))
# Arguments that a kernel is not specialised for: UNIT says what matters about strides. So one compiled kernel serves
# every number of images, heads, queries and keys that is divided in the same way.
GENERAL = (
    *("g_b", "g_h", "g_n", "q_b", "q_h", "q_n", "k_b", "k_h", "k_m", "v_b", "v_h", "v_m", "o_b", "o_h", "o_n"),
    *("H", "N", "M", "width", "tiles", "groups"),
)


@triton.jit
def one_head(index, q, k, v, lse, q_b, q_h, k_b, k_h, v_b, v_h, H, N, UNIT: tl.constexpr):
    """Batch and head of a (B·H) index, and that head's q, k, v and lse.

    Batch and head have 64 bits: offsets of whole images pass 2³¹.
    """
    b, h = (index // H).to(tl.int64), (index % H).to(tl.int64)
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    return b, h, q, k, v, lse + (b * H + h) * N


@triton.jit
def load(ptr, row, rows, stride, col, D: tl.constexpr):
    """Rows `row` and columns `col` of a matrix with `rows` rows and D columns, zero outside.  # (R, C)"""
    inside = (row < rows)[:, None] & (col < D)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def store(ptr, row, rows, stride, col, D: tl.constexpr, value):
    """Write what `load` reads, rounded to the type of the matrix."""
    inside = (row < rows)[:, None] & (col < D)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * stride + col[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def zeros2(R: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """R rows in two pieces, of D0 and D1 columns. If there is no second piece, the first stands in for it."""
    first = tl.zeros((R, D0), tl.float32)
    second = first
    if D1 > 0:
        second = tl.zeros((R, D1), tl.float32)
    return first, second


@triton.jit
def load2(ptr, row, rows, stride, start, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows in two pieces, from column `start` on.  # (R, D0), (R, D1)"""
    first = load(ptr, row, rows, stride, start + tl.arange(0, D0), D)
    second = first
    if D1 > 0:
        second = load(ptr, row, rows, stride, start + D0 + tl.arange(0, D1), D)
    return first, second


@triton.jit
def store2(ptr, row, rows, stride, start, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, first, second):
    """Write what `load2` reads."""
    store(ptr, row, rows, stride, start + tl.arange(0, D0), D, first)
    if D1 > 0:
        store(ptr, row, rows, stride, start + D0 + tl.arange(0, D1), D, second)


@triton.jit
def dot(a, b, acc):
    """a b + acc"""
    # "ieee": the product of two float32 tiles is not rounded to tf32
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot2(a, b0, b1, acc0, acc1, D1: tl.constexpr):
    """a b + acc, b and acc in two pieces.  # (R, S), (S, D0), (S, D1) -> (R, D0), (R, D1)"""
    acc0 = dot(a, b0, acc0)
    if D1 > 0:
        acc1 = dot(a, b1, acc1)
    return acc0, acc1


@triton.jit
def product(a0, a1, b0, b1, D1: tl.constexpr):
    """a bᵀ of rows in two pieces.  # (R, D), (S, D) -> (R, S)"""
    s = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1 > 0:
        s = dot(a1, tl.trans(b1), s)
    return s


@triton.jit
def wide_product(a, a_row, a_rows, a_stride, b, b_row, b_rows, b_stride, width, D: tl.constexpr, D0: tl.constexpr):
    """a bᵀ of rows too wide to be kept, D0 columns at a time.  # (R, D), (S, D) -> (R, S)

    width is D at run time: a known number of steps would be unrolled, which takes more registers than there are.
    """
    s = tl.zeros((a_row.shape[0], b_row.shape[0]), tl.float32)
    for start in range(0, width, D0):
        col = start + tl.arange(0, D0)
        s = dot(load(a, a_row, a_rows, a_stride, col, D), tl.trans(load(b, b_row, b_rows, b_stride, col, D)), s)
    return s


@triton.jit
def scores(s, scale_log2, mask, mask_n, mask_m, row, rows, key, keys, PER_QUERY: tl.constexpr, BOUND: tl.constexpr):
    """s · scale + mask in units of log2, for s = q kᵀ. BOUND: -inf for keys beyond the last one.

    row and key are (R, 1) and (1, S), or (1, R) and (S, 1) for a transposed tile. A mask with one value per key (key
    padding) is read once per key. A boolean mask arrives as uint8. If no tile goes beyond the last key, the bound would
    be 7 % of the long form's instructions.
    """
    s = s * scale_log2
    if mask is not None:
        if PER_QUERY:
            place = mask + row.to(tl.int64) * mask_n + key.to(tl.int64) * mask_m
            value = tl.load(place, mask=(row < rows) & (key < keys), other=0)
        else:
            value = tl.load(mask + key.to(tl.int64) * mask_m, mask=key < keys, other=0)
        if mask.dtype.element_ty == tl.uint8:
            s = tl.where(value != 0, s, -INF)
        else:
            # float32's lowest value stays finite in units of log2: a row of it alone is uniform, not masked
            value = value.to(tl.float32)
            s += tl.where(value == -INF, -INF, tl.maximum(value * LOG2E, LOWEST, propagate_nan=tl.PropagateNan.ALL))
    if BOUND:
        s = tl.where(key < keys, s, -INF)
    return s


@triton.jit
def probabilities(s, lse, mask):
    """exp(score - lse), lse broadcast along the keys; a fully masked row has only zeros."""
    exponent = s - tl.where(lse == -INF, 0.0, lse) * LOG2E
    if mask is not None:
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


class Inputs(NamedTuple):
    """The (validated) arguments of one call of `attention`."""

    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, H, M, D)
    v: Tensor
    mask: Tensor | None  # (B, H, N, M)
    scale: float

    @property
    def half(self) -> bool:
        """Whether an element has two bytes."""
        return self.q.element_size() == 2

    @property
    def mask_bytes(self) -> Tensor | None:
        """The mask as kernels take it: uint8 instead of bool."""
        return self.mask.view(torch.uint8) if self.mask is not None and self.mask.dtype == torch.bool else self.mask

    def strides(self, *tensors: Tensor) -> tuple[list[int], dict[str, Any]]:
        """Strides of tensors and mask as kernels take them, and the constants that go with them.

        All that Triton knows about an integer argument is whether 16 divides it. 16 does not divide 40, and yet rows of
        40 halves start at multiples of 16 bytes. So strides are passed in units of at most 16 bytes, which the kernel
        multiplies out.
        """
        strides = [stride for x in tensors for stride in _strides(x)[:-1]]
        unit = math.gcd(16 // self.q.element_size(), *strides)
        of_mask = [0, 0, 0, 0] if self.mask is None else _strides(self.mask)
        constants = {"D": self.q.shape[-1], "UNIT": unit, "PER_QUERY": of_mask[2] != 0}
        return [stride // unit for stride in strides] + of_mask, constants


def _strides(x: Tensor) -> list[int]:
    """Strides, with zero for a dimension of one element: it is never used and may be anything."""
    return [stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True)]


def empty_like(x: Tensor) -> Tensor:
    """A (B, H, N, D) tensor whose memory is (B, N, H, D)."""
    b, h, n, d = x.shape
    return torch.empty((b, n, h, d), dtype=x.dtype, device=x.device).transpose(1, 2)


class Plan(NamedTuple):
    """How a long kernel divides the work."""

    columns: dict[str, int]  # D0, D1 and PIECES: the two pieces of a head that is kept whole, or those of a wider one
    own: int  # rows that a program owns
    step: int  # rows of a step along the other side
    warps: int

    def launch(self, kernel: Any, heads: int, rows: int, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
        """`kernel` for the tiles of `rows` rows, and for each piece of their columns."""
        programs = heads * cdiv(rows, self.own) * self.columns["PIECES"]
        return launch_of(kernel, programs, args, {**options, **self.columns, "num_warps": self.warps})


def launch_of(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """A launch such that a multiprocessor is meant to hold RESIDENT_WARPS of it."""
    return Launch(kernel, programs, args, options, RESIDENT_WARPS // options["num_warps"])


def plan(d: int, half: bool, masked: bool, backward: bool = False, keys: bool = False) -> Plan:
    """The largest tiles that the compiler fits into the registers of sm_80 without spilling.

    half: an element has two bytes; masked: the mask's values take registers, too; keys: a program owns keys (for dk, dv
    or both) rather than queries.
    """
    narrow, piece = 256 if half else 128, 256 if half and not masked else 128
    if keys:
        narrow, piece = ONE if half else BOTH, 128 if half and d > 192 else 64
        if half and not masked and d > 256 and cdiv(d, 128) % 2 == 0:
            piece = 256  # of one gradient: scores are computed for fewer pieces, with no more padding
    elif backward and not half:
        narrow, piece = 80, 64
    d0, d1 = pieces_of(d) if d <= narrow else (piece, 0)
    pieces = 1 if d <= narrow else cdiv(d, piece)
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
