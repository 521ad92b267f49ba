// nearest_codebook on a GPU:  out[n] = argmin_k dist(n, k),  dist(n, k) = |e_k|^2 / 2 - <z_n, e_k>
//
// The distance is the documented float32 formula, the same bits wherever a pair is computed: norm = fma(e_i, e_i, norm)
// for i = 0 .. d-1 from 0; then s = norm / 2, and s = fma(-z_i, e_i, s) for i = 0 .. d-1. float16 and bfloat16 are
// widened first, which is exact. Equal distances (-0 equals +0) give the lowest index; a NaN distance never wins; a row
// of nothing but NaN gives 0. So the answer does not depend on tiles, on the number of blocks, or on the order in which
// they run.
//
// d <= 16: nearest_chunk, then find_in_chunk. A block of nearest_chunk owns THREADS * Q queries, Q of them in the
// registers of each thread, and one range of codes. It stages TILE codes with their norms in shared memory, in the
// order they have in global memory; all threads then read the same four codes at once, by d + 1 loads of 128 bits that
// are broadcasts. A pair costs d FFMA and one FMNMX: only the minimum of each CHUNK of codes is looked at. Past the
// last code the norm is NaN, so the inner loop needs no bounds. It leaves one key per query, the best distance and the
// chunk that holds it; find_in_chunk computes that chunk again, one code per lane, for the index. A d between the
// compiled sizes is filled up with zeros, which leave every distance as it is.
//
// d > 16: half_norms, then nearest_tiled (nearest_codebook_tiled.cuh).
//
// Bytes: every block reads its queries and its range of codes once; the codes come from L2 for all blocks but the
// first. A key is written to the output and read again, 16 bytes per query. Nothing of size N * K exists; workspace: K
// floats for d > 16.
//
// When the queries alone are too few to fill the GPU, blockIdx.y divides the codes into ranges, and the blocks of one
// query merge by a 64-bit atomicMin of their keys in the output itself, which reset_keys prepares: the distance is
// above the index in the key, in bits that keep its order.
//
// Free of torch and of the runtime's API: the tests compile this header for the CPU (tests/cuda_host).
#pragma once

#include "nearest_codebook_common.cuh"
#include "nearest_codebook_tiled.cuh"

namespace ldm_fast::nearest {

constexpr int TILE = 256;    // codes staged at once
constexpr int CHUNK = WARP;  // codes between two looks at the minimum; one per lane in find_in_chunk
constexpr int MAX_CHUNK_DIM = 16;
constexpr int FIND_QUERIES = 8;  // per warp of find_in_chunk
constexpr int FIND_BLOCKS_PER_SM = 4;

// More queries per thread make more of every code that is read, as far as the registers reach without spilling.
__host__ __device__ constexpr int queries_per_thread(int dim) { return dim <= 6 ? 8 : dim <= 12 ? 6 : 4; }
__host__ __device__ constexpr int chunk_blocks_per_sm(int dim) { return dim <= 8 ? 4 : 3; }

template <int D>
struct ChunkTile {
    alignas(16) float codes[TILE * D];
    alignas(16) float norms[TILE];
};

// Codes first .. first + count - 1 to shared memory, in whole vectors as far as they go; the rest of the tile is zero.
template <int D, class T>
__device__ void stage_codes(ChunkTile<D>& tile, const Problem<T>& problem, std::int64_t first, int count) {
    constexpr int SIZE = Vector<T>::SIZE;
    const Rows<T>& codes = problem.codes;
    const int in_vectors = codes.vectors ? count * D / SIZE * SIZE : 0;
    const T* const from = codes.at(first, 0);
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
        tile.codes[i] = row < count && column < problem.dim ? to_float(*codes.at(first + row, column)) : 0.0f;
    }
}

// Past the last code the norm is NaN, and with it the distance: fminf passes over it.
template <int D>
__device__ void stage_norms(ChunkTile<D>& tile, int count) {
#pragma unroll 1
    for (int i = threadIdx.x; i < TILE; i += THREADS)
        tile.norms[i] = i < count ? half_norm<D>(&tile.codes[i * D]) : NAN;
}

// The minimum over one chunk for each of the thread's queries: the loop in which all the time goes.
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

template <int D, bool MERGE, class T>
__global__ void __launch_bounds__(THREADS, chunk_blocks_per_sm(D)) nearest_chunk(Problem<T> problem) {
    constexpr int Q = queries_per_thread(D);
    ChunkTile<D>& tile = shared_memory<ChunkTile<D>>();
    const Range range = code_range(problem);
    const std::int64_t first_query = std::int64_t{blockIdx.x} * (THREADS * Q) + threadIdx.x;

    float queries[Q][D];
    float best[Q];  // NaN: no distance yet but NaN
    int winner[Q];  // the first code of the chunk that holds it
#pragma unroll
    for (int q = 0; q < Q; ++q) {
        const std::int64_t n = first_query + q * THREADS;
        load_row<D>(problem.queries, n, problem.dim, queries[q]);
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
        if (n < problem.queries.count) put_key<MERGE>(&problem.out[n], make_key(best[q], winner[q]));
    }
}

// Keys of chunks to indices: the lowest index in the chunk whose distance is the one in the key.
template <int D, class T>
__global__ void __launch_bounds__(THREADS, FIND_BLOCKS_PER_SM) find_in_chunk(Problem<T> problem) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const std::int64_t first_query = (std::int64_t{blockIdx.x} * (THREADS / WARP) + warp) * FIND_QUERIES;
    std::int64_t index = 0;  // of the query with the number of the lane
#pragma unroll(D <= 4 ? 4 : 2)
    for (int q = 0; q < FIND_QUERIES; ++q) {
        const std::int64_t n = first_query + q;
        const Key key = n < problem.queries.count ? problem.out[n] : NO_KEY;
        const std::int64_t chunk = key == NO_KEY ? 0 : key_index(key);
        float query[D];
        float code[D];
        load_row<D>(problem.queries, n, problem.dim, query);
        load_row<D>(problem.codes, chunk + lane, problem.dim, code);
        const bool match = key != NO_KEY && chunk + lane < problem.codes.count &&
                           distance<D>(half_norm<D>(code), query, code) == key_distance(key);
        const unsigned matches = __ballot_sync(ALL_LANES, match);
        // No match: a row of nothing but NaN.
        if (lane == q && matches != 0) index = chunk + __ffs(matches) - 1;
    }
    __syncwarp();  // all lanes have read the keys, which the indices replace
    if (lane < FIND_QUERIES && first_query + lane < problem.queries.count) problem.out[first_query + lane] = index;
}

// ---- which kernels, in which grid

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// As many ranges of codes as blocks fit on the GPU beyond those that the queries give, in whole tiles, none of them
// empty.
inline Grid plan_grid(std::int64_t queries, std::int64_t codes, int block_queries, int tile,
                      std::int64_t resident_blocks, std::int64_t* codes_per_block) {
    const std::int64_t tiles = divide_up(codes, tile);
    const std::int64_t blocks = divide_up(queries, block_queries);
    const std::int64_t fit = resident_blocks / blocks;
    const std::int64_t ranges = fit < 1 ? 1 : fit < tiles ? fit : tiles;
    const std::int64_t tiles_per_block = divide_up(tiles, ranges);
    *codes_per_block = tiles_per_block * tile;
    return {blocks, divide_up(tiles, tiles_per_block)};
}

template <class T>
bool starts_a_vector(const Rows<T>& rows) {
    return rows.column_stride == 1 && reinterpret_cast<std::uintptr_t>(rows.data) % sizeof(Vector<T>) == 0;
}

// launch(kernel, grid, problem) for each kernel in turn; all have THREADS threads per block.
template <int D, class T, class Launch>
void enqueue_chunk(Problem<T> problem, int sm_count, Launch& launch) {
    const std::int64_t count = problem.queries.count;
    // A tile is read as one piece.
    problem.codes.vectors = starts_a_vector(problem.codes) && problem.dim == D && problem.codes.row_stride == D;
    const Grid grid = plan_grid(count, problem.codes.count, THREADS * queries_per_thread(D), TILE,
                                std::int64_t{chunk_blocks_per_sm(D)} * sm_count, &problem.codes_per_block);
    if (grid.y == 1) {
        launch(nearest_chunk<D, false, T>, grid, problem);
    } else {
        launch(reset_keys<T>, Grid{divide_up(count, THREADS), 1}, problem);
        launch(nearest_chunk<D, true, T>, grid, problem);
    }
    launch(find_in_chunk<D, T>, Grid{divide_up(count, THREADS / WARP * FIND_QUERIES), 1}, problem);
}

template <class T, class Launch>
void enqueue_tiled(Problem<T> problem, int sm_count, Launch& launch) {
    const std::int64_t count = problem.queries.count;
    // Each row is read by itself.
    for (Rows<T>* rows : {&problem.queries, &problem.codes}) {
        rows->vectors = starts_a_vector(*rows) && rows->row_stride % Vector<T>::SIZE == 0;
    }
    const Grid grid = plan_grid(count, problem.codes.count, TILED_QUERIES, TILED_CODES,
                                std::int64_t{TILED_BLOCKS_PER_SM} * sm_count, &problem.codes_per_block);
    const Grid outputs{divide_up(count, THREADS), 1};
    launch(half_norms<T>, Grid{divide_up(problem.codes.count, THREADS), 1}, problem);
    if (grid.y == 1) {
        launch(nearest_tiled<false, T>, grid, problem);
    } else {
        launch(reset_keys<T>, outputs, problem);
        launch(nearest_tiled<true, T>, grid, problem);
    }
    launch(keys_to_indices<T>, outputs, problem);
}

// The whole op. The compiled sizes: every d up to 8, where the codebooks of VQ models mostly are, and two above.
template <class T, class Launch>
void enqueue(const Problem<T>& problem, int sm_count, Launch&& launch) {
    if (problem.queries.count == 0) return;
    switch (problem.dim <= 8 ? problem.dim : problem.dim <= 12 ? 12 : problem.dim <= MAX_CHUNK_DIM ? 16 : 0) {
        case 1:
            return enqueue_chunk<1>(problem, sm_count, launch);
        case 2:
            return enqueue_chunk<2>(problem, sm_count, launch);
        case 3:
            return enqueue_chunk<3>(problem, sm_count, launch);
        case 4:
            return enqueue_chunk<4>(problem, sm_count, launch);
        case 5:
            return enqueue_chunk<5>(problem, sm_count, launch);
        case 6:
            return enqueue_chunk<6>(problem, sm_count, launch);
        case 7:
            return enqueue_chunk<7>(problem, sm_count, launch);
        case 8:
            return enqueue_chunk<8>(problem, sm_count, launch);
        case 12:
            return enqueue_chunk<12>(problem, sm_count, launch);
        case 16:
            return enqueue_chunk<16>(problem, sm_count, launch);
        default:
            return enqueue_tiled(problem, sm_count, launch);
    }
}

}  // namespace ldm_fast::nearest
