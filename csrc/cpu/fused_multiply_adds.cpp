// Fused multiply-adds that wait for nothing: what benchmarks measure the machine by.
#include "kernels.h"
#include "parallel.h"
#include "simd/vec.h"

namespace ldm::LDM_ISA {
namespace {

constexpr int CHAINS = 12;  // hides the latency of two pipes; fits into sixteen registers with two operands

}  // namespace

int64_t fused_multiply_adds(int64_t rounds, float factor, float* result, int threads) {
    parallel_for(threads, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (; begin < end; ++begin) {
            const F by = set(factor), plus = set(1.0f - factor);
            F chain[CHAINS];
            for (int i = 0; i < CHAINS; ++i) chain[i] = set(static_cast<float>(i));
            for (int64_t round = 0; round < rounds; ++round)
                for (int i = 0; i < CHAINS; ++i) chain[i] = fma(chain[i], by, plus);
            F total = zero();
            for (int i = 0; i < CHAINS; ++i) total += chain[i];
            result[begin] = sum(total);
        }
    });
    return rounds * CHAINS * W * threads;
}

}  // namespace ldm::LDM_ISA
