// The functions that a kernel calls besides barriers: operations of a warp, atomics, number formats, and twins of the
// instructions in csrc/cuda/tensor_core.cuh.
#pragma once

#include <algorithm>

#include "cuda_on_host.h"

namespace cuda_on_host {

// Waits for all lanes of the warp, and returns the words that each of them contributed.
ON_HOST_INTERNAL inline const Lane* exchange(const unsigned* words, int count) {
    const unsigned thread = this_thread().x;
    Lane* const lanes = this_block().exchange[current->exchanges++ % 2].get();
    for (int i = 0; i < count; ++i) lanes[thread].words[i] = words[i];
    meet(warp_barrier(), false);
    return lanes + thread / WARP * WARP;
}

ON_HOST_INTERNAL inline unsigned vote(bool predicate) {
    const unsigned mine = predicate;
    const Lane* const lanes = exchange(&mine, 1);
    unsigned bits = 0;
    for (unsigned i = 0; i < WARP; ++i) bits |= lanes[i].words[0] << i;
    return bits;
}

ON_HOST_INTERNAL inline unsigned lanes_with(unsigned value) {
    const Lane* const lanes = exchange(&value, 1);
    unsigned bits = 0;
    for (unsigned i = 0; i < WARP; ++i) bits |= unsigned{lanes[i].words[0] == value} << i;
    return bits;
}

ON_HOST_INTERNAL inline unsigned from_lane(unsigned value, unsigned lane) {
    return exchange(&value, 1)[lane % WARP].words[0];
}

// Adds up products and an accumulator as the least exact of the known tensor cores does. Each term is truncated towards
// zero at the last bit of the largest one, the sum is rounded towards zero, and a subnormal result becomes zero.
ON_HOST_INTERNAL inline float truncating_sum(const double* terms, int count) {
    double sum = 0;
    int largest = -1000;
    for (int i = 0; i < count; ++i) {
        sum += terms[i];
        if (terms[i] != 0) largest = std::max(largest, std::ilogb(terms[i]));
    }
    if (!std::isfinite(sum) || largest == -1000) return static_cast<float>(sum);
    const double last_bit = std::ldexp(1.0, largest - 23);
    sum = 0;
    for (int i = 0; i < count; ++i) sum += std::trunc(terms[i] / last_bit);
    sum *= last_bit;
    float rounded = static_cast<float>(sum);
    if (std::fabs(rounded) > std::fabs(sum)) rounded = std::nextafterf(rounded, 0.0f);
    return std::fabs(rounded) < 0x1p-126f ? 0.0f : rounded;
}

inline float upper_half(unsigned word) {
    word &= 0xffff0000u;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

ON_HOST_INTERNAL inline void finish_mma(const Lane* lanes, float (&sums)[4]) {
    const unsigned g = this_thread().x % WARP / 4;
    const unsigned t = this_thread().x % 4;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = g + i / 2 * 8;
        const unsigned column = 2 * t + i % 2;
        double terms[17];
        for (unsigned k = 0; k < 16; ++k) {
            // The registers that hold a[row][k] and b[k][column] in one half, in the layout of the PTX manual.
            const unsigned a = lanes[row % 8 * 4 + k % 8 / 2].words[row / 8 + k / 8 * 2];
            const unsigned b = lanes[column * 4 + k % 8 / 2].words[4 + k / 8];
            terms[k] = double{upper_half(k % 2 ? a : a << 16)} * double{upper_half(k % 2 ? b : b << 16)};
        }
        terms[16] = sums[i];
        sums[i] = truncating_sum(terms, 17);
    }
}

}  // namespace cuda_on_host

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned __ballot_sync(unsigned, bool predicate) { return cuda_on_host::vote(predicate); }
inline unsigned __match_any_sync(unsigned, int value) { return cuda_on_host::lanes_with(static_cast<unsigned>(value)); }
inline unsigned __shfl_sync(unsigned, unsigned value, int lane) { return cuda_on_host::from_lane(value, lane); }
inline unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) {
    return cuda_on_host::from_lane(value, threadIdx.x ^ static_cast<unsigned>(mask));
}
inline float __shfl_xor_sync(unsigned all, float value, int mask) {
    return __uint_as_float(__shfl_xor_sync(all, __float_as_uint(value), mask));
}

inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <class T>
T atomicMin(T* address, T value) {
    T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (value < seen &&
           !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return seen;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

struct __half {
    std::uint16_t bits;
};

struct __nv_bfloat16 {
    std::uint16_t bits;
};

inline float __half2float(__half half) {
    const int exponent = half.bits >> 10 & 31;
    const int mantissa = half.bits & 1023;
    const float magnitude = exponent == 31  ? (mantissa == 0 ? INFINITY : NAN)
                            : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                            : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return half.bits & 0x8000 ? -magnitude : magnitude;
}

inline float __bfloat162float(__nv_bfloat16 bfloat) {
    return __uint_as_float(static_cast<unsigned>(bfloat.bits) << 16);
}

// ---- the twins of csrc/cuda/tensor_core.cuh

namespace ldm_fast {

inline void multiply_add(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    const unsigned words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    cuda_on_host::finish_mma(cuda_on_host::exchange(words, 6), sums);
}

struct alignas(16) SixteenBytes {
    std::uint32_t words[4];
};

// Until the copy is waited for, the destination holds neither its old contents nor its new ones.
inline void copy_async(void* shared, const void* global) {
    *static_cast<SixteenBytes*>(shared) = {{~0u, ~0u, ~0u, ~0u}};
    cuda_on_host::current->copies.push_back({shared, global});
}

inline void wait_for_copies() {
    for (const cuda_on_host::Copy& copy : cuda_on_host::current->copies) {
        *static_cast<SixteenBytes*>(copy.to) = *static_cast<const SixteenBytes*>(copy.from);
    }
    cuda_on_host::current->copies.clear();
}

}  // namespace ldm_fast
