// The functions that bindings.cpp exposes. ldm_fast/ops checks their arguments.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace ldm {

// Instruction sets that are compiled in and that this CPU has, widest last.
std::vector<std::string> isas();

// The one in use: the widest, or what set_isa chose (for tests). set_isa throws std::invalid_argument for an unknown
// name.
std::string isa();
void set_isa(const std::string& name);

using Address = uintptr_t;

// statistics: mean and rstd of each group, (2, B, G) in float32.
void group_norm_silu(const Norm& norm, Address y, Address statistics);

// moments: (B, G, 3) in float64, count, mean and sum of squared deviations.
void group_norm_stats(const Norm& norm, Address moments);
void group_norm_apply(const Norm& norm, Address moments, Address y);

// The last four are the gradients of the vectors, 0 for those that norm does not have.
void group_norm_silu_backward(const Norm& norm, Address grad, Address statistics, Address dx, Address dweight,
                              Address dbias, Address dscale, Address dshift);

void attention(const Attention& arguments);
void attention_backward(const AttentionBackward& arguments);
void nearest_codebook(const NearestCodebook& arguments);

// y[i] = exp(x[i]) as the kernels compute it, in float32; for tests.
void exp_array(Address x, Address y, int64_t n);

// Runs `rounds` rounds of as many independent fused multiply-adds as the machine can do at a time, on each of `threads`
// threads, and returns how many those were. result (threads) receives their sums; for benchmarks.
int64_t fused_multiply_adds(int64_t rounds, float factor, Address result, int threads);

}  // namespace ldm
