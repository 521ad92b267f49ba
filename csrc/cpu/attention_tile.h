// The inner products of attention, for a tile of ROWS queries.
//
// Operands are rows of 32-bit cells along the dimension that is summed over. A cell is one float32 (Single), or two
// neighbouring bf16 that one AVX512-BF16 instruction multiplies and adds in float32 (Pair). With that the loops are the
// same: one cell of the left operand goes to all lanes, W cells of the right one are a vector.
#pragma once

#include "kernels.h"
#include "simd/vec.h"

namespace ldm::LDM_ISA {

constexpr int ROWS = 6;
constexpr int VECTORS = W == 16 ? 4 : 2;  // ROWS * VECTORS sums stay in registers

struct Single {
    static constexpr int numbers = 1;

    static F add(F a, F b, F sum) { return fma(a, b, sum); }

    // One cell from the numbers at i, of which `n` exist; the others count as 0.
    template <class T>
    static float cell(const T* p, int64_t stride, int64_t i, int64_t n) {
        return i < n ? to_float(p[i * stride]) : 0.0f;
    }

    // In place: the float32 at p[0, n) are the cells already.
    static void narrow(float*, int64_t) {}
};

#if defined(__AVX512BF16__)
struct Pair {
    static constexpr int numbers = 2;

    static F add(F a, F b, F sum) { return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

    static float cell(const bf16* p, int64_t stride, int64_t i, int64_t n) {
        const uint32_t low = 2 * i < n ? p[2 * i * stride].bits : 0,
                       high = 2 * i + 1 < n ? p[(2 * i + 1) * stride].bits : 0;
        return from_bits(low | high << 16);
    }

    // In place: n float32 at p become n / 2 cells; n is a multiple of W. Reads run ahead of the writes.
    static void narrow(float* p, int64_t n) {
        for (int64_t i = 0; i < n; i += W) {
            const __m256i half = round_bf16((__m512)load(p + i, Full{}));
            memcpy(p + i / 2, &half, sizeof half);
        }
    }
};
#endif

// sums[r][v] += Σ_i left[r * left_stride + i] · right[i * right_step + v * right_vector + lane], i < n.
template <class Cells, int V>
inline void multiply(const float* left, int64_t left_stride, const float* right, int64_t right_step,
                     int64_t right_vector, int64_t n, F (&sums)[ROWS][V]) {
    for (int64_t i = 0; i < n; ++i) {
        F b[V];
        for (int v = 0; v < V; ++v) b[v] = load(right + i * right_step + v * right_vector, Full{});
        for (int r = 0; r < ROWS; ++r) {
            const F a = set(left[r * left_stride + i]);
            for (int v = 0; v < V; ++v) sums[r][v] = Cells::add(a, b[v], sums[r][v]);
        }
    }
}

// scores[r][k] = scale · ⟨q_r, k_k⟩ for V vectors of keys. Keys are packed W at a time: cell i at keys + i * W.
template <class Cells, int V>
inline void score(const float* q, const float* keys, int64_t cells, float scale, float* scores, int64_t scores_stride) {
    F sums[ROWS][V] = {};
    multiply<Cells, V>(q, cells, keys, W, cells * W, cells, sums);
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < V; ++v) store(scores + r * scores_stride + v * W, sums[r][v] * scale, Full{});
}

// out[r] = factor[r] · out[r] + Σ_k p[r][k] · value_k for V vectors of columns. The sum starts at zero, not at what is
// there: a chain of roundings is then as long as a chunk, not as long as the sequence.
template <class Cells, int V>
inline void accumulate(const float* p, int64_t p_stride, const float* values, int64_t values_step, int64_t cells,
                       const float* factor, float* out, int64_t out_stride) {
    F sums[ROWS][V] = {};
    multiply<Cells, V>(p, p_stride, values, values_step, W, cells, sums);
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < V; ++v) {
            float* const to = out + r * out_stride + v * W;
            store(to, fused(load(to, Full{}), set(factor[r]), sums[r][v]), Full{});
        }
}

template <class Cells>
inline void accumulate_all(const float* p, int64_t p_stride, const float* values, int64_t padded_width, int64_t cells,
                           const float* factor, float* out) {
    int64_t c = 0;
    for (; c + VECTORS * W <= padded_width; c += VECTORS * W)
        accumulate<Cells, VECTORS>(p, p_stride, values + c, padded_width, cells, factor, out + c, padded_width);
    const int64_t left = (padded_width - c) / W;
    if (left == 1) accumulate<Cells, 1>(p, p_stride, values + c, padded_width, cells, factor, out + c, padded_width);
    if (left == 2) accumulate<Cells, 2>(p, p_stride, values + c, padded_width, cells, factor, out + c, padded_width);
    if (left == 3) accumulate<Cells, 3>(p, p_stride, values + c, padded_width, cells, factor, out + c, padded_width);
}

}  // namespace ldm::LDM_ISA
