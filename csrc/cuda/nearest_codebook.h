// The CUDA module's interface for the host: plain numbers, addresses as integers. No CUDA, no torch.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace ldm_fast {

struct BuildInfo {
    int runtime_version;             // of the static runtime, 13000 for 13.0
    int driver_version;              // newest runtime the driver supports, 0 without a driver
    std::vector<int> architectures;  // compiled for: 80, 90, ...
};

BuildInfo build_info();

// Bytes of device memory that nearest_codebook needs on `device` for n vectors of d numbers and k codes.
std::int64_t nearest_codebook_workspace(std::int64_t n, std::int64_t k, std::int64_t d, bool stats, int device);

// z (batches, rows, d) and codebook (k, d) are device addresses, with strides in elements; dtype is "float32",
// "float16" or "bfloat16". Writes out (batches * rows) int64 and, unless counts is 0, counts (k) int64 and sums (k, d)
// float32, all contiguous. The workspace has as many bytes as nearest_codebook_workspace says, and begins at a multiple
// of 256. Enqueues on `stream` of `device` and returns at once; allocates nothing.
//
// Throws std::invalid_argument for arguments that make no sense, std::runtime_error for what the CUDA runtime reports.
void nearest_codebook(std::uintptr_t z, const std::array<std::int64_t, 3>& z_shape,
                      const std::array<std::int64_t, 3>& z_strides, std::uintptr_t codebook, std::int64_t k,
                      const std::array<std::int64_t, 2>& codebook_strides, std::uintptr_t out, std::uintptr_t counts,
                      std::uintptr_t sums, std::uintptr_t workspace, const std::string& dtype, int device,
                      std::uintptr_t stream);

}  // namespace ldm_fast
