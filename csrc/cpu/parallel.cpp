#include "parallel.h"

namespace ldm {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

}  // namespace

void set_openmp(uintptr_t address) { gomp_parallel = reinterpret_cast<GompParallel>(address); }

void run_team(void (*body)(void*), void* data, int threads) {
    if (gomp_parallel != nullptr && threads > 1) {
        gomp_parallel(body, data, static_cast<unsigned>(threads), 0);
    } else {
        body(data);
    }
}

}  // namespace ldm
