// parallel_for over the OpenMP runtime that torch has already loaded.
//
// A second OpenMP runtime in the process would bring a second pool of threads that fights the first for the same cores.
// So nothing here is compiled with -fopenmp, and nothing is linked: ldm_fast/ops/native.py finds the runtime that torch
// uses and passes the address of its GOMP_parallel (the entry point of GCC's ABI, which LLVM's and Intel's runtimes
// export too). Until then everything runs on the calling thread.
//
// Work is claimed piece by piece from a shared counter, so a core that is busy with something else does not hold up the
// others. Which thread computes a piece never changes the result.
#pragma once

#include <cstdint>

namespace ldm {

// Address of GOMP_parallel, or 0 for none.
void set_openmp(uintptr_t gomp_parallel);

// Runs body(data) on at most `threads` threads at once, the calling one among them; returns when all are done.
void run_team(void (*body)(void*), void* data, int threads);

}  // namespace ldm

#ifdef LDM_ISA
namespace ldm::LDM_ISA {

// Calls fn(begin, end, slot) for pieces of at most `grain` that cover [0, n). Pieces with the same slot, 0 <= slot <
// threads, never run at the same time, so a slot may own scratch memory. fn must not throw.
template <class Fn>
void parallel_for(int64_t n, int64_t grain, int threads, const Fn& fn) {
    struct Shared {
        const Fn* fn;
        int64_t n, grain, next;
        int slots;
    } shared{&fn, n, grain < 1 ? 1 : grain, 0, 0};
    if (threads <= 1 || n <= shared.grain) {
        if (n > 0) fn(int64_t{0}, n, 0);
        return;
    }
    auto body = [](void* data) {
        Shared& s = *static_cast<Shared*>(data);
        const int slot = __atomic_fetch_add(&s.slots, 1, __ATOMIC_RELAXED);
        for (;;) {
            const int64_t begin = __atomic_fetch_add(&s.next, s.grain, __ATOMIC_RELAXED);
            if (begin >= s.n) return;
            (*s.fn)(begin, begin + s.grain < s.n ? begin + s.grain : s.n, slot);
        }
    };
    run_team(body, &shared, threads);
}

// Calls fn(claim, slot) on each thread, with slots as above. claim() returns the next i of [0, n) for this thread, or
// -1 if all are taken. The thread that claimed i has to do it before it returns, but not at once. Each thread first
// gets a share of its own, front to back, and then what the others have left. So neighbouring pieces, which may write
// to neighbouring memory or need the same operands, mostly go to one thread.
template <class Fn>
void parallel_claims(int64_t n, int threads, const Fn& fn) {
    constexpr int MOST = 64;
    struct alignas(64) Share {
        int64_t next, end;
    } shares[MOST];
    const int count = threads < MOST ? threads : MOST;
    for (int i = 0; i < count; ++i) shares[i] = {n * i / count, n * (i + 1) / count};
    parallel_for(threads, 1, threads, [&](int64_t, int64_t, int slot) {
        int helped = 0;
        const auto claim = [&] {
            for (; helped < count; ++helped) {
                Share& share = shares[(slot + helped) % count];
                const int64_t piece = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED);
                if (piece < share.end) return piece;
            }
            return int64_t{-1};
        };
        fn(claim, slot);
    });
}

// Calls fn(i, slot) for each i of [0, n), as parallel_claims hands them out.
template <class Fn>
void parallel_shares(int64_t n, int threads, const Fn& fn) {
    parallel_claims(n, threads, [&](const auto& claim, int slot) {
        for (int64_t i = claim(); i >= 0; i = claim()) fn(i, slot);
    });
}

}  // namespace ldm::LDM_ISA
#endif
