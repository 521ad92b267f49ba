// Large pages for large results. Linux clears fresh memory page by page when it is first written to, and with pages of
// 4 KiB that takes several times as long as the writing.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ldm::LDM_ISA {

// Even a block of this size may be cut from memory that malloc keeps. The advice concerns the pages that lie wholly
// inside the block, and changes nothing for pages that have been written to.
constexpr int64_t LARGE_BYTES = int64_t{4} << 20;

// Call this before `data` is written. It is advice: a system without large pages does nothing.
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
