// Two vectors at a time, 2 W neighbours in whatever order costs least, for loops that treat all elements alike. With
// AVX-512, bf16 comes apart into the elements with even and with odd numbers: half the work of widening both halves.
#pragma once

#include "stream.h"

namespace ldm::LDM_ISA {

template <class T>
inline void load_pair(const T* p, F& a, F& b) {
    a = load(p, Full{}), b = load(p + W, Full{});
}

template <bool streamed, class T>
inline void store_pair(T* p, F a, F b) {
    store_or_stream<streamed>(p, a, Full{}), store_or_stream<streamed>(p + W, b, Full{});
}

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

#endif

}  // namespace ldm::LDM_ISA
