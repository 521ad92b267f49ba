// One vector type for every instruction set: F holds W floats, and +, -, *, / work lane by lane (GCC and Clang
// vectors).
//
// load and store convert bf16 and f16 on the way. They take the number of lanes as Full or as Part{n}, 0 < n < W: a
// Part touches no memory past its n elements, and load fills the other lanes with zeros. Loops over ranges of any
// length use each_vector, which calls its body with Full as often as it can and once with Part for the rest.
//
// min and max return the second argument if either is NaN, as the x86 instructions do.
#pragma once

#include <cstdint>
#include <cstring>

#include "../dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ldm::LDM_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using F = float __attribute__((vector_size(W * 4)));
using I = int32_t __attribute__((vector_size(W * 4)));

struct Full {
    static constexpr int n = W;
};
struct Part {
    int n;
};

template <class Body>
inline void each_vector(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(i, Full{});
    if (i < n) body(i, Part{static_cast<int>(n - i)});
}

inline F set(float value) {
#if defined(__AVX512F__)
    return (F)_mm512_set1_ps(value);
#elif defined(__AVX2__)
    return (F)_mm256_set1_ps(value);
#else
    F v;
    for (int i = 0; i < W; ++i) v[i] = value;
    return v;
#endif
}
inline F zero() { return F{}; }
inline F as_float(I v) { return reinterpret_cast<F>(v); }

// ---- loads and stores ----

inline F load(const float* p, Full) {
    F v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, F v, Full) { memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)

inline __mmask16 lanes(Part part) { return static_cast<__mmask16>((1u << part.n) - 1u); }

inline __m256i round_bf16(__m512 v) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}

inline F widen_bf16(__m256i bits) { return (F)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

inline F load(const bf16* p, Full) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
inline F load(const f16* p, Full) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F load(const float* p, Part n) { return (F)_mm512_maskz_loadu_ps(lanes(n), p); }
inline F load(const bf16* p, Part n) { return widen_bf16(_mm256_maskz_loadu_epi16(lanes(n), p)); }
inline F load(const f16* p, Part n) { return (F)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p)); }

inline __m256i round_f16(F v) { return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store(bf16* p, F v, Full) { _mm256_storeu_si256((__m256i*)p, round_bf16((__m512)v)); }
inline void store(f16* p, F v, Full) { _mm256_storeu_si256((__m256i*)p, round_f16(v)); }
inline void store(float* p, F v, Part n) { _mm512_mask_storeu_ps(p, lanes(n), (__m512)v); }
inline void store(bf16* p, F v, Part n) { _mm256_mask_storeu_epi16(p, lanes(n), round_bf16((__m512)v)); }
inline void store(f16* p, F v, Part n) { _mm256_mask_storeu_epi16(p, lanes(n), round_f16(v)); }

#else

#if defined(__AVX2__)

inline F load(const bf16* p, Full) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return (F)_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

inline F load(const f16* p, Full) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

inline void store(bf16* p, F v, Full) {
    const __m256i bits = (__m256i)v;
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(words, words);  // lane by lane: 0 1 0 1 | 2 3 2 3 in quarters
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

inline void store(f16* p, F v, Full) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

template <class T>
inline F load(const T* p, Full) {
    F v;
    for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
    return v;
}

template <class T>
inline void store(T* p, F v, Full) {
    for (int i = 0; i < W; ++i) from_float(v[i], p[i]);
}

#endif

template <class T>
inline F load(const T* p, Part part) {
    T buffer[W] = {};
    memcpy(buffer, p, part.n * sizeof(T));
    return load(buffer, Full{});
}

template <class T>
inline void store(T* p, F v, Part part) {
    T buffer[W];
    store(buffer, v, Full{});
    memcpy(p, buffer, part.n * sizeof(T));
}

#endif

// ---- arithmetic ----

#if defined(__AVX512F__)
inline F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
inline F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
inline F only(F v, Part n) { return (F)_mm512_maskz_mov_ps(lanes(n), (__m512)v); }
inline float sum(F v) { return _mm512_reduce_add_ps((__m512)v); }
inline float largest(F v) { return _mm512_reduce_max_ps((__m512)v); }
#else
#if defined(__AVX2__)
inline F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
inline F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
#else
// Fused if the machine can do that at the price of a multiplication; otherwise the rounding in between does no harm.
inline F fma(F a, F b, F c) {
#if defined(__FP_FAST_FMAF) || defined(__aarch64__)
    for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

inline F min(F a, F b) { return a < b ? a : b; }
inline F max(F a, F b) { return a > b ? a : b; }
#endif

inline F only(F v, Part part) {
    for (int i = 0; i < W; ++i) v[i] = i < part.n ? v[i] : 0.0f;
    return v;
}

// Pairwise, the same tree as the reduction of AVX-512: W lanes, then W / 2, ...
inline float sum(F v) {
    float lane[W];
    memcpy(lane, &v, sizeof v);
    for (int width = W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
}

inline float largest(F v) {
    float lane[W];
    memcpy(lane, &v, sizeof v);
    for (int width = W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
}
#endif

inline F only(F v, Full) { return v; }

// a b + c rounded once. The product is exact in float64. If the sum is not, it gets an odd last digit (rounding to
// odd), so that it cannot be taken for the midpoint of two float32.
inline float fused_lane(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, sum = product + c, part = sum - product;
    const double lost = (product - (sum - part)) + (c - part);  // exact; NaN for an infinite sum
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    const bool inexact = lost > 0.0 || lost < 0.0;
    if (inexact && (bits & 1) == 0) bits += (lost > 0.0) == (sum > 0.0) ? uint64_t{1} : ~uint64_t{0};
    double odd;
    memcpy(&odd, &bits, sizeof odd);
    return static_cast<float>(odd);
}

// a b + c rounded once, at any price: for results that must not depend on the instruction set.
inline F fused(F a, F b, F c) {
#if defined(__AVX2__) || defined(__FP_FAST_FMAF) || defined(__aarch64__)
    return fma(a, b, c);
#else
    for (int i = 0; i < W; ++i) c[i] = fused_lane(a[i], b[i], c[i]);
    return c;
#endif
}

// Minimax polynomials of 2^f on [0, 1), relative errors 7.5e-5, 2.6e-6, 7.5e-8 and 2e-9; the last is exactly 1 at 0.
constexpr float EXP2_POLYNOMIALS[4][7] = {
    {0.07802452332f, 0.226067159f, 0.6958335367f, 0.9999252192f},
    {0.013534168f, 0.05201146108f, 0.2414427561f, 0.6930038348f, 1.000002593f},
    {1.877576683e-3f, 8.989340141e-3f, 5.582631793e-2f, 2.401536171e-1f, 6.931530732e-1f, 9.999999251e-1f},
    {2.161291512e-4f, 1.246784639e-3f, 9.675451574e-3f, 5.548528061e-2f, 2.402293056e-1f, 6.931470444e-1f, 1.0f},
};

// t = whole + fraction; only times_power_of_2 needs `whole`.
inline void split(F t, F& whole, F& fraction) {
#if defined(__AVX512F__)
    whole = t;
    fraction = (F)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    t = min(set(128.0f), max(set(-150.0f), t));
#if defined(__AVX2__)
    whole = (F)_mm256_floor_ps((__m256)t);
#else
    const F nearest = (t + 0x1.8p23f) - 0x1.8p23f;
    whole = nearest > t ? nearest - 1.0f : nearest;
#endif
    fraction = t - whole;
#endif
}

inline F times_power_of_2(F p, F whole) {
#if defined(__AVX512F__)
    return (F)_mm512_scalef_ps((__m512)p, (__m512)whole);  // which takes the floor itself
#else
    // 2^n in two factors, so that results below the smallest normal number come out right.
    const I n = __builtin_convertvector(whole, I), half = n >> 1;
    return p * as_float((half + 127) << 23) * as_float((n - half + 127) << 23);
#endif
}

#if defined(__AVX512F__)
// 2^(i/32) times 1 + 5.26e-8, which balances the error of 1 + C1 f + C2 f² on [0, 1/32), 5.3e-8.
alignas(64) constexpr float EXP2_TABLE[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5588p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a8p+0f,
    0x1.29e9e0p+0f, 0x1.306fe2p+0f, 0x1.371a74p+0f, 0x1.3dea66p+0f, 0x1.44e088p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f,
    0x1.5ab080p+0f, 0x1.6247ecp+0f, 0x1.6a09e8p+0f, 0x1.71f760p+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace56p+0f,
    0x1.93737cp+0f, 0x1.9c491ap+0f, 0x1.a5503cp+0f, 0x1.ae89fcp+0f, 0x1.b7f770p+0f, 0x1.c199c0p+0f, 0x1.cb7210p+0f,
    0x1.d58190p+0f, 0x1.dfc974p+0f, 0x1.ea4afcp+0f, 0x1.f50768p+0f,
};

// factor 2^t + addend, by a table in two registers and a short polynomial: t = whole + i/32 + f.
template <int n>
[[gnu::always_inline]] inline void exp2_by_table(const F (&t)[n], F (&result)[n], float factor, float addend) {
    constexpr float C1 = 0.69311655f, C2 = 0.2428406f;
    const __m512 low = _mm512_load_ps(EXP2_TABLE), high = _mm512_load_ps(EXP2_TABLE + 16);
    F f[n];
    __m512i i[n];  // in the lowest bits: a sum of this size has its thirty-seconds there
    for (int k = 0; k < n; ++k)
        f[k] = (F)_mm512_reduce_ps((__m512)t[k], 5 << 4 | _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    for (int k = 0; k < n; ++k)
        i[k] = _mm512_castps_si512(
            _mm512_add_round_ps((__m512)t[k], _mm512_set1_ps(0x1.8p18f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    for (int k = 0; k < n; ++k) result[k] = fma(fma(f[k], set(factor * C2), set(factor * C1)), f[k], set(factor));
    for (int k = 0; k < n; ++k) result[k] = times_power_of_2(result[k], t[k]);
    for (int k = 0; k < n; ++k) result[k] = fma(result[k], (F)_mm512_permutex2var_ps(low, i[k], high), set(addend));
}
#endif

// factor 2^t + addend of n vectors, step by step for all of them, so that one vector is computed while another waits
// for its previous step. For every float: addend at -inf, inf from 128 on, NaN at NaN; the relative error of 2^t is
// below 1.2e-7 with degree 6 and below 2e-7 with 5. With t = whole + f, 2^f is a polynomial, so a constant factor costs
// nothing.
template <int degree, int n>
[[gnu::always_inline]] inline void exp2(const F (&t)[n], F (&result)[n], float factor, float addend) {
#if defined(__AVX512F__)
    if constexpr (degree == 5) return exp2_by_table(t, result, factor, addend);
#endif
    const float (&c)[7] = EXP2_POLYNOMIALS[degree - 3];
    F whole[n], f[n];
    for (int k = 0; k < n; ++k) split(t[k], whole[k], f[k]), result[k] = set(factor * c[0]);
    for (int i = 1; i <= degree; ++i)
        for (int k = 0; k < n; ++k) result[k] = fma(result[k], f[k], set(factor * c[i]));
    for (int k = 0; k < n; ++k) result[k] = times_power_of_2(result[k], whole[k]) + addend;
}

[[gnu::always_inline]] inline F exp2(F t) {
    const F of[1] = {t};
    F result[1];
    exp2<6>(of, result, 1.0f, 0.0f);
    return result[0];
}

constexpr float LOG2_E = 0x1.715476p0f;

// Rounding x log2(e) adds a relative error of |x| 7.5e-8, which no sum of exponentials and no sigmoid can notice.
inline F exp(F x) { return exp2(x * LOG2_E); }

}  // namespace ldm::LDM_ISA
