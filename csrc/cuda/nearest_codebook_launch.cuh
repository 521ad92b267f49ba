// Launches the kernels of nearest_codebook. The search has a source of its own for each dtype, so that the three
// compile side by side.
#pragma once

#include <limits>

#include "nearest_codebook_search.cuh"
#include "runtime.cuh"

namespace ldm_fast {

constexpr const char* NEAREST_CODEBOOK = "nearest_codebook";

inline void require(bool holds, const std::string& needed) {
    if (!holds) throw std::invalid_argument(std::string(NEAREST_CODEBOOK) + ": " + needed);
}

// Launches kernel after kernel on one stream. A refused launch is an exception; nothing waits for the GPU.
struct Launcher {
    cudaStream_t stream;

    template <class Arguments>
    void operator()(void (*kernel)(Arguments), nearest::Grid grid, const Arguments& arguments) const {
        require(grid.x <= std::numeric_limits<int>::max() && grid.y <= 65535, "too many vectors for one launch");
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
        config.blockDim = dim3(nearest::THREADS);
        config.stream = stream;
        check(cudaLaunchKernelEx(&config, kernel, arguments), NEAREST_CODEBOOK, "cudaLaunchKernelEx");
    }
};

namespace nearest {

extern template void enqueue(Problem<float>, Workspace&, int, Launcher&);
extern template void enqueue(Problem<__half>, Workspace&, int, Launcher&);
extern template void enqueue(Problem<__nv_bfloat16>, Workspace&, int, Launcher&);

}  // namespace nearest
}  // namespace ldm_fast
