// Stores that go past the caches: a line that is written as a whole need not be read first, and the caches keep what
// they hold. For results larger than what the caches would keep of them.
#pragma once

#include "vec.h"

namespace ldm::LDM_ISA {

#if defined(__AVX2__)
constexpr bool STREAMS = true;
#else
constexpr bool STREAMS = false;
#endif

// Whether rows of `row` elements, the first of them at p, are made of whole cache lines.
template <class T>
inline bool streamable(const T* p, int64_t row) {
    constexpr uintptr_t LINE = 64;
    return STREAMS && reinterpret_cast<uintptr_t>(p) % LINE == 0 && static_cast<uintptr_t>(row) * sizeof(T) % LINE == 0;
}

// Call finish_streaming() between the last of these stores and whatever tells another thread about them.
template <class T>
inline void stream(T* p, F v, Part part) {
    store(p, v, part);
}

template <class T>
inline void stream(T* p, F v, Full) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == sizeof(float)) {
        _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
    } else {
        __m256i bits;
        store(reinterpret_cast<T*>(&bits), v, Full{});
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == sizeof(float)) {
        _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
    } else {
        __m128i bits;
        store(reinterpret_cast<T*>(&bits), v, Full{});
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits);
    }
#else
    store(p, v, Full{});
#endif
}

template <bool streamed, class T, class Lanes>
inline void store_or_stream(T* p, F v, Lanes lanes) {
    if constexpr (streamed) {
        stream(p, v, lanes);
    } else {
        store(p, v, lanes);
    }
}

inline void finish_streaming() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

}  // namespace ldm::LDM_ISA
