// nearest_codebook for d <= 16: nearest_chunk, then find_in_chunk.
//
// A block of nearest_chunk owns THREADS * Q queries, Q of them in the registers of each thread, and one range of codes.
// It stages TILE codes with their norms in shared memory, in the order that they have in global memory. Then all
// threads read the same four codes at once, by d + 1 loads of 128 bits that are broadcasts. A pair costs d FFMA and one
// FMNMX, because only the minimum of each CHUNK of codes is compared. Past the last code the norm is NaN, so the inner
// loop needs no bounds. The kernel leaves one key per query, the best distance and the chunk that holds it.
// find_in_chunk computes that chunk again, one code per lane, to find the index. A d between the compiled sizes is
// filled up with zeros, which leave every distance as it is.
//
// Bytes: every block reads its queries and its range of codes once; the codes come from L2 for all blocks but the
// first. A key is written to the output and read again, 16 bytes per query.
#pragma once

#include "nearest_codebook_common.cuh"

namespace ldm_fast::nearest {

constexpr int TILE = 256;    // codes staged at once
constexpr int CHUNK = WARP;  // codes between two comparisons of the minimum; one per lane in find_in_chunk
constexpr int MAX_CHUNK_DIM = 16;
constexpr int FIND_QUERIES = 8;  // per warp of find_in_chunk
constexpr int FIND_BLOCKS_PER_SM = 4;

// More queries per thread make more use of every code that is read, as far as the registers reach without spilling.
__host__ __device__ constexpr int queries_per_thread(int dim) { return dim <= 6 ? 8 : dim <= 12 ? 6 : 4; }
__host__ __device__ constexpr int chunk_blocks_per_sm(int dim) { return dim <= 8 ? 4 : 3; }

template <int D>
struct ChunkTile {
    alignas(16) float codes[TILE * D];
    alignas(16) float norms[TILE];
};

// Stages codes first .. first + count - 1 in shared memory, in whole vectors as far as possible; the rest of the tile
// is zero.
template <int D, class T>
__device__ void stage_codes(ChunkTile<D>& tile, const Problem<T>& problem, std::int64_t first, int count) {
    constexpr int SIZE = Vector<T>::SIZE;
    const Codes<T>& codes = problem.codes;
    const int in_vectors = codes.vectors ? count * D / SIZE * SIZE : 0;
    const T* const from = codes.row(first);
#pragma unroll 1
    for (int i = threadIdx.x * SIZE; i < in_vectors; i += THREADS * SIZE) {
        float values[SIZE];
        widen(load_vector(from + i), values);
#pragma unroll
        for (int j = 0; j < SIZE; j += 4) store_four(&tile.codes[i + j], &values[j]);
    }
#pragma unroll 1
    for (int i = in_vectors + threadIdx.x; i < TILE * D; i += THREADS) {
        const int row = i / D;
        const int column = i % D;
        tile.codes[i] = row < count && column < problem.dim
                            ? to_float(from[row * codes.row_stride + column * codes.column_stride])
                            : 0.0f;
    }
}

// Past the last code the norm is NaN, and with it the distance: fminf ignores it.
template <int D>
__device__ void stage_norms(ChunkTile<D>& tile, int count) {
#pragma unroll 1
    for (int i = threadIdx.x; i < TILE; i += THREADS)
        tile.norms[i] = i < count ? half_norm<D>(&tile.codes[i * D]) : NAN;
}

// The minimum over one chunk for each of the thread's queries: the loop that takes all the time.
template <int D, int Q>
__device__ void scan_chunk(const ChunkTile<D>& tile, int first, const float (&queries)[Q][D], float (&low)[Q]) {
#pragma unroll
    for (int q = 0; q < Q; ++q) low[q] = NAN;
#pragma unroll(D <= 4 ? 2 : 1)
    for (int c = first; c < first + CHUNK; c += 4) {
        alignas(16) float norms[4];
        alignas(16) float codes[4 * D];
        load_four(&tile.norms[c], norms);
#pragma unroll
        for (int i = 0; i < 4 * D; i += 4) load_four(&tile.codes[c * D + i], &codes[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int q = 0; q < Q; ++q) low[q] = fminf(low[q], distance<D>(norms[j], queries[q], &codes[j * D]));
        }
    }
}

// Loads query n, or zeros if there is none.
template <int D, class T>
__device__ void load_query(const Problem<T>& problem, std::int64_t n, float (&values)[D]) {
    const Queries<T>& queries = problem.queries;
    load_columns(queries.row(n), queries.column_stride, queries.vectors, n < queries.count ? problem.dim : 0, values);
}

template <int D, class T>
__global__ void __launch_bounds__(THREADS, chunk_blocks_per_sm(D)) nearest_chunk(Problem<T> problem) {
    constexpr int Q = queries_per_thread(D);
    ChunkTile<D>& tile = shared_memory<ChunkTile<D>>();
    const Range range = code_range(problem);
    const std::int64_t first_query = std::int64_t{blockIdx.x} * (THREADS * Q) + threadIdx.x;

    float queries[Q][D];
    float best[Q];  // NaN: no other distance yet
    int winner[Q];  // the first code of the chunk that holds it
#pragma unroll
    for (int q = 0; q < Q; ++q) {
        load_query<D>(problem, first_query + q * THREADS, queries[q]);
        best[q] = NAN;
        winner[q] = 0;
    }

    for (std::int64_t first = range.first; first < range.end; first += TILE) {
        const int count = range.end - first < TILE ? static_cast<int>(range.end - first) : TILE;
        __syncthreads();  // all have read the tile before
        stage_codes(tile, problem, first, count);
        __syncthreads();  // the codes are there for the norms
        stage_norms(tile, count);
        __syncthreads();  // the norms are there for all
#pragma unroll 1
        for (int chunk = 0; chunk < count; chunk += CHUNK) {
            float low[Q];
            scan_chunk(tile, chunk, queries, low);
#pragma unroll
            for (int q = 0; q < Q; ++q) {
                if (low[q] < best[q] || is_nan(best[q])) {
                    best[q] = low[q];
                    winner[q] = static_cast<int>(first) + chunk;
                }
            }
        }
    }

#pragma unroll
    for (int q = 0; q < Q; ++q) {
        const std::int64_t n = first_query + q * THREADS;
        if (n >= problem.queries.count) continue;
        const Key key = make_key(best[q], winner[q]);
        put_result(problem, n, key, key);
    }
}

// Replaces keys of chunks by indices: the lowest index in the chunk whose distance is that of the key.
template <int D, class T>
__global__ void __launch_bounds__(THREADS, FIND_BLOCKS_PER_SM) find_in_chunk(Problem<T> problem) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const Codes<T>& codes = problem.codes;
    const std::int64_t first_query = (std::int64_t{blockIdx.x} * (THREADS / WARP) + warp) * FIND_QUERIES;
    std::int64_t index = 0;  // of the query whose number is the lane's
#pragma unroll(D <= 4 ? 4 : 2)
    for (int q = 0; q < FIND_QUERIES; ++q) {
        const std::int64_t n = first_query + q;
        const Key key = n < problem.queries.count ? problem.out[n] : NO_KEY;
        const std::int64_t chunk = key == NO_KEY ? 0 : key_index(key);
        const bool inside = chunk + lane < codes.count;
        float query[D];
        float code[D];
        load_query<D>(problem, n, query);
        load_columns(codes.row(chunk + lane), codes.column_stride, codes.vectors, inside ? problem.dim : 0, code);
        const bool match = key != NO_KEY && inside && distance<D>(half_norm<D>(code), query, code) == key_distance(key);
        const unsigned matches = __ballot_sync(ALL_LANES, match);
        // No match: a row of nothing but NaN.
        if (lane == q && matches != 0) index = chunk + __ffs(matches) - 1;
    }
    __syncwarp();  // all lanes have read the keys, which the indices replace
    if (lane < FIND_QUERIES && first_query + lane < problem.queries.count) problem.out[first_query + lane] = index;
}

}  // namespace ldm_fast::nearest
