// Large results in large pages: the kernel of Linux clears fresh memory page by page as it is first written to, and in
// pages of 4 KiB that takes several times as long as writing does.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ldm::LDM_ISA {

// malloc may have cut a block of this size from memory it keeps. The advice concerns the pages wholly inside the block,
// and where they have been written to before nothing happens.
constexpr int64_t LARGE_BYTES = int64_t{4} << 20;

// To be called before `data` is written. Advice: where the system has none of it, nothing happens.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = uintptr_t{2} << 20;
    if (bytes < LARGE_BYTES) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace ldm::LDM_ISA
