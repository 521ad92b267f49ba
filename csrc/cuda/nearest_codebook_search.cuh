// The search of nearest_codebook: which method for which sizes, its memory, and its kernels one after another.
#pragma once

#include "nearest_codebook_chunk.cuh"
#include "nearest_codebook_common.cuh"
#include "nearest_codebook_tensor.cuh"
#include "nearest_codebook_tiled.cuh"

namespace ldm_fast::nearest {

constexpr std::int64_t SLAB_WAVES = 2;
constexpr std::int64_t MIN_TENSOR_QUERIES = 64;  // below, reading the codes takes longer than the arithmetic
constexpr std::int64_t MIN_TENSOR_CODES = 64;

enum class Method { chunk, tiled, tensor };

inline Method choose_method(std::int64_t queries, std::int64_t codes, std::int64_t dim) {
    if (dim <= MAX_CHUNK_DIM) return Method::chunk;
    const bool worth_it = queries >= MIN_TENSOR_QUERIES && codes >= MIN_TENSOR_CODES;
    return worth_it && dim >= MIN_TENSOR_DIM && dim <= MAX_TENSOR_DIM ? Method::tensor : Method::tiled;
}

// Hands out pieces of one stretch of memory. Started at address 0, it tells how much that takes. (The tests hand out
// separate pieces.)
class Workspace {
  public:
    explicit Workspace(std::uintptr_t start) : start_(start), end_(start) {}

    template <class U>
    U* take(std::int64_t count) {
        const std::uintptr_t piece = end_;
        end_ += static_cast<std::uintptr_t>(divide_up(count * static_cast<std::int64_t>(sizeof(U)), 256)) * 256;
        return reinterpret_cast<U*>(piece);
    }
    std::int64_t size() const { return static_cast<std::int64_t>(end_ - start_); }

  private:
    std::uintptr_t start_;
    std::uintptr_t end_;
};

inline std::int64_t slab_size(std::int64_t queries, int sm_count) {
    const std::int64_t slab = SLAB_WAVES * TENSOR_BLOCKS_PER_SM * (sm_count < 1 ? 1 : sm_count);
    const std::int64_t all = divide_up(queries, TENSOR_ROWS);
    return (all < slab ? all : slab) * TENSOR_ROWS;
}

// Takes the memory that the method needs.
template <class T, class Memory>
void take_search(Memory& workspace, Problem<T>& problem, int sm_count) {
    const std::int64_t queries = problem.queries.count;
    const std::int64_t codes = problem.codes.count;
    switch (choose_method(queries, codes, problem.dim)) {
        case Method::chunk:
            return;
        case Method::tiled:
            problem.half_norms = workspace.template take<float>(codes);
            return;
        case Method::tensor:
            break;
    }
    const std::int64_t all_codes = divide_up(codes, TENSOR_ROWS) * TENSOR_ROWS;
    const std::int64_t slab = slab_size(queries, sm_count);
    Operands& operands = problem.operands;
    operands.slices = static_cast<int>(divide_up(problem.dim, SLICE));
    operands.slack = tensor_slack(operands.slices);
    operands.floor = tensor_floor(operands.slices);
    operands.queries = workspace.template take<Eight>(slab * operands.slices * EIGHTS);
    operands.codes = workspace.template take<Eight>(all_codes * operands.slices * EIGHTS);
    operands.query_bounds = workspace.template take<Bound>(slab);
    operands.code_bounds = workspace.template take<Bound>(all_codes / WARP);
    problem.half_norms = workspace.template take<float>(all_codes);
}

// Divides the codes into as many ranges as let all blocks be on the GPU at once, in whole tiles, none of them empty.
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

// Whether every row begins at a multiple of 16 bytes and lies in one piece.
template <class T>
bool rows_in_vectors(const T* data, std::int64_t column_stride, std::int64_t row_stride, std::int64_t batch_stride) {
    constexpr std::int64_t SIZE = Vector<T>::SIZE;
    return column_stride == 1 && reinterpret_cast<std::uintptr_t>(data) % sizeof(Vector<T>) == 0 &&
           row_stride % SIZE == 0 && batch_stride % SIZE == 0;
}

// B batches of S rows each.
template <class T>
Queries<T> make_queries(const T* data, std::int64_t batches, std::int64_t rows, std::int64_t batch_stride,
                        std::int64_t row_stride, std::int64_t column_stride) {
    Queries<T> queries{data, batches * rows, rows, batch_stride, row_stride, column_stride, false};
    if (batches == 1 || batch_stride == rows * row_stride) queries.per_batch = queries.count;
    const bool one = queries.per_batch == queries.count;
    queries.vectors = rows_in_vectors(data, column_stride, row_stride, one ? 0 : batch_stride);
    return queries;
}

template <class T>
Codes<T> make_codes(const T* data, std::int64_t count, std::int64_t row_stride, std::int64_t column_stride) {
    return {data, count, row_stride, column_stride, rows_in_vectors(data, column_stride, row_stride, 0)};
}

// Calls launch(kernel, grid, arguments) for each kernel in turn; all have THREADS threads per block.
template <int D, class T, class Launch>
void enqueue_chunk(Problem<T> problem, int sm_count, Launch& launch) {
    const std::int64_t count = problem.queries.count;
    Codes<T>& codes = problem.codes;
    problem.queries.vectors &= problem.dim == D;
    // A tile is read as one piece; the rows in it need not begin at multiples of 16 bytes.
    codes.vectors = problem.dim == D && codes.row_stride == D && rows_in_vectors(codes.data, codes.column_stride, 0, 0);
    const Grid grid = plan_grid(count, codes.count, THREADS * queries_per_thread(D), TILE,
                                std::int64_t{chunk_blocks_per_sm(D)} * sm_count, &problem.codes_per_block);
    if (grid.y > 1) launch(reset_keys<T>, Grid{divide_up(count, THREADS), 1}, problem);
    launch(nearest_chunk<D, T>, grid, problem);
    launch(find_in_chunk<D, T>, Grid{divide_up(count, THREADS / WARP * FIND_QUERIES), 1}, problem);
}

template <class T, class Launch>
void enqueue_tiled(Problem<T> problem, int sm_count, Launch& launch) {
    const std::int64_t count = problem.queries.count;
    const Grid grid = plan_grid(count, problem.codes.count, TILED_QUERIES, TILED_CODES,
                                std::int64_t{TILED_BLOCKS_PER_SM} * sm_count, &problem.codes_per_block);
    const Grid outputs{divide_up(count, THREADS), 1};
    launch(half_norms<T>, Grid{divide_up(problem.codes.count, THREADS), 1}, problem);
    if (grid.y > 1) launch(reset_keys<T>, outputs, problem);
    launch(nearest_tiled<T>, grid, problem);
    if (grid.y > 1) launch(keys_to_indices<T>, outputs, problem);
}

// All slabs use the same memory, one after the other: the stream keeps them apart.
template <class T, class Launch>
void enqueue_tensor(Problem<T> problem, int sm_count, Launch& launch) {
    const std::int64_t count = problem.queries.count;
    const std::int64_t slab = slab_size(count, sm_count);
    const Grid outputs{divide_up(count, THREADS), 1};
    const Grid grid = plan_grid(slab, problem.codes.count, TENSOR_ROWS, TENSOR_ROWS,
                                std::int64_t{TENSOR_BLOCKS_PER_SM} * sm_count, &problem.codes_per_block);
    launch(prepare_codes<T>, Grid{divide_up(problem.codes.count, TENSOR_ROWS), 1}, problem);
    if (grid.y > 1) launch(reset_keys<T>, outputs, problem);
    for (std::int64_t first = 0; first < count; first += slab) {
        problem.operands.first_query = first;
        const std::int64_t blocks = divide_up(count - first < slab ? count - first : slab, TENSOR_ROWS);
        launch(prepare_queries<T>, Grid{blocks, 1}, problem);
        launch(nearest_tensor<T>, Grid{blocks, grid.y}, problem);
    }
    if (grid.y > 1) launch(keys_to_indices<T>, outputs, problem);
}

// Enqueues the whole search. The compiled sizes are every d up to 8, which most codebooks of VQ models have, and two
// above.
template <class T, class Memory, class Launch>
void enqueue(Problem<T> problem, Memory& workspace, int sm_count, Launch& launch) {
    if (problem.queries.count == 0) return;
    take_search(workspace, problem, sm_count);
    switch (choose_method(problem.queries.count, problem.codes.count, problem.dim)) {
        case Method::tiled:
            return enqueue_tiled(problem, sm_count, launch);
        case Method::tensor:
            return enqueue_tensor(problem, sm_count, launch);
        case Method::chunk:
            break;
    }
    switch (problem.dim) {
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
        case 9:
        case 10:
        case 11:
        case 12:
            return enqueue_chunk<12>(problem, sm_count, launch);
        default:
            return enqueue_chunk<16>(problem, sm_count, launch);
    }
}

}  // namespace ldm_fast::nearest
