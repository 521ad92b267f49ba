// Scratch memory without exceptions and without the standard library's templates (kernels.h says why). data is null if
// there was no memory.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace ldm::LDM_ISA {

template <class T>
struct Scratch {
    T* data;
    explicit Scratch(int64_t n) {
        void* memory = nullptr;
        const size_t bytes = static_cast<size_t>(n > 0 ? n : 1) * sizeof(T);
        data = posix_memalign(&memory, 64, bytes) == 0 ? static_cast<T*>(memory) : nullptr;
    }
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

}  // namespace ldm::LDM_ISA
