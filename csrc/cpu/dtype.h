// Storage types. All arithmetic is float32; bf16 and f16 exist in memory only.
#pragma once

#include <cstdint>
#include <cstring>

namespace ldm {

// The codes that ldm_fast/ops/cpu.py passes.
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class MaskKind : int { none = 0, boolean = 1, f32 = 2, bf16 = 3, f16 = 4 };

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

}  // namespace ldm

#ifdef LDM_ISA
namespace ldm::LDM_ISA {

inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) { return from_bits(uint32_t{value.bits} << 16); }

inline float to_float(f16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
    // Read as a float32 the exponent is too small by 112; the product is exact, for subnormal numbers too.
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

// Round to nearest, ties to even; NaN stays NaN.
inline void from_float(float value, float& out) { out = value; }

inline void from_float(float value, bf16& out) {
    const uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        out.bits = uint16_t(bits >> 16 | 0x40u);
    } else {
        out.bits = uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
}

inline void from_float(float value, f16& out) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        out.bits = uint16_t(sign | 0x7e00u);
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
        out.bits = uint16_t(sign | 0x7c00u);
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the end of the sum
        out.bits = uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u));
    } else {
        out.bits = uint16_t(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
    }
}

}  // namespace ldm::LDM_ISA
#endif
