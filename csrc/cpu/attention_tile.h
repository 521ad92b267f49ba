// The inner loops of attention for a tile of V vectors of W queries, one query to a lane.
//
// With queries in the lanes, the softmax needs no reduction across lanes, and neither the keys nor the head width are
// padded to vectors: 77 keys and width 40 cost no more than that. Both products are one loop (multiply): W queries of
// the tile are a vector, and one cell of the other operand, a key or a value, is broadcast to all lanes. SIDE such
// cells lie side by side in a panel, so SIDE * V sums stay in registers.
//
// A cell is 32 bits along the dimension that is summed over: one float32 (Single), or two neighbouring bf16 that one
// AVX512-BF16 instruction multiplies and adds in float32 (Pair).
#pragma once

#include "kernels.h"
#include "simd/vec.h"

namespace ldm::LDM_ISA {

constexpr int VECTORS = 2;             // of queries in a full tile; the last tile of a sequence may have one
constexpr int SIDE = W == 16 ? 8 : 4;  // divides W
constexpr int64_t LONGEST_CHAIN = 96;  // cells; longer sums are split, which also keeps their operands in L1
constexpr float LN_2 = 0x1.62e430p-1f;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline float infinity() { return __builtin_inff(); }
constexpr float LOWEST = -0x1.fffffep127f;  // the base before any key, and of masked keys: -inf less this is no NaN

// ln x within 1e-7 (1 + |ln x|) for positive normal numbers; NaN and inf give themselves. With x = 2^e (1 + f) and f in
// [-1/3, 1/3), ln(1 + f) = f + f² p(f), where p is a minimax polynomial.
inline F log(F x) {
    constexpr float c[] = {0.1458464265f, -0.1562902331f, 0.1386712044f, -0.1636529863f,
                           0.2002044022f, -0.2501101196f, 0.3333299458f, -0.4999988079f};
    const I bits = (I)x, e = (bits - 0x3f2aaaab) >> 23;
    const F f = as_float(bits - (e << 23)) - 1.0f;
    F p = set(c[0]);
    for (int i = 1; i < 8; ++i) p = fma(p, f, set(c[i]));
    return x < infinity() ? fma(__builtin_convertvector(e, F), set(LN_2), fma(p * f, f, f)) : x;
}

struct Single {
    static constexpr int numbers = 1;

    static F add(F a, F b, F sum) { return fma(a, b, sum); }

    // W cells of a row of n numbers, from number i on; cells past the end are 0.
    template <class T>
    static F cells(const T* row, int64_t i, int64_t n) {
        return n - i >= W ? load(row + i, Full{}) : load(row + i, Part{static_cast<int>(n - i)});
    }

    // The cells of `row` and of the row after it. A cell is one number here, so these are the cells of `row`.
    template <class T>
    static F columns(const T* row, const T*, int64_t i, int64_t n) {
        return cells(row, i, n);
    }

    static F negative(F cells) { return -cells; }
    static F weight(F t) { return exp2(t); }
};

#if defined(__AVX512BF16__)
struct Pair {
    static constexpr int numbers = 2;

    static F add(F a, F b, F sum) { return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

    static F cells(const bf16* row, int64_t i, int64_t n) {
        if (n - i >= 2 * W) return (F)_mm512_loadu_si512(row + i);
        return (F)_mm512_maskz_loadu_epi16((__mmask32{1} << (n - i)) - 1, row + i);
    }

    // W columns of two rows, the first row in the low halves. If there is no second row (null), the high halves are 0.
    static F columns(const bf16* row, const bf16* next, int64_t i, int64_t n) {
        const __mmask16 some = n - i >= W ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row + i));
        if (next == nullptr) return (F)low;
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, next + i));
        return (F)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }

    // Lane by lane, low and high side by side, rounded.
    static F both(F low, F high) {
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return (F)_mm512_permutexvar_epi16(order, halves);
    }

    // Stores the lanes side by side, rounded.
    template <int V>
    static void store_lanes(float* to, const F (&lanes)[V]) {
        for (int v = 0; v < V; ++v) _mm256_storeu_si256((__m256i*)(to + v * W / 2), round_bf16((__m512)lanes[v]));
    }

    static F negative(F cells) { return (F)_mm512_xor_si512((__m512i)cells, _mm512_set1_epi32(int(0x80008000u))); }

    // 2^t with a relative error below 3e-6, a thousandth of the rounding to bf16 that follows; exactly 1 at 0, like
    // exp2.
    static F weight(F t) {
        const F f = (F)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        F p = fma(set(0.01342668384f), f, set(0.05224247277f));
        p = fma(p, f, set(0.2412801981f));
        p = fma(p, f, set(0.6930448413f));
        p = fma(p, f, set(1.0f));
        return (F)_mm512_scalef_ps((__m512)p, (__m512)t);  // which takes floor(t) itself
    }
};
#endif

// sums[s][v] += Σ_i panel[i * SIDE + s] · tile[i][v], i < n.
//
// Loops over an array of sums are unrolled by a pragma: left to itself, GCC may unroll them too late for the array to
// stay in registers.
template <class Cells, int S, int V>
inline void multiply(const float* panel, const float* tile, int64_t n, F (&sums)[S][V]) {
    for (int64_t i = 0; i < n; ++i) {
        F lanes[V];
        for (int v = 0; v < V; ++v) lanes[v] = load(tile + (i * V + v) * W, Full{});
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
            const F cell = set(panel[i * SIDE + s]);
            for (int v = 0; v < V; ++v) sums[s][v] = Cells::add(cell, lanes[v], sums[s][v]);
        }
    }
}

// Rows in memory that will soon be needed, fetched into L2 a few at a time while something else is computed. They lie
// too far apart for the hardware to notice that they are used in order, and fetched all at once they would hold up
// loads.
struct Rows {
    const char* next = nullptr;
    int64_t stride = 0, bytes = 0, count = 0;
};

struct Ahead {
    Rows rows[3];
    int64_t share = 0;

    void fetch() {
        int64_t left = share;
        for (Rows& r : rows)
            for (; left > 0 && r.count > 0; --left, --r.count, r.next += r.stride)
                for (int64_t byte = 0; byte < r.bytes; byte += 64) __builtin_prefetch(r.next + byte, 0, 2);
    }
};

// scores[k] += ⟨k_k, q⟩ for the first S keys of a panel; if `first`, the old scores are overwritten.
template <class Cells, int S, int V>
inline void score_panel(const float* panel, const float* q, int64_t cells, bool first, float* scores) {
    F sums[S][V] = {};
    multiply<Cells>(panel, q, cells, sums);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s)
        for (int v = 0; v < V; ++v) {
            float* const at = scores + (s * V + v) * W;
            store(at, first ? sums[s][v] : load(at, Full{}) + sums[s][v], Full{});
        }
}

// The last panel has S keys. There is a function for each S, so that no sums are computed for keys that do not exist.
template <class Cells, int S, int V>
inline void score_last(const float* panel, const float* q, int64_t cells, bool first, float* scores, int64_t n) {
    if constexpr (S > 0) {
        if (n == S)
            score_panel<Cells, S, V>(panel, q, cells, first, scores);
        else
            score_last<Cells, S - 1, V>(panel, q, cells, first, scores, n);
    }
}

// scores[k] = ⟨k_k, q⟩ for n keys. The panels follow one another, each `cells` long.
template <class Cells, int V>
inline void score(const float* q, const float* keys, int64_t cells, int64_t n, float* scores, Ahead& ahead) {
    const int64_t parts = (cells + LONGEST_CHAIN - 1) / LONGEST_CHAIN, step = (cells + parts - 1) / parts;
    for (int64_t i = 0; i < cells; i += step) {
        const int64_t length = smaller(step, cells - i);
        const float *const tile = q + i * V * W, *panel = keys + i * SIDE;
        int64_t k = 0;
        for (; k + SIDE <= n; k += SIDE, panel += SIDE * cells) {
            ahead.fetch();
            score_panel<Cells, SIDE, V>(panel, tile, length, i == 0, scores + k * V * W);
        }
        score_last<Cells, SIDE - 1, V>(panel, tile, length, i == 0, scores + k * V * W, n - k);
    }
}

// out[c] = factor · out[c] + Σ_k weights[k] · value_k[c] for all columns, a panel of them at a time. Calls done(c) when
// the columns before c are finished. The sum starts at zero, not at out[c], so that a chain of roundings is only as
// long as a chunk, not as long as the sequence.
template <class Cells, int V, class Done>
inline void accumulate(const float* weights, const float* values, int64_t values_stride, int64_t cells, int64_t columns,
                       bool first, const F (&factor)[V], float* out, Ahead& ahead, const Done& done) {
    for (int64_t c = 0; c < columns; c += SIDE, values += values_stride, out += SIDE * V * W) {
        ahead.fetch();
        F sums[SIDE][V] = {};
        multiply<Cells>(values, weights, cells, sums);
#pragma GCC unroll 8
        for (int s = 0; s < SIDE; ++s)
            for (int v = 0; v < V; ++v) {
                float* const at = out + (s * V + v) * W;
                store(at, first ? sums[s][v] : fma(load(at, Full{}), factor[v], sums[s][v]), Full{});
            }
        done(c + SIDE);
    }
}

// to[r][c] = inverse[r] · Σ_i weights[i][r] · values[i][c] for V vectors of columns and SIDE queries, of which `rows`
// exist. A row of weights has L queries.
template <class Cells, int L, int V, class T>
inline void weighted_rows(const float* weights, const float* values, int64_t values_stride, int64_t cells,
                          const float* inverse, int64_t rows, T* to, int64_t stride) {
    F sums[SIDE][V] = {};
    for (int64_t i = 0; i < cells; ++i) {
        F columns[V];
        for (int v = 0; v < V; ++v) columns[v] = load(values + i * values_stride + v * W, Full{});
#pragma GCC unroll 8
        for (int s = 0; s < SIDE; ++s) {
            const F cell = set(weights[i * L + s]);
            for (int v = 0; v < V; ++v) sums[s][v] = Cells::add(cell, columns[v], sums[s][v]);
        }
    }
#pragma GCC unroll 8
    for (int s = 0; s < SIDE; ++s)
        if (s < rows)
            for (int v = 0; v < V; ++v) store(to + s * stride + v * W, sums[s][v] * inverse[s], Full{});
}

// Replaces the scores of n keys by their weights, as cells for accumulate: 2^(scale · score - base), where base is the
// largest scale · score so far, rounded. Updates base and sum, which have one lane for each query; `factor` is what
// everything summed under the old base has to be multiplied by. Rounding base does no harm, because all weights share
// it.
template <class Cells, int V>
inline void soften(float* scores, int64_t n, float scale, F (&base)[V], F (&sum)[V], F (&factor)[V]) {
    F total[V] = {}, largest[V];
    for (int v = 0; v < V; ++v) largest[v] = load(scores + v * W, Full{});
    for (int64_t k = 1; k < n; ++k)
        for (int v = 0; v < V; ++v) largest[v] = max(load(scores + (k * V + v) * W, Full{}), largest[v]);
    for (int v = 0; v < V; ++v) {
        const F next = max(largest[v] * scale, base[v]);
        factor[v] = exp2(base[v] - next);
        base[v] = next;
    }
    const auto weight = [&](int64_t k, int v) {
        const F w = Cells::weight(fma(load(scores + (k * V + v) * W, Full{}), set(scale), -base[v]));
        total[v] += w;
        return w;
    };
    if constexpr (Cells::numbers == 1) {
        for (int64_t k = 0; k < n; ++k)
            for (int v = 0; v < V; ++v) store(scores + (k * V + v) * W, weight(k, v), Full{});
    } else {
        for (int64_t k = 0; k < n; k += 2)
            for (int v = 0; v < V; ++v) {
                const F low = weight(k, v);
                store(scores + (k / 2 * V + v) * W, Cells::both(low, k + 1 < n ? weight(k + 1, v) : zero()), Full{});
            }
    }
    for (int v = 0; v < V; ++v) sum[v] = fma(sum[v], factor[v], total[v]);
}

}  // namespace ldm::LDM_ISA
