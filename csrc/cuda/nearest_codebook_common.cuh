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

// A matrix of one vector per row, strides in elements.
template <class T>
struct Rows {
    const T* data;
    std::int64_t count;
    std::int64_t row_stride;
    std::int64_t column_stride;
    bool vectors;  // the kernel may read it 16 bytes at a time

    __device__ const T* at(std::int64_t row, int column) const {
        return data + row * row_stride + column * column_stride;
    }
};

template <class T>
struct Problem {
    Rows<T> queries;
    Rows<T> codes;
    int dim;
    std::int64_t codes_per_block;  // the range of one blockIdx.y, a multiple of the tile
    float* half_norms;             // a workspace of K floats, for d > 16
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
__device__ void widen(const Vector<T>& vector, float (&values)[Vector<T>::SIZE]) {
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

// One row of dim <= D numbers, filled up with zeros; zeros too where there is no such row.
template <int D, class T>
__device__ void load_row(const Rows<T>& rows, std::int64_t row, int dim, float (&values)[D]) {
    const T* const from = rows.at(row, 0);
#pragma unroll
    for (int i = 0; i < D; ++i) {
        values[i] = row < rows.count && (i == 0 || i < dim) ? to_float(from[i * rows.column_stride]) : 0.0f;
    }
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

__device__ inline Key make_key(float distance, int index) {
    if (is_nan(distance)) return NO_KEY;
    const std::uint32_t bits = __float_as_uint(distance + 0.0f);  // adding zero makes -0 into +0
    const std::uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return Key{ordered} << 32 | static_cast<std::uint32_t>(index);
}

__device__ inline int key_index(Key key) { return static_cast<int>(key & 0xffffffffu); }

__device__ inline float key_distance(Key key) {
    const std::uint32_t ordered = static_cast<std::uint32_t>(key >> 32);
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

template <bool MERGE>
__device__ void put_key(Key* out, Key key) {
    if constexpr (MERGE) {
        atomicMin(out, key);
    } else {
        *out = key;
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
    if (n >= problem.queries.count) return;
    const Key key = problem.out[n];
    problem.out[n] = key == NO_KEY ? 0 : key_index(key);  // no key: a row of nothing but NaN
}

}  // namespace ldm_fast::nearest
