// What every CUDA source needs around its kernels: errors as exceptions, and the right device current.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace ldm_fast {

// Throws std::runtime_error with the runtime's own message; `op` and `call` say where.
inline void check(cudaError_t error, const char* op, const char* call) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or this error would come up again in somebody else's call
    throw std::runtime_error(std::string(op) + ": " + call + ": " + cudaGetErrorString(error) + " (" +
                             cudaGetErrorName(error) + ")");
}

// Makes `device` current for a scope. The static runtime has a current device of its own: that of the caller does not
// count here.
class DeviceGuard {
  public:
    DeviceGuard(int device, const char* op) {
        check(cudaGetDevice(&before_), op, "cudaGetDevice");
        check(cudaSetDevice(device), op, "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(before_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
};

inline int multiprocessor_count(int device, const char* op) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), op, "cudaDeviceGetAttribute");
    return count;
}

}  // namespace ldm_fast
