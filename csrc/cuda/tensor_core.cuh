// The instructions that C++ cannot express: one product on the tensor cores, and copies that run beside the arithmetic.
// They need sm_80 or newer. tests/cuda_host has a twin of each for the CPU.
#pragma once

#ifdef __CUDACC__
#include <cstdint>

namespace ldm_fast {

// sums += a b for a 16 x 16 (row by row) and b 16 x 8 (column by column) of bfloat16, over a warp: PTX ISA,
// mma.m16n8k16. With g = lane / 4 and t = lane % 4, two numbers to a register, the lower one first:
//   a: rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8, 2t + 8;  b: rows 2t, 2t + 8 of column g;
//   sums: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ inline void multiply_add(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies 16 bytes from global to shared memory. They are there after wait_for_copies for this thread, and after a
// barrier for the others.
__device__ inline void copy_async(void* shared, const void* global) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(shared))),
        "l"(global)
        : "memory");
}

// Waits for all copies that this thread has begun.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace ldm_fast
#endif
