// nearest_codebook for d >= 32: writes queries and codes as bfloat16, in the order in which nearest_tensor reads them,
// and what its bound needs to know of each row. The codes also get their halved norms, with the bits of the formula.
//
// One thread per row goes through it once, in index order. A block prepares TENSOR_ROWS rows, one tile of
// nearest_tensor, in slices of SLICE dimensions. A slice of codes is row after row, 64 bytes each. A slice of queries
// holds what a thread of nearest_tensor wants in its registers, 16 bytes in a row, for 16 queries and 16 dimensions at
// a time: in turns, two pairs of a query and two of the query eight rows below it. Rows and dimensions that fill up a
// tile are zeros. Neighbouring threads read neighbouring numbers of a channel-first map, and whole vectors of a row
// that lies in one piece.
//
// A subnormal bfloat16 becomes zero here, which counts as rounding: what the tensor cores do with one is not
// documented.
#pragma once

#include "nearest_codebook_common.cuh"

namespace ldm_fast::nearest {

constexpr int TENSOR_ROWS = 128;  // queries of a block and codes of a tile
constexpr int SLICE = 32;         // dimensions staged at once
constexpr int EIGHTS = SLICE / 8;
static_assert(TENSOR_ROWS == THREADS, "a thread prepares one row, and sees to one query");

// Sizes are never too small: 1.001 covers the rounding of up to 4096 fused multiply-adds and of the root, and LOST
// covers what underflows in them. Beyond HUGE_SIZE sums of products could overflow, so there is no bound.
constexpr float FROM_ABOVE = 1.001f;
constexpr float LOST = 0x1p-68f;
constexpr float HUGE_SIZE = 0x1p50f;

// Rounds to nearest, ties to even, in the upper half of the bits; a subnormal gives zero, a NaN anything.
__device__ inline std::uint32_t round_to_bfloat16(float value) {
    const std::uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7f800000u) == 0) return 0;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
}

struct Measured {
    float squares;        // of the row, the chain of the formula
    float error_squares;  // of what rounding takes away
};

// Converts eight numbers to bfloat16; the lower one of each pair comes first.
__device__ inline Eight round_eight(const float (&values)[8], std::uint32_t sign, Measured& measured) {
    std::uint32_t rounded[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        rounded[i] = round_to_bfloat16(values[i]);
        const float error = values[i] - __uint_as_float(rounded[i]);
        measured.squares = fmaf(values[i], values[i], measured.squares);
        measured.error_squares = fmaf(error, error, measured.error_squares);
    }
    Eight eight;
#pragma unroll
    for (int i = 0; i < 4; ++i) eight.pairs[i] = (rounded[2 * i] >> 16 | rounded[2 * i + 1]) ^ sign;
    return eight;
}

// Goes through the row of this thread and calls put(slice, i, eight) for every eight numbers of it.
template <class T, class Put>
__device__ Measured prepare_row(const T* from, std::int64_t stride, bool vectors, int dim, std::uint32_t sign,
                                int slices, const Put& put) {
    Measured measured{0.0f, 0.0f};
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) {
            const int column = slice * SLICE + i * 8;
            float values[8];
            load_columns(from + column * stride, stride, vectors, dim - column, values);
            put(slice, i, round_eight(values, sign, measured));
        }
    }
    return measured;
}

// Where the 16 bytes of a lane are in a slice of queries, for group m of 16 queries and the first or second 16
// dimensions, as nearest_tensor counts them.
__device__ inline int query_place(int m, int half, int lane) { return (m * 2 + half) * WARP + lane; }

// Puts eight number i of this thread's query, and of the query eight lanes away, into their places: the upper of the
// two threads handles the first pairs of both queries, the lower one the last pairs.
__device__ inline void put_query(Eight* slice, int i, const Eight& mine) {
    const int row = threadIdx.x % 16;
    const bool lower = row >= 8;
    const std::uint32_t first = __shfl_xor_sync(ALL_LANES, lower ? mine.pairs[0] : mine.pairs[2], 8);
    const std::uint32_t second = __shfl_xor_sync(ALL_LANES, lower ? mine.pairs[1] : mine.pairs[3], 8);
    slice[query_place(threadIdx.x / 16, lower, row % 8 * EIGHTS + i)] =
        lower ? Eight{first, mine.pairs[2], second, mine.pairs[3]} : Eight{mine.pairs[0], first, mine.pairs[1], second};
}

// Infinite if there is no bound, also for NaN.
__device__ inline Bound bound_of(const Measured& measured) {
    const float error = sqrtf(measured.error_squares) * FROM_ABOVE + LOST;
    const float size = sqrtf(measured.squares) * FROM_ABOVE + LOST + error;
    return size <= HUGE_SIZE ? Bound{size, error} : Bound{INFINITY, INFINITY};
}

// Prepares the queries of a slab, negated.
template <class T>
__global__ void __launch_bounds__(THREADS) prepare_queries(Problem<T> problem) {
    const Operands& operands = problem.operands;
    const Queries<T>& queries = problem.queries;
    const std::int64_t in_slab = std::int64_t{blockIdx.x} * TENSOR_ROWS + threadIdx.x;
    const std::int64_t n = operands.first_query + in_slab;
    const bool inside = n < queries.count;
    Eight* const tile = operands.queries + std::int64_t{blockIdx.x} * operands.slices * (TENSOR_ROWS * EIGHTS);
    const Measured measured = prepare_row(
        inside ? queries.row(n) : queries.data, queries.column_stride, queries.vectors, inside ? problem.dim : 0,
        0x80008000u, operands.slices,
        [&](int slice, int i, const Eight& eight) { put_query(tile + slice * (TENSOR_ROWS * EIGHTS), i, eight); });
    const Bound bound = bound_of(measured);
    operands.query_bounds[in_slab] = {bound.size, fmaf(operands.slack, bound.size, bound.error)};
}

// Prepares the codes. A code with a NaN never wins, and a code past the last one does not exist: both get a NaN for
// their norm and no size, so that neither widens the bound of its neighbours.
template <class T>
__global__ void __launch_bounds__(THREADS) prepare_codes(Problem<T> problem) {
    const Operands& operands = problem.operands;
    const Codes<T>& codes = problem.codes;
    const std::int64_t k = std::int64_t{blockIdx.x} * TENSOR_ROWS + threadIdx.x;
    const bool inside = k < codes.count;
    Eight* const tile = operands.codes + std::int64_t{blockIdx.x} * operands.slices * (TENSOR_ROWS * EIGHTS);
    const Measured measured = prepare_row(
        inside ? codes.row(k) : codes.data, codes.column_stride, codes.vectors, inside ? problem.dim : 0, 0u,
        operands.slices,
        [&](int slice, int i, const Eight& eight) { tile[(slice * TENSOR_ROWS + threadIdx.x) * EIGHTS + i] = eight; });
    const float norm = inside ? 0.5f * measured.squares : NAN;
    problem.half_norms[k] = norm;
    Bound bound = is_nan(norm) ? Bound{0.0f, 0.0f} : bound_of(measured);
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        bound.size = fmaxf(bound.size, __shfl_xor_sync(ALL_LANES, bound.size, distance));
        bound.error = fmaxf(bound.error, __shfl_xor_sync(ALL_LANES, bound.error, distance));
    }
    if (threadIdx.x % WARP == 0) operands.code_bounds[k / WARP] = bound;
}

}  // namespace ldm_fast::nearest
