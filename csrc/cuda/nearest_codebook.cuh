// nearest_codebook on a GPU:  out[n] = argmin_k dist(n, k),  dist(n, k) = |e_k|^2 / 2 - <z_n, e_k>
//
// The distance is the documented float32 formula, the same bits wherever a pair is computed: norm = fma(e_i, e_i, norm)
// for i = 0 .. d-1 from 0; then s = norm / 2, and s = fma(-z_i, e_i, s) for i = 0 .. d-1. float16 and bfloat16 are
// widened first, which is exact. Equal distances (-0 equals +0) give the lowest index; a NaN distance never wins; a row
// of nothing but NaN gives 0. So the answer does not depend on tiles, on the number of blocks, or on the order in which
// they run, nor on which of three methods finds it:
//
//   d <= 16   nearest_codebook_chunk.cuh    d fused multiply-adds and one minimum per pair, then a look for the index
//   d >= 32   nearest_codebook_tensor.cuh   bfloat16 on the tensor cores finds candidates, float32 decides
//   else      nearest_codebook_tiled.cuh    a float32 matrix product that keeps the minima; few queries or codes too
//
// nearest_codebook_stats.cuh adds counts and sums of the rows that chose each code, on the same stream.
//
// If the queries alone are too few to fill the GPU, blockIdx.y divides the codes into ranges. The blocks of one query
// then merge their keys by a 64-bit atomicMin in the output itself, which reset_keys prepares. In a key the distance
// stands above the index, in bits that keep its order.
//
// Nothing of size N * K exists. The workspace is one piece of memory, divided by take_search and take_stats alone: for
// d > 16 a float per code; on the tensor cores also the codes as bfloat16, and the queries of one slab, which is as
// many as fill the GPU SLAB_WAVES times; for the stats 16 bytes per row and the sums of the pieces.
//
// These headers use neither torch nor the runtime's API: the tests compile them for the CPU (tests/cuda_host).
#pragma once

#include "nearest_codebook_search.cuh"
#include "nearest_codebook_stats.cuh"

namespace ldm_fast::nearest {

struct SortMemory {
    Key* entries[2];
    unsigned* digit_counts;
    unsigned* digit_totals;
};

template <class T, class Memory>
SortMemory take_stats(Memory& workspace, Stats<T>& stats) {
    const std::int64_t count = stats.queries.count;
    SortMemory memory{};
    for (Key*& entries : memory.entries) entries = workspace.template take<Key>(count);
    memory.digit_counts = workspace.template take<unsigned>(RADIX * divide_up(count, BLOCK_ITEMS));
    memory.digit_totals = workspace.template take<unsigned>(RADIX);
    stats.first_places = workspace.template take<std::int64_t>(stats.codes);
    stats.piece_sums = workspace.template take<double>(count / PIECE * stats.dim);
    return memory;
}

// Bytes of the workspace, which has to begin at a multiple of 256. The stats come after the search and use the same
// memory.
inline std::int64_t workspace_size(std::int64_t queries, std::int64_t codes, std::int64_t dim, int sm_count,
                                   bool with_stats) {
    Problem<float> problem{};
    problem.queries.count = queries;
    problem.codes.count = codes;
    problem.dim = static_cast<int>(dim);
    Workspace search(0);
    take_search(search, problem, sm_count);
    if (!with_stats) return search.size();
    Stats<float> stats{};
    stats.queries.count = queries;
    stats.codes = codes;
    stats.dim = problem.dim;
    Workspace after(0);
    take_stats(after, stats);
    return search.size() > after.size() ? search.size() : after.size();
}

// Enqueues the counts and sums, after the search: by then `problem.out` holds the indices.
template <class T, class Memory, class Launch>
void enqueue_stats(const Problem<T>& problem, Memory& workspace, std::int64_t* counts, float* sums, Launch& launch) {
    const std::int64_t count = problem.queries.count;
    Stats<T> stats{problem.queries, problem.codes.count, problem.dim, nullptr, nullptr, nullptr, counts, sums};
    const SortMemory area = take_stats(workspace, stats);
    Sort sort{problem.out, nullptr,           nullptr,          count, divide_up(count, BLOCK_ITEMS),
              0,           area.digit_counts, area.digit_totals};
    int pass = 0;
    do {
        sort.to = area.entries[pass % 2];
        sort.shift = pass * DIGIT_BITS;
        if (count > 0) {
            launch(count_digits, Grid{sort.blocks, 1}, sort);
            launch(scan_digits, Grid{RADIX / WARPS, 1}, sort);
            launch(scatter_digits, Grid{sort.blocks, 1}, sort);
        }
        sort.from = sort.to;
        ++pass;
    } while ((problem.codes.count - 1) >> (pass * DIGIT_BITS) > 0);
    stats.sorted = sort.from;
    launch(locate_codes<T>, Grid{divide_up(stats.codes, THREADS), 1}, stats);
    const std::int64_t pieces = count / PIECE * stats.dim;
    if (pieces > 0) launch(sum_pieces<T>, Grid{divide_up(pieces, THREADS), 1}, stats);
    launch(sum_codes<T>, Grid{divide_up(stats.codes * stats.dim, THREADS), 1}, stats);
}

}  // namespace ldm_fast::nearest
