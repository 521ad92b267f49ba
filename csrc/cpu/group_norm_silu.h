// How group_norm_silu works on a CPU: what both memory layouts share.
//
// A *unit* is what one set of statistics runs over: a group of a sample if x is contiguous (its channels lie one after
// another), a whole sample, with all its groups, if x is channels_last. A unit is worked through in *slabs* of about 64
// Ki elements, small enough that the second look at a slab comes from the L2 cache. Each direction has three phases:
//
//   forward   measure each slab (shifted sums, also of squares) | bring them together | apply y = act(x̂ p + q)
//   backward  add up dh and dh·x̂ per channel, for each slab      | add slabs in order     | apply dx
//
// with p = weight (1 + scale), q = bias (1 + scale) + shift, h = x̂ p + q. One thread takes a unit through all three
// while its data is in its cache if there are units enough for everybody; otherwise each phase spreads the slabs over
// the threads. The slabs are the same either way, so the result does not depend on the number of threads. Of groups
// that are one slab, two overlap: while one is applied, which is arithmetic, the thread's next is measured, from
// memory.
//
// A result too large for the caches is streamed past them (simd/stream.h): its lines need not be read before they are
// written, and x stays where the apply phase finds it. The lines of any other are prefetched: a store that waits for
// its line holds up all those behind it.
//
// The split form is the first two phases of the forward pass (Phases::measure) or the last two (Phases::apply).
//
// dh = dL/dh needs a sigmoid, the dearest part of it all, so the first backward phase keeps dh for the last one where
// that is nearer than computing it again, in the cache of the one thread that takes the unit through all phases:
// float32 in the place of dx, narrower types in scratch memory of the thread. dx is then in the cache before the last
// phase, which has little to compute, writes it; only a dx that is computed from scratch is streamed.
#pragma once

#include "huge_pages.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd/pair.h"

namespace ldm::LDM_ISA {

constexpr int64_t SLAB_ELEMENTS = 65536;
constexpr int64_t CACHED_BYTES = int64_t{16} << 20;  // of all that is read and written; more is streamed
constexpr int64_t KEPT_ELEMENTS = 131072;            // of dh in float32: 512 KiB, half an L2 cache
constexpr int64_t ELEMENTS_WORTH_A_THREAD = 16384;   // starting a team costs a few microseconds

// Chan, Golub & LeVeque (1979).
inline void merge(Moments& into, const Moments& other) {
    const double total = into.count + other.count, delta = other.mean - into.mean;
    into.mean += delta * (other.count / total);
    into.m2 += other.m2 + delta * delta * (into.count * other.count / total);
    into.count = total;
}

// From sums of d = x - shift. Any shift near the values does; the sums repair what it is off.
inline Moments moments(double count, double shift, double sum, double sum_of_squares) {
    const double off = sum / count;
    return {count, shift + off, sum_of_squares - sum * off};
}

// What the apply phase needs of a group. `rest` is what rounding the mean to float32 loses, in standard deviations: it
// goes into q. With mean 1e3 and std 1 that is 3e-5 of the result.
struct Centre {
    float mean, rstd, rest;
};

inline Centre centre(const Moments& m, float eps) {
    const double variance = (m.m2 > 0 ? m.m2 : m.m2 * 0.0) / m.count + eps;  // a NaN stays one
    const float mean = static_cast<float>(m.mean), rstd = static_cast<float>(1.0 / __builtin_sqrt(variance));
    return {mean, rstd, static_cast<float>(m.mean - mean) * rstd};
}

// Of group i of all B * G, from its moments, measured or given; noted where they are wanted.
inline Centre conclude(const GroupNormSilu& a, int64_t i, const Moments& measured) {
    if (a.phases == Phases::measure) a.moments[i] = measured;
    const Centre c = centre(a.phases == Phases::apply ? a.moments[i] : measured, a.eps);
    if (a.phases == Phases::whole) a.mean[i] = c.mean, a.rstd[i] = c.rstd;
    return c;
}

// What the apply phase multiplies p and q by, so that exp2 can take what they give, t = stretch h, as it is.
constexpr float stretch(bool silu) { return silu ? -LOG2_E : 1.0f; }

// Of n channels from `channel` on in one group: what the apply phase multiplies x - mean by and what it adds to it.
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

// How exactly a sigmoid has to be known whose result is rounded to T: the degree of the polynomial in exp2.
template <class T>
constexpr int DEGREE = 5;
template <>
constexpr int DEGREE<f16> = 4;
template <>
constexpr int DEGREE<bf16> = 3;

// The activation of h = t / stretch, in place; SiLU is t / (stretch + stretch 2^t). A division takes less than a
// reciprocal and what mends it.
template <class T, bool silu, int n>
[[gnu::always_inline]] inline void activate(F (&t)[n]) {
    if constexpr (silu) {
        F divisor[n];
        exp2<DEGREE<T>>(t, divisor, stretch(silu), stretch(silu));
        for (int v = 0; v < n; ++v) t[v] = t[v] / divisor[v];
    }
}

// grad times the derivative of the activation at h = t / stretch, in place.
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

// A condition that loops are compiled for. The phases around the loops are the same code whatever it is: choose() calls
// body with the conditions as constants, once for a slab.
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

// With one pixel both layouts are the same memory, and vectors should run over channels.
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

// One thread takes a unit through all phases.
inline bool unit_by_unit(int64_t units, int64_t slabs, int threads) {
    return slabs == 1 || threads == 1 || units >= 4 * threads || units % threads == 0;
}

// Runs the three phases: first(unit, slab, slot), then between(unit, slot), then last(unit, slab, slot), with the slot
// of the thread (see parallel_for). The slabs come back in reverse order: those read last are the nearest.
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

// Where the first backward phase keeps dh for the last one, if a unit of it fits. at(unit, slot) is null where it is to
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
