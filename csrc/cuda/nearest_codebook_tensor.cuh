// nearest_codebook for d >= 32: the tensor cores find, in bfloat16, which codes can be the nearest at all; float32
// decides between these, by the same fused multiply-adds as everywhere. The index is that of the float32 kernels, bit
// for bit.
//
// ---- The bound
//
// For a query z and a code e, let z' and e' be their bfloat16 forms, h the float32 number that stands for |e|^2 / 2, u
// = 2^-24, and | | the Euclidean norm. This kernel knows t = h - <z', e'> as the tensor cores compute it, and wants the
// float32 distance s, which is h - <z, e> computed by d fused multiply-adds. Claim: |s - t| <= E with
//
//   E = R (P + g R) + Q S + f,   P = |z - z'| + g Q,   g = (d' + 16) 2^-21,   f = d' 2^-123,   d <= d' <= 4096,
//   Q >= max(|z|, |z'|),  R >= max(|e|, |e'|),  S >= |e - e'|,  all of them at most 2^50, and d' = d in whole slices.
//
// Let X = h + Q R, which is no less than the sum of the magnitudes of all terms of s and of t; and h <= R^2.
//  1. Rounding of the operands. <z, e> - <z', e'> = <z - z', e> + <z', e - e'>, at most |z - z'| R + Q S by Cauchy and
//     Schwarz. The norms are those of the actual rounding errors: 0 where the input is bfloat16 already.
//  2. Rounding of s: a chain of d roundings, ((1 + u)^d - 1) X <= 1.001 d u X, and 2^-150 each where numbers underflow.
//  3. Rounding of t. NVIDIA promises exact products, and sums with at least the precision of float32, in any order and
//     with any rounding (PTX ISA, mma). Assumed here: one instruction, with 16 products p and an accumulator c, ends no
//     further from the exact sum than 17 * 2^-22 (|c| + sum |p|), plus 33 * 2^-126 for what underflows. That is
//     twice what truncation at every step could do, and more than what measurements found, where terms are cut off
//     below the last bit of the largest (Fasi, Higham, Mikaitis, Pranesh 2021, doi 10.7717/peerj-cs.330): 18 * 2^-23.
//     With m = d' / 16 instructions the errors grow to at most 17 * 2^-22 (m + 1) X / (1 - 17 * 2^-22 m) <= 1.07 (d' +
//     16) 2^-22 X.
//  2 and 3 together are below (1.07 + 0.26) (d' + 16) 2^-22 X + d' 2^-124 < g X + f, and g X <= g R^2 + g Q R.
//  4. Rounding of E itself, a handful of operations: P, Q, R, S are larger than they must be by a factor of 1.0008 at
//     least (nearest_codebook_prepare.cuh).
//
// If a size is not at most 2^50, E is infinite or NaN: no bound. Otherwise no sum overflows, and t is a number unless
// the code contains NaN.
//
// Let T be any number that the least s of the query does not exceed: t + E of any code, as t + E rounds (s is a float32
// number, and rounding keeps order), or s of any code. A code with s <= T has t <= s + E <= T + E, and t, a float32
// number too, does not exceed T + E as it rounds. So a code with t > T + E is not the nearest, nor as near as the
// nearest. Everything else is a candidate, and all codes with the least s are among the candidates.
//
// ---- The work
//
// A block owns TENSOR_ROWS queries and one range of codes, in tiles of TENSOR_ROWS; each of its four warps multiplies
// 64 queries by 64 codes. SLICE dimensions at a time go through shared memory, while the next ones are on their way.
// The sums start from h. A thread reads 16 bytes of a code at once, eight dimensions, and uses them as the four pairs
// of rows that two instructions want: which dimension is which does not matter, as long as it is the same for queries
// and codes. The queries lie in shared memory as the registers want them. A quarter of a warp always reads 128
// neighbouring bytes, so there are no bank conflicts.
//
// After a tile each quad of threads has the least t of its rows in 64 codes, and lowers T with it. Codes with t <= T +
// E go to the list of their query. T falls fast: over all tiles of a random codebook a query lists about ten codes, and
// one to three are left under the final T. The thread that owns the query computes their distances, from the original z
// and e, when the list is half full and at the end. If one tile has more candidates than the list holds (norms far
// above the distances, huge numbers, everything equal), the thread computes the distances of the whole tile. That is
// just as right, and as slow as if there were no tensor cores.
//
// Bytes: per tile a block reads 64 bytes per slice of each of its queries and of each code of the tile, from L2.
#pragma once

#include "nearest_codebook_common.cuh"
#include "nearest_codebook_prepare.cuh"
#include "tensor_core.cuh"

namespace ldm_fast::nearest {

constexpr int MIN_TENSOR_DIM = 32;
constexpr int MAX_TENSOR_DIM = 4096;  // as in the proof
constexpr int TENSOR_BLOCKS_PER_SM = 2;
constexpr int WARP_ROWS = 64;  // queries of a warp, and codes
constexpr int M_TILES = WARP_ROWS / 16;
constexpr int N_TILES = WARP_ROWS / 8;
constexpr int BOUNDS = TENSOR_ROWS / WARP;  // of the codes of a tile
constexpr unsigned LIST = 12;               // candidates that a query can have waiting
constexpr unsigned DECIDE_AT = 6;           // more than this many do not wait
constexpr unsigned WHOLE_TILE = 1u << 16;   // added to their number if there is no bound: all codes of the tile
using Sums = float[M_TILES][N_TILES][4];

inline float tensor_slack(int slices) { return static_cast<float>(slices * SLICE + 16) * 0x1p-21f; }
inline float tensor_floor(int slices) { return static_cast<float>(slices * SLICE) * 0x1p-123f; }

struct Candidate {
    float least;  // its distance is not below this
    int code;
};

struct TensorTile {
    Eight queries[2][TENSOR_ROWS * EIGHTS];
    Eight codes[2][TENSOR_ROWS * EIGHTS];
    alignas(16) float norms[2][TENSOR_ROWS];
    alignas(16) Bound code_bounds[2][BOUNDS];
    Bound query_bounds[TENSOR_ROWS];
    Candidate list[LIST][TENSOR_ROWS];
    unsigned listed[TENSOR_ROWS];
    unsigned ceiling[TENSOR_ROWS];  // T, in ordered bits
};

// Copies one slice of the queries and of the codes first .. first + TENSOR_ROWS - 1, and with the first slice the norms
// and bounds of the codes.
__device__ inline void copy_slice(TensorTile& tile, const Operands& operands, const float* half_norms, int stage,
                                  int turn, std::int64_t first, int slice) {
    constexpr int SIZE = TENSOR_ROWS * EIGHTS;
    const int thread = threadIdx.x;
    const Eight* const queries =
        operands.queries + (std::int64_t{blockIdx.x} * operands.slices + slice) * SIZE + thread;
    const Eight* const codes = operands.codes + (first / TENSOR_ROWS * operands.slices + slice) * SIZE + thread;
#pragma unroll
    for (int i = 0; i < SIZE; i += THREADS) {
        copy_async(&tile.queries[stage][thread + i], queries + i);
        copy_async(&tile.codes[stage][thread + i], codes + i);
    }
    if (slice != 0) return;
    if (thread < TENSOR_ROWS / 4) {
        copy_async(&tile.norms[turn][thread * 4], half_norms + first + thread * 4);
    } else if (thread < TENSOR_ROWS / 4 + BOUNDS / 2) {
        const int pair = (thread - TENSOR_ROWS / 4) * 2;
        copy_async(&tile.code_bounds[turn][pair], operands.code_bounds + first / WARP + pair);
    }
}

// Columns 2 t and 2 t + 1 of each group of eight codes.
__device__ inline void start_sums(const float* norms, Sums& sums) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        const float low = norms[n * 8 + 2 * t];
        const float high = norms[n * 8 + 2 * t + 1];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            sums[m][n][0] = sums[m][n][2] = low;
            sums[m][n][1] = sums[m][n][3] = high;
        }
    }
}

// sums -= queries · codes over one slice, for the warp's rows from `first_row` and `first_code` on.
__device__ inline void multiply_slice(const Eight* queries, const Eight* codes, int first_row, int first_code,
                                      Sums& sums) {
    const int lane = threadIdx.x % WARP;
    Eight a[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
        a[m][0] = queries[query_place(first_row / 16 + m, 0, lane)];
        a[m][1] = queries[query_place(first_row / 16 + m, 1, lane)];
    }
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        const Eight code = codes[(first_code + n * 8) * EIGHTS + lane];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const std::uint32_t b[2] = {code.pairs[half * 2], code.pairs[half * 2 + 1]};
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) multiply_add(sums[m][n], a[m][half].pairs, b);
        }
    }
}

// Lists the candidates among numbers `half` and half + 1 of sums[m][n], for all n: one row of the warp, 16 of its 64
// codes. `row` is the row of the block, and `code` the first of the codes.
__device__ inline void collect_row(TensorTile& tile, const Operands& operands, const float (&sums)[N_TILES][4],
                                   int half, int row, int code, Bound codes) {
    float low = fminf(sums[0][half], sums[0][half + 1]);
#pragma unroll
    for (int n = 1; n < N_TILES; ++n) low = fminf(low, fminf(sums[n][half], sums[n][half + 1]));
    low = fminf(low, __shfl_xor_sync(ALL_LANES, low, 1));
    low = fminf(low, __shfl_xor_sync(ALL_LANES, low, 2));

    const Bound query = tile.query_bounds[row];
    const float error =
        fmaf(codes.size, fmaf(operands.slack, codes.size, query.error), fmaf(query.size, codes.error, operands.floor));
    const bool bounded = error < INFINITY;
    // NaN: no code here can be the nearest, or there is no bound.
    unsigned ceiling = to_ordered(fminf(low + error, INFINITY));
    if (threadIdx.x % 4 == 0) {
        if (!bounded) atomicAdd(&tile.listed[row], WHOLE_TILE);
        const unsigned before = atomicMin(&tile.ceiling[row], ceiling);
        ceiling = before < ceiling ? before : ceiling;
    }
    const float most = from_ordered(__shfl_sync(ALL_LANES, ceiling, threadIdx.x % WARP / 4 * 4)) + error;
    if (!bounded || !(low <= most)) return;
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (!(sums[n][half + i] <= most)) continue;
            const unsigned slot = atomicAdd(&tile.listed[row], 1u);
            if (slot % WHOLE_TILE < LIST)
                tile.list[slot % WHOLE_TILE][row] = {sums[n][half + i] - error, code + n * 8 + i};
        }
    }
}

// The distances of COUNT codes, by the formula.
template <int COUNT, class T>
__device__ void exact_distances(const Problem<T>& problem, const T* query, const std::int64_t (&codes)[COUNT],
                                float (&sums)[COUNT]) {
    constexpr int SIZE = Vector<T>::SIZE;
    const std::int64_t query_stride = problem.queries.column_stride;
    const std::int64_t code_stride = problem.codes.column_stride;
    const T* from[COUNT];
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
        sums[j] = problem.half_norms[codes[j]];
        from[j] = problem.codes.row(codes[j]);
    }
    int i = 0;
    if (problem.queries.vectors && problem.codes.vectors) {
#pragma unroll(COUNT == 1 ? 2 : 1)
        for (; i + SIZE <= problem.dim; i += SIZE) {
            float z[SIZE];
            widen(load_vector(query + i), z);
#pragma unroll
            for (int j = 0; j < COUNT; ++j) {
                float e[SIZE];
                widen(load_vector(from[j] + i), e);
                sums[j] = distance<SIZE>(sums[j], z, e);
            }
        }
    }
#pragma unroll(COUNT == 1 ? 4 : 1)
    for (; i < problem.dim; ++i) {
        const float z = to_float(query[i * query_stride]);
#pragma unroll
        for (int j = 0; j < COUNT; ++j) sums[j] = fmaf(-z, to_float(from[j][i * code_stride]), sums[j]);
    }
}

// The least key of the codes that wait in the list of this thread's query and, if there were more, of the tile from
// `first` on.
template <class T>
__device__ Key decide(const Problem<T>& problem, TensorTile& tile, const T* query, std::int64_t first, Key best) {
    const int row = threadIdx.x;
    const unsigned listed = tile.listed[row];
    const float ceiling = from_ordered(tile.ceiling[row]);
#pragma unroll 1
    for (unsigned i = 0; i < listed % WHOLE_TILE && i < LIST; ++i) {
        const Candidate candidate = tile.list[i][row];
        if (candidate.least > ceiling) continue;
        const std::int64_t codes[1] = {candidate.code};
        float sums[1];
        exact_distances<1>(problem, query, codes, sums);
        const Key key = make_key(sums[0], candidate.code);
        best = key < best ? key : best;
    }
    if (listed > LIST) {
        const std::int64_t last =
            first + TENSOR_ROWS < problem.codes.count ? first + TENSOR_ROWS - 1 : problem.codes.count - 1;
#pragma unroll 1
        for (std::int64_t k = first; k <= last; k += 4) {
            std::int64_t codes[4];
            float sums[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) codes[j] = k + j < last ? k + j : last;
            exact_distances<4>(problem, query, codes, sums);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const Key key = make_key(sums[j], static_cast<int>(codes[j]));
                best = key < best ? key : best;
            }
        }
    }
    tile.listed[row] = 0;
    const unsigned least = static_cast<unsigned>(best >> 32);
    if (best != NO_KEY && least < tile.ceiling[row]) tile.ceiling[row] = least;
    return best;
}

template <class T>
__global__ void __launch_bounds__(THREADS, TENSOR_BLOCKS_PER_SM) nearest_tensor(Problem<T> problem) {
    TensorTile& tile = shared_memory<TensorTile>();
    const Operands& operands = problem.operands;
    const Range range = code_range(problem);
    const std::int64_t in_slab = std::int64_t{blockIdx.x} * TENSOR_ROWS + threadIdx.x;
    const std::int64_t n = operands.first_query + in_slab;
    const bool inside = n < problem.queries.count;
    const int lane = threadIdx.x % WARP;
    const int first_row = threadIdx.x / WARP / 2 * WARP_ROWS;   // of the warp, among the queries of the block
    const int first_code = threadIdx.x / WARP % 2 * WARP_ROWS;  // and among the codes of the tile

    tile.query_bounds[threadIdx.x] = operands.query_bounds[in_slab];
    tile.listed[threadIdx.x] = 0;
    tile.ceiling[threadIdx.x] = to_ordered(inside ? INFINITY : -INFINITY);
    Key best = NO_KEY;
    int stage = 0;
    int turn = 0;
    copy_slice(tile, operands, problem.half_norms, stage, turn, range.first, 0);
#pragma unroll 1
    for (std::int64_t first = range.first; first < range.end; first += TENSOR_ROWS) {
        wait_for_copies();
        __syncthreads();  // the first slice is there for all, and all are done with the tile before
        Sums sums;
        start_sums(&tile.norms[turn][first_code], sums);
#pragma unroll 1
        for (int slice = 0; slice < operands.slices; ++slice) {
            if (slice > 0) {
                wait_for_copies();
                __syncthreads();  // the slice is there for all, and all have read the one before
            }
            if (slice + 1 < operands.slices) {
                copy_slice(tile, operands, problem.half_norms, stage ^ 1, turn, first, slice + 1);
            } else if (first + TENSOR_ROWS < range.end) {
                copy_slice(tile, operands, problem.half_norms, stage ^ 1, turn ^ 1, first + TENSOR_ROWS, 0);
            }
            multiply_slice(tile.queries[stage], tile.codes[stage], first_row, first_code, sums);
            stage ^= 1;
        }
        const Bound one = tile.code_bounds[turn][first_code / WARP];
        const Bound other = tile.code_bounds[turn][first_code / WARP + 1];
        const Bound codes{fmaxf(one.size, other.size), fmaxf(one.error, other.error)};
        const int code = static_cast<int>(first) + first_code + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            collect_row(tile, operands, sums[m], 0, first_row + m * 16 + lane / 4, code, codes);
            collect_row(tile, operands, sums[m], 2, first_row + m * 16 + lane / 4 + 8, code, codes);
        }
        __syncthreads();  // the lists are complete
        if (inside && (tile.listed[threadIdx.x] > DECIDE_AT || first + TENSOR_ROWS >= range.end)) {
            best = decide(problem, tile, problem.queries.row(n), first, best);
        }
        turn ^= 1;
    }
    if (inside) put_result(problem, n, best, to_index(best));
}

}  // namespace ldm_fast::nearest
