// Two vectors at a time, 2 W neighbours in whatever order costs least, for loops that treat all elements alike. With
// AVX-512, bf16 comes apart into the elements with even and with odd numbers, which is half the work of widening both
// halves.
//
// each_pair covers a range: it calls its body with Pairs<at_once> as often as it can, then with Pairs<1>, and at the
// end with One. Each of these has a number of vectors, n, and loads and stores arrays of n vectors.
#pragma once

#include "stream.h"

namespace ldm::LDM_ISA {

template <int pairs>
struct Pairs {
    static constexpr int n = 2 * pairs;
    static constexpr Full lanes{};
};

template <class Lanes>
struct One {
    static constexpr int n = 1;
    Lanes lanes;
};

template <int at_once = 1, class Body>
inline void each_pair(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + 2 * at_once * W <= n; i += 2 * at_once * W) body(i, Pairs<at_once>{});
    for (; at_once > 1 && i + 2 * W <= n; i += 2 * W) body(i, Pairs<1>{});
    each_vector(n - i, [&](int64_t j, auto lanes) { body(i + j, One<decltype(lanes)>{lanes}); });
}

template <class T>
inline void load_pair(const T* p, F& a, F& b) {
    a = load(p, Full{}), b = load(p + W, Full{});
}

template <bool streamed, class T>
inline void store_pair(T* p, F a, F b) {
    store_or_stream<streamed>(p, a, Full{}), store_or_stream<streamed>(p + W, b, Full{});
}

template <class T, class Lanes>
inline void load(const T* p, F (&v)[1], One<Lanes> one) {
    v[0] = load(p, one.lanes);
}

template <bool streamed, class T, class Lanes>
inline void store(T* p, const F (&v)[1], One<Lanes> one) {
    store_or_stream<streamed>(p, v[0], one.lanes);
}

// Puts the pairs of a row of float32 into the order in which pairs of T come, so that they meet lane by lane; and back.
template <class T>
inline void to_order_of(float*, int64_t) {}
template <class T>
inline void from_order_of(float*, int64_t) {}

#if defined(__AVX512F__)

inline void load_pair(const bf16* p, F& even, F& odd) {
    const __m512i bits = _mm512_loadu_si512(p);
    even = (F)_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    odd = (F)_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

inline __m512i round_pair(F even, F odd) {
#if defined(__AVX512BF16__)
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    const __m512i order =
        _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                          0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    return _mm512_permutexvar_epi16(order, halves);
#else
    const __m512i low = _mm512_cvtepu16_epi32(round_bf16((__m512)even));
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(round_bf16((__m512)odd)), 16));
#endif
}

template <bool streamed>
inline void store_pair(bf16* p, F even, F odd) {
    const __m512i bits = round_pair(even, odd);
    if constexpr (streamed) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
    } else {
        _mm512_storeu_si512(p, bits);
    }
}

inline void permute_pairs(float* row, int64_t n, __m512i first, __m512i second) {
    for (float* p = row; p + 2 * W <= row + n; p += 2 * W) {
        const __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + W);
        _mm512_storeu_ps(p, _mm512_permutex2var_ps(a, first, b));
        _mm512_storeu_ps(p + W, _mm512_permutex2var_ps(a, second, b));
    }
}

template <>
inline void to_order_of<bf16>(float* row, int64_t n) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    permute_pairs(row, n, even, _mm512_add_epi32(even, _mm512_set1_epi32(1)));
}

template <>
inline void from_order_of<bf16>(float* row, int64_t n) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    permute_pairs(row, n, low, _mm512_add_epi32(low, _mm512_set1_epi32(8)));
}

#endif

template <class T, int pairs>
inline void load(const T* p, F (&v)[2 * pairs], Pairs<pairs>) {
    for (int k = 0; k < 2 * pairs; k += 2) load_pair(p + k * W, v[k], v[k + 1]);
}

template <bool streamed, class T, int pairs>
inline void store(T* p, const F (&v)[2 * pairs], Pairs<pairs>) {
    for (int k = 0; k < 2 * pairs; k += 2) store_pair<streamed>(p + k * W, v[k], v[k + 1]);
}

}  // namespace ldm::LDM_ISA
