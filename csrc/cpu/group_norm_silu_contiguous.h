// group_norm_silu for (B, C, S): a unit is one group, C / G channels of S numbers each; a slab is some of these
// channels.
#pragma once

#include "group_norm_silu.h"

namespace ldm::LDM_ISA::contiguous {

constexpr int64_t CHUNK = 8192;   // numbers whose deviations are added up in float32
constexpr int64_t SAMPLE = 16;    // vectors whose mean the deviations are taken from
constexpr int64_t ONCE = 64 * W;  // with fewer numbers, all of them are sampled
constexpr int64_t AHEAD = 256;    // how many numbers before it is measured, beside another group, a number is fetched
constexpr int64_t AT_ONCE = 64;   // channels whose gains and offsets are written out before they are used

// A number near the mean of n numbers: the mean of all of them, or of SAMPLE vectors spread over them.
template <class T>
inline float near_mean(const T* x, int64_t n) {
    F s = zero();
    if (n < ONCE) {
        each_vector(n, [&](int64_t i, auto lanes) { s += load(x + i, lanes); });
        return sum(s) / static_cast<float>(n);
    }
    const int64_t step = (n - W) / (SAMPLE - 1);
    for (int64_t k = 0; k < SAMPLE; ++k) s += load(x + k * step, Full{});
    return sum(s) / static_cast<float>(SAMPLE * W);
}

// Sums of deviations from `shift`, taken four vectors at a time: four chains of additions.
struct Deviations {
    struct Sums {
        F sum, squares;
    } a{}, b{}, c{}, d{};

    [[gnu::always_inline]] static void add(Sums& to, F v) {
        to.sum += v;
        to.squares = fma(v, v, to.squares);
    }
    [[gnu::always_inline]] void add(const F (&v)[4], F shift) {
        add(a, v[0] - shift), add(b, v[1] - shift), add(c, v[2] - shift), add(d, v[3] - shift);
    }
    [[gnu::always_inline]] Moments moments_of(int64_t count, float shift) const {
        const F s = (a.sum + b.sum) + (c.sum + d.sum), t = (a.squares + b.squares) + (c.squares + d.squares);
        return moments(static_cast<double>(count), shift, sum(s), sum(t));
    }
};

template <class T>
inline Moments measure(const T* x, int64_t n) {
    Moments total{0, 0, 0};
    const float near = near_mean(x, n);
    const F shift = set(near);
    for (int64_t begin = 0; begin < n; begin += CHUNK) {
        const T* const chunk = x + begin;
        const int64_t count = n - begin < CHUNK ? n - begin : CHUNK;
        Deviations deviations;
        int64_t i = 0;
        for (; i + 4 * W <= count; i += 4 * W) {
            F v[4];
            load(chunk + i, v, Pairs<2>{});
            deviations.add(v, shift);
        }
        each_vector(count - i, [&](int64_t j, auto lanes) {
            Deviations::add(deviations.a, only(load(chunk + i + j, lanes) - shift, lanes));
        });
        merge(total, deviations.moments_of(count, near));
    }
    return total;
}

struct Slabs {
    int64_t channels_per_group, channels_per_slab, per_unit;

    Slabs(int64_t channels, int64_t groups, int64_t spatial) {
        channels_per_group = channels / groups;
        channels_per_slab = SLAB_ELEMENTS / spatial < 1 ? 1 : SLAB_ELEMENTS / spatial;
        per_unit = (channels_per_group + channels_per_slab - 1) / channels_per_slab;
    }
    // How far beyond a number of this group the same number of the next group lies, to be prefetched while this one is
    // computed; 0 for large groups, which would not stay in the cache.
    int64_t ahead(int64_t spatial) const {
        return channels_per_group * spatial <= SLAB_ELEMENTS ? channels_per_group * spatial : 0;
    }
    int64_t begin(int64_t slab) const { return slab * channels_per_slab; }
    int64_t end(int64_t slab) const {
        const int64_t end = (slab + 1) * channels_per_slab;
        return end < channels_per_group ? end : channels_per_group;
    }
};

// Computes y of n pixels of one channel. What is needed next lies `ahead` beyond x.
template <class T, bool silu, bool streamed>
inline void apply(const T* x, T* y, int64_t n, float mean, float gain, float offset, int64_t ahead) {
    const F m = set(mean), p = set(gain), q = set(offset);
    constexpr int64_t LINE = 64 / sizeof(T);
    each_pair<2>(n, [&](int64_t i, auto vectors) {
        for (int64_t j = 0; j < vectors.n * W; j += LINE) {
            __builtin_prefetch(x + i + j + ahead, 0, 2);
            if (!streamed) __builtin_prefetch(y + i + j, 1);
        }
        F t[vectors.n];
        load(x + i, t, vectors);
        for (F& h : t) h = fma(h - m, p, q);
        activate<T, silu>(t);
        store<streamed>(y + i, t, vectors);
    });
}

// Computes y of `channels` channels from number `first` of all B * C on. Like apply_and_measure it is never inlined:
// what GCC makes of a loop depends on the function around it, and one for each case gives the same code whoever calls
// it.
template <class T, bool silu, bool streamed>
[[gnu::noinline]] void apply_slab(const GroupNormSilu& a, int64_t first, int64_t channels, Centre centre,
                                  int64_t ahead) {
    const T* const x = static_cast<const T*>(a.x);
    T* const y = static_cast<T*>(a.y);
    float gains[AT_ONCE], offsets[AT_ONCE];
    for (int64_t begin = 0; begin < channels; begin += AT_ONCE) {
        const int64_t count = channels - begin < AT_ONCE ? channels - begin : AT_ONCE, channel = first + begin;
        write_affine(a, channel / a.channels, channel % a.channels, count, centre, gains, offsets);
        for (int64_t k = 0; k < count; ++k) {
            const int64_t from = (channel + k) * a.spatial;
            apply<T, silu, streamed>(x + from, y + from, a.spatial, centre.mean, gains[k], offsets[k], ahead);
        }
    }
}

// Computes y of the `channels` of a group and the moments of the next group, as measure(next, channels * spatial) finds
// them: while one is computed, the other comes from memory. spatial is a multiple of 4 W.
template <class T, bool silu, bool streamed>
[[gnu::noinline]] Moments apply_and_measure(const T* x, T* y, int64_t channels, int64_t spatial, float mean,
                                            const float* gains, const float* offsets, const T* next) {
    constexpr int64_t LINE = 64 / sizeof(T);
    const float near = near_mean(next, channels * spatial);
    const F m = set(mean), shift = set(near);
    Moments total{0, 0, 0};
    Deviations deviations;
    int64_t added = 0;
    for (int64_t k = 0; k < channels; ++k) {
        const F p = set(gains[k]), q = set(offsets[k]);
        for (int64_t end = (k + 1) * spatial, i = k * spatial; i < end;) {
            const int64_t stop = end - i < CHUNK - added ? end : i + CHUNK - added;
            added += stop - i;
            for (; i < stop; i += 4 * W) {
                F t[4], v[4];
                load(x + i, t, Pairs<2>{}), load(next + i, v, Pairs<2>{});
                for (int64_t j = i; j < i + 4 * W; j += LINE) {
                    __builtin_prefetch(next + j + AHEAD, 0, 2);
                    if (!streamed) __builtin_prefetch(y + j, 1);
                }
                for (F& h : t) h = fma(h - m, p, q);
                activate<T, silu>(t);
                deviations.add(v, shift);
                store<streamed>(y + i, t, Pairs<2>{});
            }
            if (added == CHUNK || (k + 1 == channels && i == end)) {
                merge(total, deviations.moments_of(added, near));
                deviations = Deviations{}, added = 0;
            }
        }
    }
    return total;
}

template <class T>
bool forward(const GroupNormSilu& a, bool streamed) {
    const Slabs slabs(a.channels, a.groups, a.spatial);
    const int64_t units = a.batch * a.groups;
    const T* const x = static_cast<const T*>(a.x);
    T* const y = static_cast<T*>(a.y);
    Scratch<Moments> measured(units * slabs.per_unit);
    Scratch<Centre> centres(units);
    if (!measured.data || !centres.data) return false;

    const auto first = [&](int64_t unit, int64_t slab, int) {
        if (a.phases == Phases::apply) return;
        const int64_t begin = slabs.begin(slab), n = (slabs.end(slab) - begin) * a.spatial;
        const int64_t channel = unit * slabs.channels_per_group + begin;
        measured.data[unit * slabs.per_unit + slab] = measure(x + channel * a.spatial, n);
    };
    const auto between = [&](int64_t unit, int) {
        Moments* const of_slabs = measured.data + unit * slabs.per_unit;
        for (int64_t slab = 1; slab < slabs.per_unit; ++slab) merge(of_slabs[0], of_slabs[slab]);
        centres.data[unit] = conclude(a, unit, of_slabs[0]);
    };
    const auto last = [&](int64_t unit, int64_t slab, int) {
        if (a.phases == Phases::measure) return;
        const int64_t begin = slabs.begin(slab), channel = unit * slabs.channels_per_group + begin;
        choose(a.silu, streamed, [&](auto silu, auto streamed) {
            apply_slab<T, silu.value, streamed.value>(a, channel, slabs.end(slab) - begin, centres.data[unit],
                                                      slabs.ahead(a.spatial));
        });
        if (streamed) finish_streaming();
    };
    const int threads = team(a);
    if (a.phases != Phases::whole || slabs.per_unit > 1 || a.spatial % (4 * W) != 0) {
        run_phases(units, slabs.per_unit, threads, first, between, last);
        return true;
    }
    const int64_t channels = slabs.channels_per_group, per_unit = channels * a.spatial;
    Scratch<float> affine(2 * channels * threads);
    if (!affine.data) return false;
    parallel_claims(units, threads, [&](const auto& claim, int slot) {
        float *const gains = affine.data + 2 * channels * slot, *const offsets = gains + channels;
        int64_t unit = claim();
        if (unit < 0) return;
        first(unit, 0, slot);
        for (int64_t next = claim(); next >= 0; next = claim()) {
            between(unit, slot);
            const int64_t sample = unit / a.groups, channel = unit * channels - sample * a.channels;
            write_affine(a, sample, channel, channels, centres.data[unit], gains, offsets);
            choose(a.silu, streamed, [&](auto silu, auto streamed) {
                measured.data[next] = apply_and_measure<T, silu.value, streamed.value>(
                    x + unit * per_unit, y + unit * per_unit, channels, a.spatial, centres.data[unit].mean, gains,
                    offsets, x + next * per_unit);
            });
            unit = next;
        }
        between(unit, slot), last(unit, 0, slot);
    });
    return true;
}

// Computes Σ dh and Σ dh (x - mean) over n pixels of one channel; dh goes to `kept` if that is not null. What is needed
// next lies `ahead` beyond x and grad, and at dx.
template <class T, bool silu>
inline void add_channel(const T* x, const T* grad, int64_t n, float mean, float gain, float offset, float* kept,
                        const T* dx, int64_t ahead, double* sums) {
    const F m = set(mean), p = set(gain), q = set(offset);
    for (int64_t begin = 0; begin < n; begin += SLAB_ELEMENTS) {
        const int64_t count = n - begin < SLAB_ELEMENTS ? n - begin : SLAB_ELEMENTS;
        F s = zero(), t = zero();
        each_pair(count, [&](int64_t j, auto vectors) {
            constexpr int V = decltype(vectors)::n;
            const int64_t i = begin + j;
            F off[V], h[V], d[V];
            load(x + i, off, vectors), load(grad + i, d, vectors);
            for (int v = 0; v < V; ++v) off[v] = only(off[v] - m, vectors.lanes), h[v] = fma(off[v], p, q);
            through_activation<T, silu>(d, h);
            for (int v = 0; v < V; ++v) {
                d[v] = only(d[v], vectors.lanes);  // past the end grad is 0, but 0 times an overflow would be NaN
                s += d[v];
                t = fma(d[v], off[v], t);
                if (kept) __builtin_prefetch(dx + i + v * W, 1, 2);
                __builtin_prefetch(x + i + v * W + ahead, 0, 2), __builtin_prefetch(grad + i + v * W + ahead, 0, 2);
            }
            if (kept) store<false>(kept + i, d, vectors);
        });
        sums[0] += sum(s), sums[1] += sum(t);
    }
}

// The means of dL/dx̂ and of dL/dx̂ · x̂ are in these: dx is rstd dL/dx̂ - (g + g_x (x - mean)).
struct Means {
    float g, g_x;
};

// Computes dx of n pixels of one channel from dh, which is kept or computed again.
template <class T, bool silu, bool streamed>
inline void apply_channel(const T* x, const T* grad, const float* kept, T* dx, int64_t n, float mean, float gain,
                          float offset, Means means) {
    const F m = set(mean), p = set(gain), q = set(offset), slope = set(gain / stretch(silu));
    const F minus_g = set(-means.g), minus_g_x = set(-means.g_x);
    each_pair(n, [&](int64_t i, auto vectors) {
        constexpr int V = decltype(vectors)::n;
        F off[V], d[V];
        load(x + i, off, vectors);
        for (F& o : off) o = o - m;
        if (kept) {
            load(kept + i, d, vectors);
        } else {
            F h[V];
            for (int v = 0; v < V; ++v) h[v] = fma(off[v], p, q);
            load(grad + i, d, vectors);
            if (!streamed) __builtin_prefetch(dx + i, 1), __builtin_prefetch(dx + i + (V - 1) * W, 1);
            through_activation<T, silu>(d, h);
        }
        for (int v = 0; v < V; ++v) d[v] = fma(d[v], slope, fma(off[v], minus_g_x, minus_g));
        store<streamed>(dx + i, d, vectors);
    });
}

template <class T>
bool backward(const GroupNormSiluBackward& a, bool streamed) {
    const Slabs slabs(a.channels, a.groups, a.spatial);
    const int64_t units = a.batch * a.groups, per_group = slabs.channels_per_group, S = a.spatial;
    const T *const x = static_cast<const T*>(a.x), *const grad = static_cast<const T*>(a.grad);
    T* const dx = static_cast<T*>(a.dx);
    const int threads = team(a);
    Scratch<float> dh(a.batch * a.channels), dh_x(a.batch * a.channels);  // sums over the pixels of a channel
    Scratch<Means> means(units);
    Kept<T> kept(dx, per_group * S, unit_by_unit(units, slabs.per_unit, threads), threads);
    if (!dh.data || !dh_x.data || !means.data || !kept.scratch.data) return false;

    // Calls body(channel of the unit, channel of all B * C, gain, offset) for channels [begin, end) of a unit.
    const auto each_channel = [&](int64_t unit, int64_t begin, int64_t end, const auto& body) {
        const int64_t sample = unit / a.groups;
        float gains[AT_ONCE], offsets[AT_ONCE];
        for (; begin < end; begin += AT_ONCE) {
            const int64_t count = end - begin < AT_ONCE ? end - begin : AT_ONCE, channel = unit * per_group + begin;
            write_affine(a, sample, channel - sample * a.channels, count, {a.mean[unit], a.rstd[unit], 0.0f}, gains,
                         offsets);
            for (int64_t k = 0; k < count; ++k) body(begin + k, channel + k, gains[k], offsets[k]);
        }
    };
    const auto first = [&](int64_t unit, int64_t slab, int slot) {
        float* const keep = kept.at(unit, slot);
        choose(a.silu, [&](auto silu) {
            each_channel(unit, slabs.begin(slab), slabs.end(slab), [&](int64_t k, int64_t channel, float p, float q) {
                double sums[2] = {0, 0};
                add_channel<T, silu.value>(x + channel * S, grad + channel * S, S, a.mean[unit], p, q,
                                           keep ? keep + k * S : nullptr, dx + channel * S, slabs.ahead(S), sums);
                dh.data[channel] = static_cast<float>(sums[0]);
                dh_x.data[channel] = static_cast<float>(sums[1] * a.rstd[unit]);
            });
        });
    };
    const auto between = [&](int64_t unit, int) {
        double s = 0, t = 0;
        each_channel(unit, 0, per_group, [&](int64_t, int64_t channel, float p, float) {
            s += double{p} * dh.data[channel], t += double{p} * dh_x.data[channel];
        });
        const double factor = 1.0 / (stretch(a.silu) * static_cast<double>(per_group * S));
        means.data[unit] = {static_cast<float>(s * factor), static_cast<float>(t * factor * a.rstd[unit])};
    };
    const auto last = [&](int64_t unit, int64_t slab, int slot) {
        const float* const keep = kept.at(unit, slot);
        choose(a.silu, streamed && !keep, [&](auto silu, auto streamed) {
            each_channel(unit, slabs.begin(slab), slabs.end(slab), [&](int64_t k, int64_t channel, float p, float q) {
                apply_channel<T, silu.value, streamed.value>(x + channel * S, grad + channel * S,
                                                             keep ? keep + k * S : nullptr, dx + channel * S, S,
                                                             a.mean[unit], p, q, means.data[unit]);
            });
        });
        if (streamed) finish_streaming();
    };
    run_phases(units, slabs.per_unit, threads, first, between, last);
    parameter_gradients(a, dh.data, dh_x.data);
    return true;
}

}  // namespace ldm::LDM_ISA::contiguous
