// The CUDA module's interface for the host: plain numbers, addresses as integers. No CUDA, no torch.
#pragma once

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

// Device addresses of z (n, d), codebook (k, d), out (n) int64 and, for d above 16, half_norms (k) float32; strides in
// elements; dtype "float32", "float16" or "bfloat16". Enqueues on `stream` of `device` and returns at once.
// Throws std::invalid_argument for arguments that make no sense, std::runtime_error for what the CUDA runtime reports.
void nearest_codebook(std::uintptr_t z, std::int64_t z_row_stride, std::int64_t z_column_stride,
                      std::uintptr_t codebook, std::int64_t codebook_row_stride, std::int64_t codebook_column_stride,
                      std::uintptr_t out, std::uintptr_t half_norms, std::int64_t n, std::int64_t k, std::int64_t d,
                      const std::string& dtype, int device, std::uintptr_t stream);

}  // namespace ldm_fast
