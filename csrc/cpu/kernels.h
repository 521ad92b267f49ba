// What every instruction set provides: one struct of arguments and one function for each op.
//
// The kernel sources are compiled once per instruction set, each time in a namespace of its own (LDM_ISA = portable,
// avx2, avx512, avx512bf16), and dispatch.cpp chooses one by cpuid. Nothing outside these namespaces may be compiled
// with the wider instructions: the linker could keep that copy of a shared inline function for every machine. For the
// same reason kernels use no templates of the standard library.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace ldm {

// Count, mean and sum of squared deviations of a group's numbers.
struct Moments {
    double count, mean, m2;
};

// The op in one go, or in two for an image in tiles: first the groups of each tile are measured, then the merged
// moments are applied.
enum class Phases { whole, measure, apply };

// The arguments that the norm ops share. x (B, C, S) is contiguous, or (B, S, C) if channels_last. weight and bias (C),
// scale and shift (B, C) are float32, null if absent.
struct Norm {
    Dtype dtype;
    bool channels_last, silu;
    int64_t batch, channels, spatial, groups;
    const void* x;
    const float *weight, *bias, *scale, *shift;
    float eps;
    int threads;
};

// y like x. mean and rstd (B, G): of `whole` alone. moments (B, G): written by `measure`, read by `apply`.
struct GroupNormSilu : Norm {
    Phases phases;
    void* y;
    float *mean, *rstd;
    Moments* moments;
};

// grad and dx like x. dweight, dbias (C), dscale, dshift (B, C) in float32, null if not wanted.
struct GroupNormSiluBackward : Norm {
    const void* grad;
    const float *mean, *rstd;
    void* dx;
    float *dweight, *dbias, *dscale, *dshift;
};

// q and out (B, H, N, D), k and v (B, H, M, D). Their strides are in elements, for the first three dimensions; the last
// stride is 1. mask (B, H, N, M) has four strides; lse (B, H, N) is contiguous.
struct Attention {
    Dtype dtype;
    MaskKind mask_kind;
    int64_t batch, heads, rows, keys, width;
    const void *q, *k, *v, *mask;
    void* out;
    float* lse;
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3], mask_stride[4];
    float scale;
    int threads;
};

// `forward` holds the arguments of the forward pass, with its results in out and lse. grad is like out, with strides of
// its own; dq, dk and dv are contiguous.
struct AttentionBackward {
    Attention forward;
    const void* grad;
    int64_t grad_stride[3];
    void *dq, *dk, *dv;
};

// How to search the codebook. All ways find the same indices; `automatic` chooses one of them.
enum class CodebookSearch : int { automatic = 0, brute_force = 1, pruned = 2, bf16_candidates = 3 };

// z (B, S, d) and codebook (K, d) with any strides, index (B, S). counts (K) and sums (K, d) are null if not wanted.
struct NearestCodebook {
    Dtype dtype;
    CodebookSearch search;
    int64_t batch, rows, codes, width;
    const void *z, *codebook;
    int64_t z_stride[3], codebook_stride[2];
    int64_t *index, *counts;
    float* sums;
    int threads;
};

// Each op returns false if it could not get the scratch memory it needs; nothing throws.
#define LDM_DECLARE_KERNELS(isa)                                 \
    namespace isa {                                              \
    bool group_norm_silu(const GroupNormSilu&);                  \
    bool group_norm_silu_backward(const GroupNormSiluBackward&); \
    bool attention(const Attention&);                            \
    bool attention_backward(const AttentionBackward&);           \
    bool nearest_codebook(const NearestCodebook&);               \
    void exp_array(const float* x, float* y, int64_t n);         \
    int64_t fused_multiply_adds(int64_t, float, float*, int);    \
    }

LDM_DECLARE_KERNELS(portable)
LDM_DECLARE_KERNELS(avx2)
LDM_DECLARE_KERNELS(avx512)
LDM_DECLARE_KERNELS(avx512bf16)

#undef LDM_DECLARE_KERNELS

}  // namespace ldm
