// nearest_codebook: checks and launch. How it works stands in nearest_codebook.cuh.
#include "nearest_codebook.h"

#include "nearest_codebook.cuh"
#include "nearest_codebook_launch.cuh"

namespace ldm_fast {
namespace {

void require_sizes(std::int64_t n, std::int64_t k, std::int64_t d, bool stats) {
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
    require(n >= 0, "z must not have a negative number of vectors, got " + std::to_string(n));
    require(!stats || n <= std::numeric_limits<std::uint32_t>::max(),
            "counts and sums take at most 2^32 - 1 vectors, got " + std::to_string(n));
    require(k >= 1 && k <= most, "the codebook must have 1 to 2^31 - 1 codes, got " + std::to_string(k));
    require(d >= 1 && d <= most - nearest::SLICE, "d must be 1 to 2^31 - 33, got " + std::to_string(d));
}

template <class T>
const T* elements_at(std::uintptr_t address) {
    require(address % sizeof(T) == 0, "addresses must be multiples of the element size");
    return reinterpret_cast<const T*>(address);
}

}  // namespace

std::int64_t nearest_codebook_workspace(std::int64_t n, std::int64_t k, std::int64_t d, bool stats, int device) {
    require_sizes(n, k, d, stats);
    const DeviceGuard guard(device, NEAREST_CODEBOOK);
    return nearest::workspace_size(n, k, d, multiprocessor_count(device, NEAREST_CODEBOOK), stats);
}

void nearest_codebook(std::uintptr_t z, const std::array<std::int64_t, 3>& z_shape,
                      const std::array<std::int64_t, 3>& z_strides, std::uintptr_t codebook, std::int64_t k,
                      const std::array<std::int64_t, 2>& codebook_strides, std::uintptr_t out, std::uintptr_t counts,
                      std::uintptr_t sums, std::uintptr_t workspace, const std::string& dtype, int device,
                      std::uintptr_t stream) {
    const std::int64_t batches = z_shape[0];
    const std::int64_t rows = z_shape[1];
    const std::int64_t d = z_shape[2];
    require(batches >= 0 && rows >= 0, "z must not have a negative number of vectors");
    require_sizes(batches * rows, k, d, counts != 0);
    require((counts == 0) == (sums == 0), "counts and sums go together");
    require(out % sizeof(nearest::Key) == 0 && counts % sizeof(std::int64_t) == 0 && sums % sizeof(float) == 0,
            "addresses must be multiples of the element size");
    require(workspace % 256 == 0, "the workspace must begin at a multiple of 256");
    require(dtype == "float32" || dtype == "float16" || dtype == "bfloat16",
            "dtype must be float32, float16 or bfloat16, got " + dtype);

    const DeviceGuard guard(device, NEAREST_CODEBOOK);
    const int sm_count = multiprocessor_count(device, NEAREST_CODEBOOK);
    require(workspace != 0 || nearest::workspace_size(batches * rows, k, d, sm_count, counts != 0) == 0,
            "these sizes need a workspace");
    Launcher launcher{reinterpret_cast<cudaStream_t>(stream)};
    const auto enqueue_as = [&](auto element) {
        using T = decltype(element);
        nearest::Problem<T> problem{};
        problem.queries =
            nearest::make_queries(elements_at<T>(z), batches, rows, z_strides[0], z_strides[1], z_strides[2]);
        problem.codes = nearest::make_codes(elements_at<T>(codebook), k, codebook_strides[0], codebook_strides[1]);
        problem.dim = static_cast<int>(d);
        problem.out = reinterpret_cast<nearest::Key*>(out);
        nearest::Workspace memory(workspace);
        nearest::enqueue(problem, memory, sm_count, launcher);
        if (counts == 0) return;
        memory = nearest::Workspace(workspace);  // the search is done with it
        nearest::enqueue_stats(problem, memory, reinterpret_cast<std::int64_t*>(counts), reinterpret_cast<float*>(sums),
                               launcher);
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
    // Without a driver the version stays 0, which says so; it is no error.
    if (cudaDriverGetVersion(&info.driver_version) != cudaSuccess) cudaGetLastError();
    for (const int architecture : {__CUDA_ARCH_LIST__}) info.architectures.push_back(architecture / 10);
    return info;
}

}  // namespace ldm_fast
