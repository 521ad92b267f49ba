// What the kernels of nearest_codebook share: the arguments, reading elements, the distance, the key and its order.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace ldm_fast::nearest {

using Key = unsigned long long;  // the type that atomicMin takes for 64 bits

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int THREADS = 128;  // per block, all kernels
constexpr Key NO_KEY = ~Key{0};

struct Grid {
    std::int64_t x;  // blocks of queries, codes or outputs
    std::int64_t y;  // ranges of codes
};

__host__ __device__ constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The vectors to find codes for, with strides in elements. In a channel-first map (B, d, S) the rows of one batch
// follow each other, and the next batch begins a batch_stride further on.
template <class T>
struct Queries {
    const T* data;
    std::int64_t count;
    std::int64_t per_batch;  // equal to count if one row stride reaches them all
    std::int64_t batch_stride;
    std::int64_t row_stride;
    std::int64_t column_stride;
    bool vectors;  // every row can be read 16 bytes at a time

    // If n has 32 bits: dividing 64 takes several times as long.
    __device__ const T* row(std::uint32_t n) const {
        if (per_batch >= count) return data + n * row_stride;
        const std::uint32_t batch = n / static_cast<std::uint32_t>(per_batch);
        return data + batch * batch_stride + (n - batch * per_batch) * row_stride;
    }
    __device__ const T* row(std::int64_t n) const {
        if (count <= 0xffffffff) return row(static_cast<std::uint32_t>(n));
        if (per_batch >= count) return data + n * row_stride;
        const std::int64_t batch = n / per_batch;
        return data + batch * batch_stride + (n - batch * per_batch) * row_stride;
    }
};

// The codebook, one code per row, strides in elements.
template <class T>
struct Codes {
    const T* data;
    std::int64_t count;
    std::int64_t row_stride;
    std::int64_t column_stride;
    bool vectors;  // every row (for d <= 16: the whole codebook in one piece) can be read 16 bytes at a time

    __device__ const T* row(std::int64_t k) const { return data + k * row_stride; }
};

// How long a row is, and how far its bfloat16 form is from it, both rounded up.
struct alignas(8) Bound {
    float size;
    float error;
};

// Eight neighbouring bfloat16 of one row.
struct alignas(16) Eight {
    std::uint32_t pairs[4];
};

// What nearest_tensor works on: the queries of one slab and the codes as bfloat16, in the order in which it reads them.
struct Operands {
    Eight* queries;
    Eight* codes;
    Bound* query_bounds;       // one per query of the slab
    Bound* code_bounds;        // one per WARP codes
    std::int64_t first_query;  // of the slab
    int slices;                // of a row
    float slack;               // rounding of the sums, relative
    float floor;               // and absolute
};

template <class T>
struct Problem {
    Queries<T> queries;
    Codes<T> codes;
    int dim;
    std::int64_t codes_per_block;  // the range of one blockIdx.y, a multiple of the tile
    float* half_norms;             // one per code, for d > 16
    Operands operands;             // for nearest_tensor
    Key* out;                      // N indices; keys until the last kernel
};

struct Range {
    std::int64_t first;
    std::int64_t end;
};

template <class T>
__device__ Range code_range(const Problem<T>& problem) {
    const std::int64_t first = blockIdx.y * problem.codes_per_block;
    const std::int64_t end = first + problem.codes_per_block;
    return {first, end < problem.codes.count ? end : problem.codes.count};
}

#ifdef __CUDACC__
template <class T>
__device__ T& shared_memory() {
    __shared__ T memory;
    return memory;
}
#endif

// ---- elements

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
struct alignas(16) Vector {
    static constexpr int SIZE = 16 / sizeof(T);
    T values[SIZE];
};

template <class T>
__device__ Vector<T> load_vector(const T* from) {
    return *reinterpret_cast<const Vector<T>*>(from);
}

template <class T>
__device__ void widen(const Vector<T>& vector, float* values) {
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; ++i) values[i] = to_float(vector.values[i]);
}

__device__ inline void load_four(const float* from, float* to) {
    const Vector<float> vector = load_vector(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = vector.values[i];
}

__device__ inline void store_four(float* to, const float* from) {
    *reinterpret_cast<Vector<float>*>(to) = {from[0], from[1], from[2], from[3]};
}

// Loads COUNT numbers of a row that has `left` more; after these, zeros.
template <int COUNT, class T>
__device__ void load_columns(const T* from, std::int64_t stride, bool vectors, int left, float (&values)[COUNT]) {
    constexpr int SIZE = Vector<T>::SIZE;
    if constexpr (COUNT % SIZE == 0) {
        if (vectors && left >= COUNT) {
#pragma unroll
            for (int i = 0; i < COUNT; i += SIZE) widen(load_vector(from + i), &values[i]);
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = i < left ? to_float(from[i * stride]) : 0.0f;
}

// ---- the distance

template <int D>
__device__ float half_norm(const float* code) {
    float norm = 0.0f;
#pragma unroll
    for (int i = 0; i < D; ++i) norm = fmaf(code[i], code[i], norm);
    return 0.5f * norm;
}

template <int D>
__device__ float distance(float half_norm, const float* query, const float* code) {
#pragma unroll
    for (int i = 0; i < D; ++i) half_norm = fmaf(-query[i], code[i], half_norm);
    return half_norm;
}

__device__ inline bool is_nan(float value) { return value != value; }

// ---- the key: smaller distance, smaller key; equal distances, the lower index

// Bits in the order of the numbers, except for NaN.
__device__ inline std::uint32_t to_ordered(float value) {
    const std::uint32_t bits = __float_as_uint(value + 0.0f);  // adding zero turns -0 into +0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float from_ordered(std::uint32_t ordered) {
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ inline Key make_key(float distance, int index) {
    if (is_nan(distance)) return NO_KEY;
    return Key{to_ordered(distance)} << 32 | static_cast<std::uint32_t>(index);
}

__device__ inline int key_index(Key key) { return static_cast<int>(key & 0xffffffffu); }

__device__ inline float key_distance(Key key) { return from_ordered(static_cast<std::uint32_t>(key >> 32)); }

// A row of nothing but NaN has no key, and index 0.
__device__ inline Key to_index(Key key) { return key == NO_KEY ? 0 : key & 0xffffffffu; }

// The result of one range of codes for query n: merged with those of the others as a key, or, if there is no other,
// `alone`. All threads take the same branch. Compiled for each branch, the kernels were twice as many and needed as
// many registers.
template <class T>
__device__ void put_result(const Problem<T>& problem, std::int64_t n, Key key, Key alone) {
    if (problem.codes_per_block < problem.codes.count) {
        atomicMin(&problem.out[n], key);
    } else {
        problem.out[n] = alone;
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS) reset_keys(Problem<T> problem) {
    const std::int64_t n = std::int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (n < problem.queries.count) problem.out[n] = NO_KEY;
}

template <class T>
__global__ void __launch_bounds__(THREADS) keys_to_indices(Problem<T> problem) {
    const std::int64_t n = std::int64_t{blockIdx.x} * THREADS + threadIdx.x;
    if (n < problem.queries.count) problem.out[n] = to_index(problem.out[n]);
}

}  // namespace ldm_fast::nearest
