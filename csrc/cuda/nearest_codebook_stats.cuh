// nearest_codebook_stats: how many rows chose each code, and their sum, from the indices. There are no atomics in
// global memory, and the order of additions is fixed, so the sums are the same bits on every run and every GPU.
//
// The rows are sorted by code (nearest_codebook_sort.cuh). locate_codes finds where each code's rows begin and end.
// sum_pieces adds up each PIECE consecutive places that belong to a single code, so that a code with very many rows
// does not wait for one thread. sum_codes adds, for every code and column, the rows before the first whole piece, the
// pieces, and the rows after the last one. All of that is in the order of the rows, in float64, rounded to float32
// once.
//
// Bytes: every row is read once, its place in the order twice.
#pragma once

#include "nearest_codebook_sort.cuh"

namespace ldm_fast::nearest {

constexpr int PIECE = 128;

template <class T>
struct Stats {
    Queries<T> queries;
    std::int64_t codes;
    int dim;
    const Key* sorted;           // N entries
    std::int64_t* first_places;  // K
    double* piece_sums;          // [N / PIECE][d]
    std::int64_t* counts;        // K
    float* sums;                 // [K][d]
};

// The first place whose code is not below `code`.
__device__ inline std::int64_t lower_bound(const Key* sorted, std::int64_t count, std::int64_t code) {
    std::int64_t low = 0;
    std::int64_t high = count;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (static_cast<std::int64_t>(sorted[middle] >> 32) < code) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

template <class T>
__global__ void __launch_bounds__(THREADS) locate_codes(Stats<T> stats) {
    const std::int64_t k = std::int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (k >= stats.codes) return;
    const std::int64_t first = lower_bound(stats.sorted, stats.queries.count, k);
    stats.first_places[k] = first;
    stats.counts[k] = lower_bound(stats.sorted, stats.queries.count, k + 1) - first;
}

// Adds column `column` of the rows in places first .. end - 1 to `sum`.
template <class T>
__device__ double add_rows(const Stats<T>& stats, std::int64_t first, std::int64_t end, int column, double sum) {
    const std::int64_t offset = column * stats.queries.column_stride;
#pragma unroll 4
    for (std::int64_t place = first; place < end; ++place) {
        sum += to_float(stats.queries.row(static_cast<std::uint32_t>(stats.sorted[place]))[offset]);
    }
    return sum;
}

// One thread per piece and column.
template <class T>
__global__ void __launch_bounds__(THREADS) sum_pieces(Stats<T> stats) {
    const std::int64_t i = std::int64_t{blockIdx.x} * THREADS + threadIdx.x;
    const std::int64_t piece = i / stats.dim;
    if (piece >= stats.queries.count / PIECE) return;
    const std::int64_t first = piece * PIECE;
    if (stats.sorted[first] >> 32 != stats.sorted[first + PIECE - 1] >> 32) return;
    stats.piece_sums[i] = add_rows(stats, first, first + PIECE, static_cast<int>(i % stats.dim), 0.0);
}

// One thread per code and column.
template <class T>
__global__ void __launch_bounds__(THREADS) sum_codes(Stats<T> stats) {
    const std::int64_t i = std::int64_t{blockIdx.x} * THREADS + threadIdx.x;
    const std::int64_t k = i / stats.dim;
    if (k >= stats.codes) return;
    const int column = static_cast<int>(i % stats.dim);
    const std::int64_t first = stats.first_places[k];
    const std::int64_t end = first + stats.counts[k];
    const std::int64_t whole = divide_up(first, PIECE);
    const std::int64_t whole_end = end / PIECE;
    const bool pieces = whole < whole_end;
    double sum = add_rows(stats, first, pieces ? whole * PIECE : end, column, 0.0);
    if (pieces) {
#pragma unroll 4
        for (std::int64_t piece = whole; piece < whole_end; ++piece)
            sum += stats.piece_sums[piece * stats.dim + column];
        sum = add_rows(stats, whole_end * PIECE, end, column, sum);
    }
    stats.sums[i] = static_cast<float>(sum);
}

}  // namespace ldm_fast::nearest
