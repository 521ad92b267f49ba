// Wide codes: a bfloat16 product picks candidates, exact distances decide. (AVX512-BF16 only.)
//
// One vdpbf16ps does twice the work of a float32 fused multiply-add. So a first pass computes two bounds for every row
// and code: a number L that the float32 distance s of nearest_codebook_codes.h cannot be below and, if L is small, a
// number U that it cannot exceed. With T = the smallest U so far, a code with L > T is not the nearest. For the vectors
// of codes that are left, about one per row, s itself decides: the result is that of brute force, bit for bit.
//
// The bound. Let ẑ, ê be z and e rounded to bfloat16 (subnormal numbers to zero, as the instruction reads them), δz = z
// - ẑ and δe = e - ê, u = 2^-24, M = ½‖e‖² + ‖z‖‖e‖. In exact arithmetic, by Cauchy-Schwarz,
//     |⟨z, e⟩ - ⟨ẑ, ê⟩| = |⟨δz, e⟩ + ⟨ẑ, δe⟩| ≤ ‖δz‖‖e‖ + ‖ẑ‖‖δe‖,                  ‖ẑ‖ ≤ (1 + 2^-8)‖z‖.
// The float32 distance s adds up d squares, then subtracts d products from their half. Each of the 2d roundings is at
// most u times a partial sum, and none of those exceeds M: |s - exact| ≤ 2du·M to first order. The instruction adds d
// products to its accumulator, with at most d + 4 roundings along any path whatever order it takes inside, counted here
// as 2u each, as if it truncated: at most (d + 4)·2u·M, times 1.02 for ‖ẑ‖, ‖ê‖ and a start that is not quite ½‖e‖².
// Together that is below (4d + 8)u·1.02·M (d ≤ 2^13 keeps the second order far below the hundredth); γ = (d + 8)·4.25u
// leaves at least 17u·M for the roundings of what follows. Numbers below 2^-126 lose at most 2^-126 in each of 5d
// operations; A = d·2^-120 has room. So with
//     b = (‖δz‖ + γ‖z‖)‖e‖ + (1 + 2^-7)‖z‖‖δe‖ + γ½‖e‖² + A
// the float32 s is within b of ½‖e‖² - ⟨ẑ, ê⟩ as the instruction computes it: L comes from starting its sum at ½‖e‖² -
// b, and U = L + 2b. Lengths are taken a little too large: by the factor 1 + 2^-10 for their own roundings, and by
// 2^-64 for squares that vanish (δ² = 0 for |δ| < 2^-75). All this holds if nothing overflows: no code may be longer
// than 2^60, and rows that are longer (or have a NaN) go to brute force.
#pragma once

#include "nearest_codebook_brute.h"

namespace ldm::LDM_ISA {
namespace {

#if defined(__AVX512BF16__)

constexpr int64_t NARROWEST_BF16 = 16, WIDEST_BF16 = 1 << 13;
constexpr int64_t FEWEST_CODES_BF16 = 128, FEWEST_ROWS_BF16 = 32;  // the fewest with which it pays
constexpr int BF16_ROWS = 8, BF16_VECTORS = 2;                     // of a tile
constexpr int CANDIDATES = 32;                                     // vectors of codes remembered for a row
constexpr int CHECKED_TOGETHER = 8;  // exact distances of as many (row, vector) pairs, to hide latency
static_assert(BLOCK_ROWS % BF16_ROWS == 0 && STEP % (BF16_VECTORS * W) == 0);

// pairs: coordinates 2p and 2p + 1 of the codes [k, k + W), at pairs + (k * half + p * W). For each code, base is ½‖e‖²
// minus the code's own part of b, own is that part, length is ‖e‖, and error is ‖δe‖.
struct Bf16Codes {
    uint32_t* pairs;
    float *base, *own, *length, *error;
    int64_t half;
};

inline float bf16_gamma(int64_t width) { return static_cast<float>(width + 8) * 0x1.1p-22f; }
inline float bf16_absolute(int64_t width) { return static_cast<float>(width) * 0x1p-120f; }

inline F square_root(F v) { return (F)_mm512_sqrt_ps((__m512)v); }

// Rounds to bfloat16 (subnormal numbers to zero) and adds the square of the change to `error`.
inline __m256i rounded(F v, F& error) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    const F lost = v - widen_bf16(bits);
    error = fma(lost, lost, error);
    return bits;
}

inline __m512i paired(__m256i first, __m256i second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// Packs bfloat16 codes from packed float32 codes, of which `count` are real.
inline void pack_bf16(const PackedCodes& codes, int64_t count, const Bf16Codes& out, int threads) {
    const F gamma = set(bf16_gamma(codes.width)), absolute = set(bf16_absolute(codes.width));
    parallel_for(codes.padded / W, 64, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t k = begin * W; k < end * W; k += W) {
            F error = zero();
            for (int64_t p = 0; p < out.half; ++p) {
                const float* const from = codes.data + k * codes.width + 2 * p * W;
                const __m256i first = rounded(load(from, Full{}), error);
                const __m256i second = 2 * p + 1 < codes.width ? rounded(load(from + W, Full{}), error) : __m256i{};
                _mm512_storeu_si512(out.pairs + k * out.half + p * W, paired(first, second));
            }
            const F norm = load(codes.norms + k, Full{}), own = fma(gamma, norm, absolute);
            const F length = square_root(norm * 2.0f);
            store(out.own + k, own, Full{});
            store(out.base + k, norm - own, Full{});
            store(out.length + k, length * (1.0f + 0x1p-10f) + 0x1p-64f, Full{});
            store(out.error + k, square_root(error) * (1.0f + 0x1p-10f) + 0x1p-64f, Full{});
            for (int64_t j = k < count ? count - k : 0; j < W; ++j) {
                out.base[k + j] = __builtin_inff();
                out.own[k + j] = out.length[k + j] = out.error[k + j] = 0.0f;
            }
        }
    });
}

// A block of rows for the first pass. pairs: coordinates 2p and 2p + 1 of row r at (r / R * half + p) * R + r % R with
// R = BF16_ROWS. b = along_length ‖e‖ + along_error ‖δe‖ + own.
struct Bf16Block {
    uint32_t* pairs;
    float along_length[BLOCK_ROWS], along_error[BLOCK_ROWS], bound[BLOCK_ROWS];  // bound: T
    int found[BLOCK_ROWS];                                                       // candidates, or OVERFLOWN
    float low[BLOCK_ROWS][CANDIDATES];                                           // the smallest L of a candidate
    int32_t code[BLOCK_ROWS][CANDIDATES];                                        // its first code
    int64_t alive;                                                               // rows that have not overflowed
};

constexpr int OVERFLOWN = -1;  // of `found`: the row is left to brute force

inline void give_up(Bf16Block& b, int64_t r) {
    b.found[r] = OVERFLOWN, b.bound[r] = __builtin_nanf("");  // no L is at most NaN
    --b.alive;
}

inline void load_bf16(const Block& block, int64_t half, Bf16Block& b) {
    const float gamma = bf16_gamma(block.width);
    b.alive = BLOCK_ROWS;
    for (int64_t r = 0; r < BLOCK_ROWS; ++r) {
        const float* const z = block.row(r);
        uint32_t* const to = b.pairs + r / BF16_ROWS * half * BF16_ROWS + r % BF16_ROWS;
        float square = 0.0f, error = 0.0f;
        for (int64_t p = 0; p < half; ++p) {
            uint32_t pair = 0;
            for (int64_t i = 2 * p; i < 2 * p + 2 && i < block.width; ++i) {
                const float value = z[i * ROWS];
                bf16 small;
                from_float(value, small);
                if ((small.bits & 0x7f80u) == 0) small.bits = 0;
                const float lost = value - to_float(small);
                square += value * value, error += lost * lost;
                pair |= uint32_t{small.bits} << 16 * (i - 2 * p);
            }
            to[p * BF16_ROWS] = pair;
        }
        const float length = length_above(square);
        b.along_length[r] = (length_above(error) + gamma * length) * (1.0f + 0x1p-10f);
        b.along_error[r] = length * (1.0f + 0x1p-7f);
        b.bound[r] = __builtin_inff(), b.found[r] = 0;
        if (!(square <= LARGEST_SQUARE) || r >= block.count) give_up(b, r);
    }
}

// Notes the vector of codes [k, k + W), whose bounds are these L, for row r, and lowers T.
inline void note(const Bf16Codes& codes, Bf16Block& b, int64_t r, int64_t k, F low) {
    const F own = load(codes.own + k, Full{}), length = load(codes.length + k, Full{});
    const F width = fma(set(b.along_length[r]), length, fma(set(b.along_error[r]), load(codes.error + k, Full{}), own));
    const float upper = smallest(fma(width, set(2.0f + 0x1p-8f), low));
    if (upper < b.bound[r]) b.bound[r] = upper;
    if (b.found[r] == CANDIDATES) {
        int kept = 0;
        for (int c = 0; c < CANDIDATES; ++c)
            if (b.low[r][c] <= b.bound[r]) b.low[r][kept] = b.low[r][c], b.code[r][kept++] = b.code[r][c];
        b.found[r] = kept;
        if (kept > CANDIDATES / 2) return give_up(b, r);
    }
    b.low[r][b.found[r]] = smallest(low), b.code[r][b.found[r]++] = static_cast<int32_t>(k);
}

// Computes L of BF16_ROWS rows, from r on, and BF16_VECTORS vectors of codes, from k on.
inline void pick_in_tile(const Bf16Codes& codes, Bf16Block& b, int64_t r, int64_t k) {
    __m512 s[BF16_ROWS][BF16_VECTORS];
    for (int v = 0; v < BF16_VECTORS; ++v) {
        const F base = load(codes.base + k + v * W, Full{}), length = load(codes.length + k + v * W, Full{});
        const F error = load(codes.error + k + v * W, Full{});
        for (int j = 0; j < BF16_ROWS; ++j)
            s[j][v] = (__m512)fma(set(-b.along_length[r + j]), length, fma(set(-b.along_error[r + j]), error, base));
    }
    const uint32_t* const e = codes.pairs + k * codes.half;
    const uint32_t* const z = b.pairs + r * codes.half;
    for (int64_t p = 0; p < codes.half; ++p) {
        __m512i codes_of[BF16_VECTORS];
        for (int v = 0; v < BF16_VECTORS; ++v) codes_of[v] = _mm512_loadu_si512(e + (v * codes.half + p) * W);
        for (int j = 0; j < BF16_ROWS; ++j) {
            const __m512i row = _mm512_set1_epi32(static_cast<int>(z[p * BF16_ROWS + j]));
            for (int v = 0; v < BF16_VECTORS; ++v)
                s[j][v] = _mm512_dpbf16_ps(s[j][v], (__m512bh)row, (__m512bh)codes_of[v]);
        }
    }
    for (int j = 0; j < BF16_ROWS; ++j) {
        F low = (F)s[j][0];
        for (int v = 1; v < BF16_VECTORS; ++v) low = min((F)s[j][v], low);
        if (__builtin_expect(at_most(low, set(b.bound[r + j])) == 0, 1)) continue;
        for (int v = 0; v < BF16_VECTORS; ++v)
            if (at_most((F)s[j][v], set(b.bound[r + j]))) note(codes, b, r + j, k + v * W, (F)s[j][v]);
    }
}

// Computes exact distances of CHECKED_TOGETHER rows, each to a vector of codes of its own.
inline void exact_together(const PackedCodes& codes, const float* const* z, const int64_t* k, F* s) {
    for (int c = 0; c < CHECKED_TOGETHER; ++c) s[c] = load(codes.norms + k[c], Full{});
    const float* e[CHECKED_TOGETHER];
    for (int c = 0; c < CHECKED_TOGETHER; ++c) e[c] = codes.data + k[c] * codes.width;
    for (int64_t i = 0; i < codes.width; ++i)
        for (int c = 0; c < CHECKED_TOGETHER; ++c) s[c] = fused(set(z[c][i * ROWS]), load(e[c] + i * W, Full{}), s[c]);
}

// Decides between the candidates of a block; rows that have overflowed are left out.
inline void decide(const PackedCodes& codes, const Block& block, const Bf16Block& b, int64_t* index) {
    float best[BLOCK_ROWS];
    const float* z[CHECKED_TOGETHER];
    int64_t k[CHECKED_TOGETHER], row[CHECKED_TOGETHER];
    int waiting = 0;
    const auto check = [&] {
        F s[CHECKED_TOGETHER];
        for (int c = waiting; c < CHECKED_TOGETHER; ++c) z[c] = z[0], k[c] = k[0];
        exact_together(codes, z, k, s);
        for (int c = 0; c < waiting; ++c) {
            // Padding is NaN, which min skips in this order of its arguments.
            const float low = smallest(min(s[c], set(__builtin_inff())));
            if (low < best[row[c]]) {
                best[row[c]] = low;
                index[block.first + row[c]] = k[c] + first_equal(s[c], low);
            }
        }
        waiting = 0;
    };
    for (int64_t r = 0; r < block.count; ++r) {
        best[r] = __builtin_inff();
        for (int c = 0; c < b.found[r]; ++c) {
            if (!(b.low[r][c] <= b.bound[r])) continue;
            z[waiting] = block.row(r), k[waiting] = b.code[r][c], row[waiting] = r;
            if (++waiting == CHECKED_TOGETHER) check();
        }
    }
    if (waiting) check();
}

// Searches a block. Returns whether that paid: false if too many rows had to be left to brute force.
inline bool search_by_candidates(const PackedCodes& codes, const Bf16Codes& bf16_codes, const Block& block,
                                 Bf16Block& b, int64_t* index) {
    load_bf16(block, bf16_codes.half, b);
    const int64_t rows = (block.count + BF16_ROWS - 1) / BF16_ROWS * BF16_ROWS;
    for (int64_t k = 0; k < codes.padded; k += BF16_VECTORS * W) {
        for (int64_t r = 0; r < rows; r += BF16_ROWS) pick_in_tile(bf16_codes, b, r, k);
        if (2 * b.alive < block.count) {
            search_by_brute_force(codes, block, 0, block.count, index);
            return false;
        }
    }
    decide(codes, block, b, index);
    for (int64_t r = 0; r < block.count; r += ROWS) {
        const int64_t end = r + ROWS < block.count ? r + ROWS : block.count;
        bool overflown = false;
        for (int64_t j = r; j < end; ++j) overflown |= b.found[j] == OVERFLOWN;
        if (overflown) search_by_brute_force(codes, block, r, end, index);
    }
    return true;
}

#endif

}  // namespace
}  // namespace ldm::LDM_ISA
