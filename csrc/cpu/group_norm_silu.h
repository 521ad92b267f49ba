// How group_norm_silu works on a CPU: what both memory layouts share.
//
// A *unit* is what one set of statistics runs over: a group of a sample if x is contiguous (its channels lie one after
// another), a whole sample, with all its groups, if x is channels_last. A unit is worked through in *slabs* of about 64
// Ki elements, small enough that the second look at a slab comes from the L2 cache. Each direction has three phases:
//
//   forward   measure each slab (shifted mean and sum of squares) | merge slabs in float64 | apply y = act(x̂ p + q)
//   backward  add up dh and dh·x̂ per channel, for each slab      | add slabs in order     | apply dx
//
// with p = weight (1 + scale), q = bias (1 + scale) + shift, h = x̂ p + q. One thread takes a unit through all three
// while its data is in its cache if there are units enough for everybody; otherwise each phase spreads the slabs over
// the threads. The slabs are the same either way, so the result does not depend on the number of threads.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd/vec.h"

namespace ldm::LDM_ISA {

constexpr int64_t SLAB_ELEMENTS = 65536;
constexpr int64_t ELEMENTS_WORTH_A_THREAD = 16384;  // starting a team costs a few microseconds

// Count, mean and sum of squared deviations; merged by Chan, Golub & LeVeque (1979).
struct Moments {
    double count, mean, m2;

    void merge(const Moments& other) {
        const double total = count + other.count, delta = other.mean - mean;
        mean += delta * (other.count / total);
        m2 += other.m2 + delta * delta * (count * other.count / total);
        count = total;
    }
};

// From sums of d = x - shift. Any shift near the values does; the sums repair what it is off.
inline Moments moments(double count, double shift, double sum, double sum_of_squares) {
    const double off = sum / count;
    return {count, shift + off, sum_of_squares - sum * off};
}

inline float reciprocal_std(const Moments& m, float eps) {
    const double variance = (m.m2 > 0 ? m.m2 : m.m2 * 0.0) / m.count + eps;  // a NaN stays one
    return static_cast<float>(1.0 / __builtin_sqrt(variance));
}

// p and q of one channel.
struct Affine {
    float p, q;
};

template <class Args>
inline Affine affine(const Args& a, int64_t batch, int64_t channel) {
    const int64_t i = batch * a.channels + channel;
    const float gain = a.scale ? 1.0f + a.scale[i] : 1.0f;
    const float weight = a.weight ? a.weight[channel] : 1.0f, bias = a.bias ? a.bias[channel] : 0.0f;
    return {weight * gain, bias * gain + (a.shift ? a.shift[i] : 0.0f)};
}

template <bool silu>
inline F activate(F h) {
    return silu ? h * sigmoid(h) : h;
}

// grad times the derivative of the activation at h.
template <bool silu>
inline F through_activation(F grad, F h) {
    if (!silu) return grad;
    const F s = sigmoid(h);
    return grad * s * fma(h, 1.0f - s, set(1.0f));
}

template <class Args>
inline int team(const Args& a) {
    const int64_t useful = a.batch * a.channels * a.spatial / ELEMENTS_WORTH_A_THREAD;
    return useful < 1 ? 1 : useful < a.threads ? static_cast<int>(useful) : a.threads;
}

// Runs the three phases: first(unit, slab), then between(unit), then last(unit, slab).
template <class First, class Between, class Last>
inline void run_phases(int64_t units, int64_t slabs, int threads, const First& first, const Between& between,
                       const Last& last) {
    if (slabs == 1 || threads == 1 || units >= 4 * threads || units % threads == 0) {
        const int64_t grain = units / (threads * 4);
        parallel_for(units, grain, threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t unit = begin; unit < end; ++unit) {
                for (int64_t slab = 0; slab < slabs; ++slab) first(unit, slab);
                between(unit);
                for (int64_t slab = 0; slab < slabs; ++slab) last(unit, slab);
            }
        });
        return;
    }
    parallel_for(units * slabs, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) first(i / slabs, i % slabs);
    });
    for (int64_t unit = 0; unit < units; ++unit) between(unit);
    parallel_for(units * slabs, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) last(i / slabs, i % slabs);
    });
}

// The gradients of the parameters from dh and dh_x (B, C): per sample and channel, Σ dL/dh and Σ dL/dh · x̂.
inline void parameter_gradients(const GroupNormSiluBackward& a, const float* dh, const float* dh_x) {
    const int64_t C = a.channels;
    const auto over_batch = [&](const float* terms, float* out) {
        for (int64_t c = 0; c < C; ++c) out[c] = 0.0f;
        for (int64_t b = 0; b < a.batch; ++b) {
            const float *const term = terms + b * C, *const scale = a.scale ? a.scale + b * C : nullptr;
            if (scale) {
                for (int64_t c = 0; c < C; ++c) out[c] += (1.0f + scale[c]) * term[c];
            } else {
                for (int64_t c = 0; c < C; ++c) out[c] += term[c];
            }
        }
    };
    if (a.dweight) over_batch(dh_x, a.dweight);
    if (a.dbias) over_batch(dh, a.dbias);
    for (int64_t i = 0; a.dscale && i < a.batch * C; ++i)
        a.dscale[i] = (a.weight ? a.weight[i % C] : 1.0f) * dh_x[i] + (a.bias ? a.bias[i % C] : 0.0f) * dh[i];
    if (a.dshift) memcpy(a.dshift, dh, static_cast<size_t>(a.batch * C) * sizeof(float));
}

}  // namespace ldm::LDM_ISA
