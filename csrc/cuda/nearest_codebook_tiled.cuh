// nearest_codebook for every d, in float32 throughout: a matrix product in tiles that keeps only the minimum of each
// row. It runs where the tensor cores are of no use, between d = 17 and 31 and for a handful of queries.
//
// A block owns TILED_QUERIES queries and one range of codes, in tiles of TILED_CODES; a thread owns eight queries by
// eight codes. DEPTH dimensions at a time go through shared memory, transposed, so that a thread reads its eight
// numbers of a dimension in two loads of 128 bits. The sums start from the norms that half_norms wrote: the same
// formula, operation by operation, as for small d. Distance and index are tracked together, which costs little beside d
// multiply-adds.
//
// Bytes: a block reads its queries once per tile of codes and its range of codes once, both from L2 for the most part.
#pragma once

#include "nearest_codebook_common.cuh"

namespace ldm_fast::nearest {

constexpr int TILED_QUERIES = 128;
constexpr int TILED_CODES = 64;
constexpr int TILED_BLOCKS_PER_SM = 3;
constexpr int DEPTH = 16;
constexpr int PADDING = 4;  // floats per row of a tile: fewer bank conflicts, still whole vectors
static_assert(TILED_QUERIES == THREADS, "a thread sees to one query");

struct DeepTile {
    alignas(16) float queries[DEPTH][TILED_QUERIES + PADDING];
    alignas(16) float codes[DEPTH][TILED_CODES + PADDING];
    std::int64_t starts[TILED_QUERIES];  // of the queries in memory; each takes a division to find
    Key keys[TILED_QUERIES][TILED_CODES / 8];
};

// One thread per code, in index order, so that the norm has the bits of the formula.
template <class T>
__global__ void __launch_bounds__(THREADS) half_norms(Problem<T> problem) {
    const std::int64_t k = std::int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (k >= problem.codes.count) return;
    const T* const code = problem.codes.row(k);
    float norm = 0.0f;
#pragma unroll 8
    for (int i = 0; i < problem.dim; ++i) {
        const float value = to_float(code[i * problem.codes.column_stride]);
        norm = fmaf(value, value, norm);
    }
    problem.half_norms[k] = 0.5f * norm;
}

// Stages DEPTH columns of COUNT rows, transposed. Outside the matrix there are zeros, which leave every distance as it
// is. start(row) is where the columns of a row begin. Neighbouring threads take neighbouring rows: they write without
// bank conflicts, and read neighbouring numbers of a channel-first map.
template <int COUNT, class T, class Start>
__device__ void stage_columns(float (&tile)[DEPTH][COUNT + PADDING], std::int64_t rows, int columns, const Start& start,
                              std::int64_t column_stride, bool vectors) {
    constexpr int SIZE = Vector<T>::SIZE;
#pragma unroll 2
    for (int i = threadIdx.x; i < COUNT * (DEPTH / SIZE); i += THREADS) {
        const int row = i % COUNT;
        const int depth = i / COUNT * SIZE;
        float values[SIZE];
        load_columns(start(row) + depth * column_stride, column_stride, vectors, row < rows ? columns - depth : 0,
                     values);
#pragma unroll
        for (int j = 0; j < SIZE; ++j) tile[depth + j][row] = values[j];
    }
}

template <class T>
__device__ void stage_tile(DeepTile& tile, const Problem<T>& problem, std::int64_t first_query, std::int64_t first_code,
                           int column) {
    const Queries<T>& queries = problem.queries;
    const Codes<T>& codes = problem.codes;
    const T* const query_columns = queries.data + column * queries.column_stride;
    const T* const code_columns = codes.row(first_code) + column * codes.column_stride;
    stage_columns<TILED_QUERIES, T>(
        tile.queries, queries.count - first_query, problem.dim - column,
        [&](int row) { return query_columns + tile.starts[row]; }, queries.column_stride, queries.vectors);
    stage_columns<TILED_CODES, T>(
        tile.codes, codes.count - first_code, problem.dim - column,
        [&](int row) { return code_columns + row * codes.row_stride; }, codes.column_stride, codes.vectors);
}

// Where number i of a thread's eight is: in two groups of four, so that neighbours read neighbouring vectors.
template <int COUNT>
__device__ int tile_row(int group, int i) {
    return (i / 4) * (COUNT / 2) + group * 4 + i % 4;
}

__device__ inline void multiply_columns(const DeepTile& tile, int query_group, int code_group, float (&sums)[8][8]) {
#pragma unroll
    for (int depth = 0; depth < DEPTH; ++depth) {
        float queries[8];
        float codes[8];
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            load_four(&tile.queries[depth][tile_row<TILED_QUERIES>(query_group, i)], &queries[i]);
            load_four(&tile.codes[depth][tile_row<TILED_CODES>(code_group, i)], &codes[i]);
        }
#pragma unroll
        for (int q = 0; q < 8; ++q) {
#pragma unroll
            for (int c = 0; c < 8; ++c) sums[q][c] = fmaf(-queries[q], codes[c], sums[q][c]);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS, TILED_BLOCKS_PER_SM) nearest_tiled(Problem<T> problem) {
    DeepTile& tile = shared_memory<DeepTile>();
    const int code_group = threadIdx.x % 8;
    const int query_group = threadIdx.x / 8;
    const std::int64_t first_query = std::int64_t{blockIdx.x} * TILED_QUERIES;
    const std::int64_t n = first_query + threadIdx.x;
    const Range range = code_range(problem);
    tile.starts[threadIdx.x] = n < problem.queries.count ? problem.queries.row(n) - problem.queries.data : 0;

    float best[8];  // NaN: no other distance yet
    int winner[8];
#pragma unroll
    for (int q = 0; q < 8; ++q) {
        best[q] = NAN;
        winner[q] = 0;
    }

    for (std::int64_t first = range.first; first < range.end; first += TILED_CODES) {
        float sums[8][8];
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const std::int64_t k = first + tile_row<TILED_CODES>(code_group, c);
            const float norm = k < range.end ? problem.half_norms[k] : NAN;
#pragma unroll
            for (int q = 0; q < 8; ++q) sums[q][c] = norm;
        }
#pragma unroll 1
        for (int column = 0; column < problem.dim; column += DEPTH) {
            __syncthreads();  // all have read the columns before; the starts are there
            stage_tile(tile, problem, first_query, first, column);
            __syncthreads();  // the columns are there for all
            multiply_columns(tile, query_group, code_group, sums);
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) {  // in index order: a later equal distance does not replace an earlier one
            const int k = static_cast<int>(first) + tile_row<TILED_CODES>(code_group, c);
#pragma unroll
            for (int q = 0; q < 8; ++q) {
                if (sums[q][c] < best[q] || is_nan(best[q])) {
                    best[q] = sums[q][c];
                    winner[q] = k;
                }
            }
        }
    }

    // The eight threads that share a query meet in shared memory.
#pragma unroll
    for (int q = 0; q < 8; ++q) {
        tile.keys[tile_row<TILED_QUERIES>(query_group, q)][code_group] = make_key(best[q], winner[q]);
    }
    __syncthreads();  // all keys are there
    if (n >= problem.queries.count) return;
    Key least = NO_KEY;
    for (const Key key : tile.keys[threadIdx.x]) least = key < least ? key : least;
    put_result(problem, n, least, to_index(least));
}

}  // namespace ldm_fast::nearest
