// How group_norm_silu works on a CPU: everything that both memory layouts share.
//
// A *unit* is what one set of statistics is taken over: if x is contiguous, one group of a sample (its channels lie one
// after another); if x is channels_last, a whole sample with all its groups. A unit is worked through in *slabs* of
// about 64 Ki elements, small enough for the second pass over a slab to find it in the L2 cache. Each direction has
// three phases:
//
//   forward   measure each slab (shifted sums, also of squares) | bring them together | apply y = act(x̂ p + q)
//   backward  add up dh and dh·x̂ per channel, for each slab      | add slabs in order     | apply dx
//
// with p = weight (1 + scale), q = bias (1 + scale) + shift, h = x̂ p + q. If there are enough units for all threads,
// one thread takes a unit through all three phases while the data is in its cache; otherwise each phase spreads the
// slabs over the threads. The slabs are the same either way, so the result does not depend on the number of threads. If
// a group is one slab, two groups overlap: while the thread applies one, which is arithmetic, it measures its next one,
// which comes from memory.
//
// A result too large for the caches is streamed past them (simd/stream.h): its lines need not be read before they are
// written, and x stays in the cache for the apply phase. The lines of a smaller result are prefetched, because a store
// that waits for its line holds up all stores after it.
//
// The split form of the op is the first two phases of the forward pass (Phases::measure) or the last two
// (Phases::apply).
//
// dh = dL/dh needs a sigmoid, the most expensive part of all. So the first backward phase keeps dh for the last one if
// reading it back is cheaper than computing it again: in the cache of the one thread that takes the unit through all
// phases, for float32 in the place of dx, for narrower types in scratch memory of the thread. The last phase, which
// computes little, then finds dx in the cache when it writes it. Only a dx that is computed from scratch is streamed.
#pragma once

#include "huge_pages.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd/pair.h"

namespace ldm::LDM_ISA {

constexpr int64_t SLAB_ELEMENTS = 65536;
constexpr int64_t CACHED_BYTES = int64_t{16} << 20;  // read and written in total; beyond that, the result is streamed
constexpr int64_t KEPT_ELEMENTS = 131072;            // of dh in float32: 512 KiB, half an L2 cache
constexpr int64_t ELEMENTS_WORTH_A_THREAD = 16384;   // starting a team costs a few microseconds

// Merges two sets of numbers: Chan, Golub & LeVeque (1979).
inline void merge(Moments& into, const Moments& other) {
    const double total = into.count + other.count, delta = other.mean - into.mean;
    into.mean += delta * (other.count / total);
    into.m2 += other.m2 + delta * delta * (into.count * other.count / total);
    into.count = total;
}

// From sums of d = x - shift and of d². Any shift near the values will do; the sums correct for its distance from the
// mean.
inline Moments moments(double count, double shift, double sum, double sum_of_squares) {
    const double off = sum / count;
    return {count, shift + off, sum_of_squares - sum * off};
}

// What the apply phase needs to know of a group. `rest` is what the mean loses when it is rounded to float32, in
// standard deviations; it goes into q. With mean 1e3 and standard deviation 1 it makes 3e-5 of the result.
struct Centre {
    float mean, rstd, rest;
};

inline Centre centre(const Moments& m, float eps) {
    const double variance = (m.m2 > 0 ? m.m2 : m.m2 * 0.0) / m.count + eps;  // a NaN stays one
    const float mean = static_cast<float>(m.mean), rstd = static_cast<float>(1.0 / __builtin_sqrt(variance));
    return {mean, rstd, static_cast<float>(m.mean - mean) * rstd};
}

// The centre of group i of all B * G from its moments, measured or given. Stores the moments or the statistics if they
// are wanted.
inline Centre conclude(const GroupNormSilu& a, int64_t i, const Moments& measured) {
    if (a.phases == Phases::measure) a.moments[i] = measured;
    const Centre c = centre(a.phases == Phases::apply ? a.moments[i] : measured, a.eps);
    if (a.phases == Phases::whole) a.mean[i] = c.mean, a.rstd[i] = c.rstd;
    return c;
}

// What the apply phase multiplies p and q by, so that exp2 can take the result, t = stretch h, as it is.
constexpr float stretch(bool silu) { return silu ? -LOG2_E : 1.0f; }

// For n channels of one group, from `channel` on: the gains that the apply phase multiplies x - mean by, and the
// offsets that it adds.
template <class Args>
inline void write_affine(const Args& a, int64_t batch, int64_t channel, int64_t n, Centre centre, float* gains,
                         float* offsets) {
    const int64_t first = batch * a.channels + channel;
    const F stretched = set(stretch(a.silu));
    each_vector(n, [&](int64_t i, auto lanes) {
        F p = stretched, q = zero();
        if (a.scale) p = p + p * load(a.scale + first + i, lanes);
        if (a.bias) q = p * load(a.bias + channel + i, lanes);
        if (a.shift) q = fma(load(a.shift + first + i, lanes), stretched, q);
        if (a.weight) p = p * load(a.weight + channel + i, lanes);
        store(gains + i, p * centre.rstd, lanes), store(offsets + i, q - p * centre.rest, lanes);
    });
}

// The degree of the polynomial in exp2: how exactly a sigmoid has to be known if its result is rounded to T.
template <class T>
constexpr int DEGREE = 5;
template <>
constexpr int DEGREE<f16> = 4;
template <>
constexpr int DEGREE<bf16> = 3;

// Applies the activation to h = t / stretch, in place; SiLU is t / (stretch + stretch 2^t). A division takes less time
// than a reciprocal and the steps that correct it.
template <class T, bool silu, int n>
[[gnu::always_inline]] inline void activate(F (&t)[n]) {
    if constexpr (silu) {
        F divisor[n];
        exp2<DEGREE<T>>(t, divisor, stretch(silu), stretch(silu));
        for (int v = 0; v < n; ++v) t[v] = t[v] / divisor[v];
    }
}

// Multiplies grad by the derivative of the activation at h = t / stretch, in place.
template <class T, bool silu, int n>
[[gnu::always_inline]] inline void through_activation(F (&grad)[n], const F (&t)[n]) {
    if constexpr (silu) {
        F divisor[n];
        exp2<DEGREE<T>>(t, divisor, 1.0f, 1.0f);
        for (int v = 0; v < n; ++v) {
            const F s = 1.0f / divisor[v];
            grad[v] = grad[v] * s * fma(t[v] * (1.0f / stretch(silu)), 1.0f - s, set(1.0f));
        }
    }
}

// A condition that loops are compiled for. The phases around the loops are the same code for both of its values:
// choose() calls body with the conditions as constants, once for a slab.
template <bool condition>
struct Known {
    static constexpr bool value = condition;
};

template <class Body>
inline void choose(bool condition, const Body& body) {
    condition ? body(Known<true>{}) : body(Known<false>{});
}

template <class Body>
inline void choose(bool silu, bool streamed, const Body& body) {
    choose(silu, [&](auto with_silu) {
        if constexpr (STREAMS) {
            choose(streamed, [&](auto with_streams) { body(with_silu, with_streams); });
        } else {
            (void)streamed;
            body(with_silu, Known<false>{});
        }
    });
}

// With one pixel both layouts are the same memory; vectors should then run over channels.
template <class Args>
inline bool channels_innermost(const Args& a) {
    return a.channels_last || a.spatial == 1;
}

// Whether to stream the result. `out` is null if nothing of that size is written; `arrays` is how many arrays of its
// size are read and written.
template <class T, class Args>
inline bool streamed(const Args& a, void* out, int arrays) {
    const int64_t bytes = out ? a.batch * a.channels * a.spatial * static_cast<int64_t>(sizeof(T)) : 0;
    prefer_huge_pages(out, bytes);
    const int64_t row = channels_innermost(a) ? a.channels : a.spatial;
    return arrays * bytes >= CACHED_BYTES && streamable(static_cast<const T*>(out), row);
}

template <class Args>
inline int team(const Args& a) {
    const int64_t useful = a.batch * a.channels * a.spatial / ELEMENTS_WORTH_A_THREAD;
    return useful < 1 ? 1 : useful < a.threads ? static_cast<int>(useful) : a.threads;
}

// Whether one thread takes a unit through all phases.
inline bool unit_by_unit(int64_t units, int64_t slabs, int threads) {
    return slabs == 1 || threads == 1 || units >= 4 * threads || units % threads == 0;
}

// Runs the three phases: first(unit, slab, slot), between(unit, slot) and last(unit, slab, slot), where slot belongs to
// the thread (see parallel_for). The last phase takes the slabs in reverse order: those read last are the nearest.
template <class First, class Between, class Last>
inline void run_phases(int64_t units, int64_t slabs, int threads, const First& first, const Between& between,
                       const Last& last) {
    if (unit_by_unit(units, slabs, threads)) {
        parallel_shares(units, threads, [&](int64_t unit, int slot) {
            for (int64_t slab = 0; slab < slabs; ++slab) first(unit, slab, slot);
            between(unit, slot);
            for (int64_t slab = slabs - 1; slab >= 0; --slab) last(unit, slab, slot);
        });
        return;
    }
    parallel_for(units * slabs, 1, threads, [&](int64_t begin, int64_t end, int slot) {
        for (int64_t i = begin; i < end; ++i) first(i / slabs, i % slabs, slot);
    });
    for (int64_t unit = 0; unit < units; ++unit) between(unit, 0);
    parallel_for(units * slabs, 1, threads, [&](int64_t begin, int64_t end, int slot) {
        for (int64_t i = units * slabs - 1 - begin; i > units * slabs - 1 - end; --i) last(i / slabs, i % slabs, slot);
    });
}

// Where the first backward phase keeps dh for the last one, if a unit of it fits. at(unit, slot) is null if dh has to
// be computed again.
template <class T>
struct Kept {
    float* in_place;
    int64_t per_unit;
    bool fits;
    Scratch<float> scratch;

    Kept(T* dx, int64_t per_unit, bool by_one_thread, int threads)
        : in_place(sizeof(T) == sizeof(float) ? reinterpret_cast<float*>(dx) : nullptr),
          per_unit(per_unit),
          fits(by_one_thread && per_unit <= KEPT_ELEMENTS),
          scratch(fits && !in_place ? per_unit * threads : 0) {}

    float* at(int64_t unit, int slot) const {
        if (!fits) return nullptr;
        return in_place ? in_place + unit * per_unit : scratch.data + slot * per_unit;
    }
};

// Computes the gradients of the parameters from dh and dh_x (B, C), which are Σ dL/dh and Σ dL/dh · x̂ per sample and
// channel.
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
