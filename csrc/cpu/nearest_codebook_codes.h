// What every search of nearest_codebook shares: packed codes, blocks of rows, and the distance itself.
//
// s(n, k) = ½‖e_k‖² - ⟨z_n, e_k⟩ is float32 with fused multiply-adds in index order: norm = fma(e_i, e_i, norm) from 0,
// s = norm / 2, then s = fma(-z_i, e_i, s). Every instruction set and every search computes the same bits for a pair
// and returns the first code at the smallest distance, so the answer depends on neither.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd/vec.h"

namespace ldm::LDM_ISA {
namespace {

constexpr int ROWS = 4;             // of a tile
constexpr int64_t BLOCK_ROWS = 64;  // rows a thread works on at a time
static_assert(BLOCK_ROWS % ROWS == 0);

// Lanes are codes. Of the codes [k, k + W), coordinate i is the vector at data + (k * width + i * W), and the halved
// norms are at norms + k.
struct PackedCodes {
    const float *data, *norms;
    int64_t padded, width;
};

// Rows [first, first + count) of all batch * rows as float32, negated: coordinate i of row r is at row(r)[i * ROWS].
// The rows after the last one, up to BLOCK_ROWS, are zeros.
struct Block {
    int64_t first, count, width;
    const float* z;

    const float* row(int64_t r) const { return z + r / ROWS * ROWS * width + r % ROWS; }
};

// Steps through the rows of all samples, and tells where each begins in z.
struct Rows {
    const NearestCodebook& args;
    int64_t offset, left;  // left: rows up to the next sample

    Rows(const NearestCodebook& a, int64_t n)
        : args(a), offset(n / a.rows * a.z_stride[0] + n % a.rows * a.z_stride[1]), left(a.rows - n % a.rows) {}

    void step() {
        offset += args.z_stride[1];
        if (--left == 0) left = args.rows, offset += args.z_stride[0] - args.rows * args.z_stride[1];
    }
};

template <class T>
Block load_block(const NearestCodebook& a, int64_t number, float* z) {
    const int64_t first = number * BLOCK_ROWS, total = a.batch * a.rows;
    const int64_t count = total - first < BLOCK_ROWS ? total - first : BLOCK_ROWS;
    Rows row(a, first);
    for (int64_t r = 0; r < count; ++r, row.step()) {
        const T* const from = static_cast<const T*>(a.z) + row.offset;
        float* const to = z + r / ROWS * ROWS * a.width + r % ROWS;
        for (int64_t i = 0; i < a.width; ++i) to[i * ROWS] = -to_float(from[i * a.z_stride[2]]);
    }
    for (int64_t r = count; r < BLOCK_ROWS; ++r)
        for (int64_t i = 0; i < a.width; ++i) z[r / ROWS * ROWS * a.width + r % ROWS + i * ROWS] = 0.0f;
    return {first, count, a.width, z};
}

// Packs one vector of codes from number(j, i), which is coordinate i of lane j; lanes from `count` on get `filler` for
// their norms.
template <class GetRow>
void pack_vector(int64_t width, int64_t count, float filler, const GetRow& number, float* data, float* norms) {
    F norm = zero();
    for (int64_t i = 0; i < width; ++i) {
        float lane[W];
        for (int64_t j = 0; j < W; ++j) lane[j] = number(j, i);
        const F e = load(lane, Full{});
        store(data + i * W, e, Full{});
        norm = fused(e, e, norm);
    }
    store(norms, norm * 0.5f, Full{});
    for (int64_t j = count < 0 ? 0 : count; j < W; ++j) norms[j] = filler;
}

// Distances of one row (negated, coordinate i at z[i * stride]) to the codes of the vector that starts at code k.
inline F distances(const PackedCodes& codes, int64_t k, const float* z, int64_t stride) {
    F s = load(codes.norms + k, Full{});
    for (int64_t i = 0; i < codes.width; ++i)
        s = fused(set(z[i * stride]), load(codes.data + k * codes.width + i * W, Full{}), s);
    return s;
}

// The first lane that holds `value`, or W.
inline int first_equal(F v, float value) {
#if defined(__AVX512F__)
    return __builtin_ctz(_mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(value), _CMP_EQ_OQ) | 1u << W);
#elif defined(__AVX2__)
    return __builtin_ctz(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(value), _CMP_EQ_OQ)) | 1u << W);
#else
    int j = 0;
    while (j < W && !(v[j] == value)) ++j;
    return j;
#endif
}

// Bit j is set if a[j] <= b[j].
inline uint32_t at_most(F a, F b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)));
#else
    uint32_t bits = 0;
    for (int j = 0; j < W; ++j) bits |= static_cast<uint32_t>(a[j] <= b[j]) << j;
    return bits;
#endif
}

inline float smallest(F v) { return -largest(-v); }

// The searches that skip codes rely on bounds that hold for vectors up to this length; a NaN counts as longer.
constexpr float LARGEST_SQUARE = 0x1p120f;

// The length of a vector from the float32 sum of its d ≤ 2^13 squares, never below the true one: the factor 1 + 2^-10
// covers the rounding, and 2^-64 the squares that vanish.
inline float length_above(float square) { return __builtin_sqrtf(square) * (1.0f + 0x1p-10f) + 0x1p-64f; }

inline bool bounds_hold(const PackedCodes& codes, int64_t count) {
    bool hold = true;
    for (int64_t k = 0; k < count; ++k) hold &= 2.0f * codes.norms[k] <= LARGEST_SQUARE;
    return hold;
}

// Searches that may not pay are tried on a few rows. After each failure they pause for longer.
struct Patience {
    int64_t rest = 0, next = 1;

    bool try_now() { return rest == 0 || (--rest, false); }
    void failed() { rest = next, next = next < 64 ? 2 * next : 64; }
    void paid() { next = 1; }
};

}  // namespace
}  // namespace ldm::LDM_ISA
