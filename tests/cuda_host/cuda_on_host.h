// CUDA kernels on the CPU, for tests: one fiber per CUDA thread, real barriers, blocks that overlap.
//
// A torch-free kernel header that is included after this one compiles unchanged, and the sanitizers then see what the
// kernel does. AddressSanitizer and UBSan see every access outside a buffer or an array. ThreadSanitizer sees every
// pair of accesses that no barrier orders, within a block (a missing __syncthreads) and between blocks. To
// ThreadSanitizer each fiber is a thread, although one OS thread runs them all in turn, so its findings do not depend
// on timing. Only barriers, and the start and end of a block, order fibers. An asynchronous copy arrives when its
// thread waits for it; until then its destination holds NaN. Not modelled: divergence inside a warp, registers, and the
// GPU's memory order.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define ON_HOST_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define ON_HOST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ON_HOST_ASAN 1
#elif __has_feature(thread_sanitizer)
#define ON_HOST_TSAN 1
#endif
#endif

#ifdef ON_HOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef ON_HOST_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

// All fibers share the machinery below, without any order that ThreadSanitizer could know of. This keeps it from
// looking inside.
#define ON_HOST_INTERNAL __attribute__((noinline, no_sanitize("thread")))

struct uint3 {
    unsigned x, y, z;
};

namespace cuda_on_host {

constexpr int WARP = 32;
constexpr std::size_t STACK = 256 * 1024;

struct Fiber;

// Orders all that its threads did before it against all that they do after it. ThreadSanitizer learns of a round
// through one of two addresses, which alternate: with only one, a thread that is slow to wake would also see what a
// fast one has done since.
struct Barrier {
    int threads = 0;
    int waiting = 0;
    int gone = 0;
    int round = 0;
    char order[2] = {};
};

// The words that a lane contributes to an operation of its warp.
constexpr int MOST_WORDS = 6;
struct Lane {
    unsigned words[MOST_WORDS];
};

struct Block {
    uint3 index{};
    Barrier barrier;
    std::vector<Barrier> warp_barriers;
    std::unique_ptr<Lane[]> exchange[2];  // per thread, alternating: the next operation may begin before all have read
    void* shared_memory = nullptr;
    int running = 0;
};

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    ucontext_t context{};
    char* stack = nullptr;
    Block* block = nullptr;
    uint3 index{};
    const Barrier* waits_for = nullptr;
    int round = 0;
    int exchanges = 0;
    std::vector<Copy> copies;
    bool done = false;
    void (*run)(const void*) = nullptr;
    const void* kernel = nullptr;
    void* asan_stack = nullptr;
    void* tsan_fiber = nullptr;
};

inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline const void* scheduler_stack = nullptr;
inline std::size_t scheduler_stack_size = 0;
inline void* scheduler_tsan = nullptr;

// "file:line" of a __syncthreads() or __syncwarp() to leave out, to test the tests. If empty, none is left out.
inline const char* barrier_to_skip = "";

ON_HOST_INTERNAL inline Block& this_block() { return *current->block; }
ON_HOST_INTERNAL inline const uint3& this_thread() { return current->index; }

// What came before release(p) in one fiber is ordered before what follows acquire(p) in another.
#ifdef ON_HOST_TSAN
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }
#else
inline void release(void*) {}
inline void acquire(void*) {}
#endif

[[noreturn]] inline void stop(const char* message, int waiting, int threads) {
    std::fprintf(stderr, "%s: %d of %d threads wait at a barrier\n", message, waiting, threads);
    std::_Exit(3);
}

// Switches from a fiber to the scheduler. Returns when the scheduler chooses this fiber again, never if it is done.
ON_HOST_INTERNAL inline void to_scheduler(Fiber& fiber) {
#ifdef ON_HOST_ASAN
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.asan_stack, scheduler_stack, scheduler_stack_size);
#endif
#ifdef ON_HOST_TSAN
    __tsan_switch_to_fiber(scheduler_tsan, fiber.done ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&fiber.context, &scheduler);
#ifdef ON_HOST_ASAN
    __sanitizer_finish_switch_fiber(fiber.asan_stack, nullptr, nullptr);
#endif
}

// Waits for the other threads. Only barriers order memory: CUDA's votes and shuffles exchange values and promise no
// more.
ON_HOST_INTERNAL inline void meet(Barrier& barrier, bool orders_memory) {
    Fiber& fiber = *current;
    const int round = barrier.round;
    if (orders_memory) release(&barrier.order[round % 2]);
    if (++barrier.waiting == barrier.threads) {
        barrier.waiting = 0;
        ++barrier.round;
    }
    fiber.waits_for = &barrier;
    fiber.round = round;
    to_scheduler(fiber);
    if (orders_memory) acquire(&barrier.order[round % 2]);
}

ON_HOST_INTERNAL inline void leave(Barrier& barrier) {
    ++barrier.gone;
    if (barrier.waiting > 0 && barrier.waiting + barrier.gone == barrier.threads) {
        stop("the others have left the kernel", barrier.waiting, barrier.threads);
    }
}

ON_HOST_INTERNAL inline Barrier& warp_barrier() { return this_block().warp_barriers[this_thread().x / WARP]; }

// `place` is "folder/file:line".
ON_HOST_INTERNAL inline void barrier_at(const char* place, Barrier& barrier) {
    const char* const slash = std::strrchr(place, '/');
    if (std::strcmp(slash == nullptr ? place : slash + 1, barrier_to_skip) != 0) meet(barrier, true);
}

ON_HOST_INTERNAL inline void fiber_main() {
    Fiber& fiber = *current;
#ifdef ON_HOST_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    fiber.run(fiber.kernel);
    leave(warp_barrier());
    leave(fiber.block->barrier);
    fiber.done = true;
    --fiber.block->running;
    to_scheduler(fiber);
}

ON_HOST_INTERNAL inline void resume(Fiber& fiber, bool first) {
    current = &fiber;
#ifdef ON_HOST_ASAN
    void* own_stack = nullptr;
    __sanitizer_start_switch_fiber(&own_stack, fiber.stack, STACK);
#endif
#ifdef ON_HOST_TSAN
    __tsan_switch_to_fiber(fiber.tsan_fiber, first ? 0 : __tsan_switch_to_fiber_no_sync);
#else
    static_cast<void>(first);
#endif
    swapcontext(&scheduler, &fiber.context);
#ifdef ON_HOST_ASAN
    __sanitizer_finish_switch_fiber(own_stack, nullptr, nullptr);
#endif
}

// The number of blocks that run at the same time: two, so that races between blocks show.
constexpr std::size_t BLOCKS_AT_ONCE = 2;

// One block, and the fibers of its threads. The fibers serve one block after another. A block begins only after the one
// before it has ended, so ThreadSanitizer misses nothing because of this.
class Team {
  public:
    explicit Team(int threads) : fibers_(threads) {
        for (Fiber& fiber : fibers_) {
            void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (stack == MAP_FAILED) stop("no memory for stacks", 0, threads);
            fiber.stack = static_cast<char*>(stack);
#ifdef ON_HOST_TSAN
            fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
        }
    }
    ~Team() {
        finish();
        for (Fiber& fiber : fibers_) {
            munmap(fiber.stack, STACK);
#ifdef ON_HOST_TSAN
            __tsan_destroy_fiber(fiber.tsan_fiber);
#endif
        }
    }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    bool busy() const { return block_ && block_->running > 0; }

    void start(uint3 index, void (*run)(const void*), const void* kernel) {
        finish();
        const int threads = static_cast<int>(fibers_.size());
        block_ = std::make_unique<Block>();
        block_->index = index;
        block_->barrier.threads = block_->running = threads;
        for (auto& lanes : block_->exchange) lanes = std::make_unique<Lane[]>((threads + WARP - 1) / WARP * WARP);
        for (int i = 0; i < threads; i += WARP) {
            block_->warp_barriers.push_back({});
            block_->warp_barriers.back().threads = threads - i < WARP ? threads - i : WARP;
        }
        for (int i = 0; i < threads; ++i) prepare(fibers_[i], static_cast<unsigned>(i), run, kernel);
        for (Fiber& fiber : fibers_) resume(fiber, true);
    }

    // Resumes each thread that can go on, once. Ends the program if none can.
    ON_HOST_INTERNAL bool step() {
        bool moved = false;
        for (Fiber& fiber : fibers_) {
            if (fiber.done || fiber.waits_for->round == fiber.round) continue;
            moved = true;
            resume(fiber, false);
        }
        if (!moved) stop("no thread can go on", block_->barrier.waiting, block_->barrier.threads);
        return moved;
    }

  private:
    void prepare(Fiber& fiber, unsigned thread, void (*run)(const void*), const void* kernel) {
#ifdef ON_HOST_ASAN
        __asan_unpoison_memory_region(fiber.stack, STACK);  // the last kernel never returned from its outermost frame
#endif
        char* const stack = fiber.stack;
        void* const tsan_fiber = fiber.tsan_fiber;  // creating one takes long
        fiber = Fiber{};
        fiber.stack = stack;
        fiber.tsan_fiber = tsan_fiber;
        fiber.block = block_.get();
        fiber.index = {thread, 0, 0};
        fiber.run = run;
        fiber.kernel = kernel;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stack;
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, fiber_main, 0);
    }

    void finish() {
        if (!block_) return;
        std::free(block_->shared_memory);
        block_.reset();
    }

    std::vector<Fiber> fibers_;
    std::unique_ptr<Block> block_;
};

// The teams for blocks of so many threads, made once for all kernels.
inline std::vector<std::unique_ptr<Team>>& teams_of(int threads) {
    static std::map<int, std::vector<std::unique_ptr<Team>>> made;
    std::vector<std::unique_ptr<Team>>& teams = made[threads];
    while (teams.size() < BLOCKS_AT_ONCE) teams.push_back(std::make_unique<Team>(threads));
    return teams;
}

// Runs kernel() in every thread of a grid of grid_x * grid_y blocks, and returns when all of them are done.
template <class Kernel>
void run_grid(std::int64_t grid_x, std::int64_t grid_y, int threads, const Kernel& kernel) {
#ifdef ON_HOST_TSAN
    scheduler_tsan = __tsan_get_current_fiber();
#endif
    const auto run = [](const void* kernel) { (*static_cast<const Kernel*>(kernel))(); };
    std::vector<std::unique_ptr<Team>>& teams = teams_of(threads);
    std::int64_t next = 0;
    for (bool busy = true; busy;) {
        busy = false;
        for (const auto& team : teams) {
            if (team->busy()) {
                team->step();
            } else if (next < grid_x * grid_y) {
                team->start({static_cast<unsigned>(next % grid_x), static_cast<unsigned>(next / grid_x), 0}, run,
                            &kernel);
                ++next;
            } else {
                continue;
            }
            busy = true;
        }
    }
}

// The shared memory of a block is exactly as large as the kernel asks for. It is filled with a pattern that is NaN in
// float32, so that unwritten memory shows. The first thread that asks for it fills it on behalf of all.
ON_HOST_INTERNAL inline void* block_memory(std::size_t size) {
    Block& block = this_block();
    if (block.shared_memory == nullptr) {
        if (posix_memalign(&block.shared_memory, 256, size) != 0) stop("no shared memory", 0, 0);
        std::memset(block.shared_memory, 0xff, size);
        release(&block);
    }
    acquire(&block);
    return block.shared_memory;
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::this_thread())
#define blockIdx (cuda_on_host::this_block().index)
#define ON_HOST_TEXT(x) #x
#define ON_HOST_PLACE(file, line) file ":" ON_HOST_TEXT(line)
#define __syncthreads() cuda_on_host::barrier_at(ON_HOST_PLACE(__FILE__, __LINE__), cuda_on_host::this_block().barrier)
#define __syncwarp() cuda_on_host::barrier_at(ON_HOST_PLACE(__FILE__, __LINE__), cuda_on_host::warp_barrier())

template <class T>
T& shared_memory() {
    return *static_cast<T*>(cuda_on_host::block_memory(sizeof(T)));
}
