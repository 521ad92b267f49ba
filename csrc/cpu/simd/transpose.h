// W vectors as a square matrix, transposed in registers: rows[i][j] becomes rows[j][i].
#pragma once

#include "vec.h"

namespace ldm::LDM_ISA {

#if defined(__AVX512F__)

inline void transpose(F (&rows)[W]) {
    __m512 a[W], b[W];
    for (int i = 0; i < W; i += 2) {
        a[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
    }
    for (int i = 0; i < W; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + j + 2]);
            b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
    }
    // b[i + c] holds column c of each quarter of rows i .. i + 3; it remains to exchange quarters.
    for (int c = 0; c < 4; ++c) {
        const __m512 even = _mm512_shuffle_f32x4(b[c], b[c + 4], 0x88),
                     odd = _mm512_shuffle_f32x4(b[c], b[c + 4], 0xdd);
        const __m512 even2 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0x88);
        const __m512 odd2 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0xdd);
        rows[c] = (F)_mm512_shuffle_f32x4(even, even2, 0x88);
        rows[c + 4] = (F)_mm512_shuffle_f32x4(odd, odd2, 0x88);
        rows[c + 8] = (F)_mm512_shuffle_f32x4(even, even2, 0xdd);
        rows[c + 12] = (F)_mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}

#elif defined(__AVX2__)

inline void transpose(F (&rows)[W]) {
    __m256 a[W], b[W];
    for (int i = 0; i < W; i += 2) {
        a[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
    }
    for (int i = 0; i < W; i += 4) {
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    }
    for (int c = 0; c < 4; ++c) {
        rows[c] = (F)_mm256_permute2f128_ps(b[c], b[c + 4], 0x20);
        rows[c + 4] = (F)_mm256_permute2f128_ps(b[c], b[c + 4], 0x31);
    }
}

#else

inline void transpose(F (&rows)[W]) {
    float from[W][W], to[W][W];
    memcpy(from, rows, sizeof from);
    for (int i = 0; i < W; ++i)
        for (int j = 0; j < W; ++j) to[j][i] = from[i][j];
    memcpy(rows, to, sizeof to);
}

#endif

}  // namespace ldm::LDM_ISA
