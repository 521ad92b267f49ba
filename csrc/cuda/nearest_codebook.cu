// nearest_codebook: checks and launch. How it works stands in nearest_codebook.cuh.
#include "nearest_codebook.h"

#include <limits>

#include "nearest_codebook.cuh"
#include "runtime.cuh"

namespace ldm_fast {
namespace {

constexpr const char* OP = "nearest_codebook";

void require(bool holds, const std::string& needed) {
    if (!holds) throw std::invalid_argument(std::string(OP) + ": " + needed);
}

template <class T>
nearest::Rows<T> rows_at(std::uintptr_t address, std::int64_t count, std::int64_t row_stride,
                         std::int64_t column_stride) {
    require(address % sizeof(T) == 0, "addresses must be multiples of the element size");
    return {reinterpret_cast<const T*>(address), count, row_stride, column_stride, false};
}

// Kernel after kernel on one stream; a refused launch is an exception, nothing waits for the GPU.
struct Launcher {
    cudaStream_t stream;

    template <class Problem>
    void operator()(void (*kernel)(Problem), nearest::Grid grid, const Problem& problem) const {
        require(grid.x <= std::numeric_limits<int>::max() && grid.y <= 65535, "too many vectors for one launch");
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
        config.blockDim = dim3(nearest::THREADS);
        config.stream = stream;
        check(cudaLaunchKernelEx(&config, kernel, problem), OP, "cudaLaunchKernelEx");
    }
};

}  // namespace

void nearest_codebook(std::uintptr_t z, std::int64_t z_row_stride, std::int64_t z_column_stride,
                      std::uintptr_t codebook, std::int64_t codebook_row_stride, std::int64_t codebook_column_stride,
                      std::uintptr_t out, std::uintptr_t half_norms, std::int64_t n, std::int64_t k, std::int64_t d,
                      const std::string& dtype, int device, std::uintptr_t stream) {
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
    require(n >= 0, "n must not be negative, got " + std::to_string(n));
    require(k >= 1 && k <= most, "the codebook must have 1 to 2^31 - 1 codes, got " + std::to_string(k));
    require(d >= 1 && d <= most - nearest::DEPTH, "d must be 1 to 2^31 - 17, got " + std::to_string(d));
    require(d <= nearest::MAX_CHUNK_DIM || half_norms != 0, "d above 16 needs the workspace half_norms");
    require(out % sizeof(nearest::Key) == 0, "out must be a multiple of 8");
    require(dtype == "float32" || dtype == "float16" || dtype == "bfloat16",
            "dtype must be float32, float16 or bfloat16, got " + dtype);

    const DeviceGuard guard(device, OP);
    const int sm_count = multiprocessor_count(device, OP);
    const auto enqueue_as = [&](auto element) {
        using T = decltype(element);
        nearest::Problem<T> problem{};
        problem.queries = rows_at<T>(z, n, z_row_stride, z_column_stride);
        problem.codes = rows_at<T>(codebook, k, codebook_row_stride, codebook_column_stride);
        problem.dim = static_cast<int>(d);
        problem.half_norms = reinterpret_cast<float*>(half_norms);
        problem.out = reinterpret_cast<nearest::Key*>(out);
        nearest::enqueue(problem, sm_count, Launcher{reinterpret_cast<cudaStream_t>(stream)});
    };
    if (dtype == "float32") {
        enqueue_as(float{});
    } else if (dtype == "float16") {
        enqueue_as(__half{});
    } else {
        enqueue_as(__nv_bfloat16{});
    }
}

BuildInfo build_info() {
    BuildInfo info{CUDART_VERSION, 0, {}};
    // Without a driver the version stays 0, which says it: no error.
    if (cudaDriverGetVersion(&info.driver_version) != cudaSuccess) cudaGetLastError();
    for (const int architecture : {__CUDA_ARCH_LIST__}) info.architectures.push_back(architecture / 10);
    return info;
}

}  // namespace ldm_fast
