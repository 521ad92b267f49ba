// The functions that bindings.cpp exposes: arguments as plain numbers, checked by ldm_fast/ops/cpu.py.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace ldm {

// Instruction sets that are compiled in and that this CPU has, widest last.
std::vector<std::string> isas();

// The one in use: the widest, or what set_isa chose (for tests). set_isa throws std::invalid_argument on an unknown
// name.
std::string isa();
void set_isa(const std::string& name);

using Address = uintptr_t;

// What the norm ops share: dtype, channels_last, silu, B, C, S, G, x, weight, bias, scale, shift, eps, threads.
using NormRecord = std::tuple<int, bool, bool, int64_t, int64_t, int64_t, int64_t, Address, Address, Address, Address,
                              Address, float, int>;

// statistics: mean and rstd of each group, (2, B, G) in float32.
void group_norm_silu(const NormRecord& norm, Address y, Address statistics);

// moments: (B, G, 3) in float64, count, mean and sum of squared deviations.
void group_norm_stats(const NormRecord& norm, Address moments);
void group_norm_apply(const NormRecord& norm, Address moments, Address y);

void group_norm_silu_backward(const NormRecord& norm, Address grad, Address statistics, Address dx, Address dweight,
                              Address dbias, Address dscale, Address dshift);

void attention(int dtype, int mask_kind, std::array<int64_t, 5> shape, Address q, Address k, Address v, Address mask,
               Address out, Address lse, std::array<int64_t, 3> q_stride, std::array<int64_t, 3> k_stride,
               std::array<int64_t, 3> v_stride, std::array<int64_t, 3> out_stride, std::array<int64_t, 4> mask_stride,
               float scale, int threads);

void attention_backward(int dtype, int mask_kind, std::array<int64_t, 5> shape, Address q, Address k, Address v,
                        Address mask, Address out, Address lse, Address grad, Address dq, Address dk, Address dv,
                        std::array<int64_t, 3> q_stride, std::array<int64_t, 3> k_stride,
                        std::array<int64_t, 3> v_stride, std::array<int64_t, 3> out_stride,
                        std::array<int64_t, 3> grad_stride, std::array<int64_t, 4> mask_stride, float scale,
                        int threads);

void nearest_codebook(int dtype, int search, std::array<int64_t, 4> shape, Address z, Address codebook,
                      std::array<int64_t, 3> z_stride, std::array<int64_t, 2> codebook_stride, Address index,
                      Address counts, Address sums, int threads);

// y[i] = the kernels' exp(x[i]), float32; for tests.
void exp_array(Address x, Address y, int64_t n);

// Runs `rounds` rounds of as many independent fused multiply-adds as the machine can do at a time, on each of `threads`
// threads, and returns how many those were. result (threads) receives their sums; for benchmarks.
int64_t fused_multiply_adds(int64_t rounds, float factor, Address result, int threads);

}  // namespace ldm
