// nearest_codebook for d > 16: a matrix product in float32 tiles that keeps only the minimum of each row.
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

struct DeepTile {
    alignas(16) float queries[DEPTH][TILED_QUERIES + PADDING];
    alignas(16) float codes[DEPTH][TILED_CODES + PADDING];
    Key keys[TILED_QUERIES][TILED_CODES / 8];
};

// One thread per code, in index order, so that the norm has the bits of the formula.
template <class T>
__global__ void __launch_bounds__(THREADS) half_norms(Problem<T> problem) {
    const std::int64_t k = std::int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (k >= problem.codes.count) return;
    float norm = 0.0f;
#pragma unroll 8
    for (int i = 0; i < problem.dim; ++i) {
        const float value = to_float(*problem.codes.at(k, i));
        norm = fmaf(value, value, norm);
    }
    problem.half_norms[k] = 0.5f * norm;
}

// DEPTH columns of COUNT rows, transposed; zero outside the matrix, which leaves every distance as it is.
template <int COUNT, class T>
__device__ void stage_columns(float (&tile)[DEPTH][COUNT + PADDING], const Rows<T>& rows, std::int64_t first,
                              int column, int dim) {
    constexpr int SIZE = Vector<T>::SIZE;
    constexpr int PER_ROW = DEPTH / SIZE;
#pragma unroll 2
    for (int i = threadIdx.x; i < COUNT * PER_ROW; i += THREADS) {
        const int row = i / PER_ROW;
        const int depth = i % PER_ROW * SIZE;
        const bool inside = first + row < rows.count;
        const T* const from = rows.at(first + row, column + depth);
        float values[SIZE];
        if (inside && rows.vectors && column + depth + SIZE <= dim) {
            widen(load_vector(from), values);
        } else {
#pragma unroll
            for (int j = 0; j < SIZE; ++j) {
                values[j] = inside && column + depth + j < dim ? to_float(from[j * rows.column_stride]) : 0.0f;
            }
        }
#pragma unroll
        for (int j = 0; j < SIZE; ++j) tile[depth + j][row] = values[j];
    }
}

// Where number i of a thread's eight lies: in two groups of four, so that neighbours read neighbouring vectors.
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

template <bool MERGE, class T>
__global__ void __launch_bounds__(THREADS, TILED_BLOCKS_PER_SM) nearest_tiled(Problem<T> problem) {
    DeepTile& tile = shared_memory<DeepTile>();
    const int code_group = threadIdx.x % 8;
    const int query_group = threadIdx.x / 8;
    const std::int64_t first_query = std::int64_t{blockIdx.x} * TILED_QUERIES;
    const Range range = code_range(problem);

    float best[8];  // NaN: no distance yet but NaN
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
            __syncthreads();  // all have read the columns before
            stage_columns<TILED_QUERIES>(tile.queries, problem.queries, first_query, column, problem.dim);
            stage_columns<TILED_CODES>(tile.codes, problem.codes, first, column, problem.dim);
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
    const std::int64_t n = first_query + threadIdx.x;
    if (n >= problem.queries.count) return;
    Key least = NO_KEY;
    for (const Key key : tile.keys[threadIdx.x]) least = key < least ? key : least;
    put_key<MERGE>(&problem.out[n], least);
}

}  // namespace ldm_fast::nearest
