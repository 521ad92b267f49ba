// Which instruction sets this machine has. setup.py also compiles it into a program of its own, to choose what to build
// for.
#pragma once

#include <string>
#include <vector>

namespace ldm {

// Those that the compiler knows (LDM_KNOWS_...), widest last. Every machine has "portable". __builtin_cpu_supports also
// asks whether the operating system saves the wide registers.
inline std::vector<std::string> machine_isas() {
    std::vector<std::string> found{"portable"};
#ifdef LDM_KNOWS_AVX2
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return found;
    found.emplace_back("avx2");
#endif
#ifdef LDM_KNOWS_AVX512
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return found;
    found.emplace_back("avx512");
#endif
#ifdef LDM_KNOWS_AVX512BF16
    if (__builtin_cpu_supports("avx512bf16")) found.emplace_back("avx512bf16");
#endif
    return found;
}

}  // namespace ldm
