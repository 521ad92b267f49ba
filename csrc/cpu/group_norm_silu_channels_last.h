// group_norm_silu for (B, S, C): a unit is one sample, a slab is some of its pixels, vectors run over channels.
//
// Everything that differs between channels or groups is first written out per channel, so that the inner loops know
// neither groups nor their size: any C / G is equally fast.
#pragma once

#include "group_norm_silu.h"

namespace ldm::LDM_ISA::channels_last {

constexpr int64_t SAMPLE = 8;  // pixels of a slab that say what the deviations of a group are from

struct Slabs {
    int64_t pixels, pixels_per_slab, per_unit;

    Slabs(int64_t channels, int64_t spatial) {
        pixels = spatial;
        pixels_per_slab = SLAB_ELEMENTS / channels < 1 ? 1 : SLAB_ELEMENTS / channels;
        per_unit = (spatial + pixels_per_slab - 1) / pixels_per_slab;
    }
    int64_t begin(int64_t slab) const { return slab * pixels_per_slab; }
    int64_t end(int64_t slab) const {
        const int64_t end = (slab + 1) * pixels_per_slab;
        return end < pixels ? end : pixels;
    }
};

// body(channel of the first lane, offset of the vector, lanes) for n pixels, in the order of memory: the rows of
// numbers per channel stay in L1, and several pixels at a time would be as many streams of memory side by side.
template <class Body>
inline void each_pixel(int64_t n, int64_t channels, const Body& body) {
    for (int64_t i = 0; i < n; ++i)
        each_vector(channels, [&](int64_t c, auto lanes) { body(c, i * channels + c, lanes); });
}

inline void clear(float* values, int64_t n) { memset(values, 0, static_cast<size_t>(n) * sizeof(float)); }

// shift[c]: near the mean of the group of c, from SAMPLE of the n pixels.
template <class T>
inline void near_means(const T* x, int64_t n, int64_t channels, int64_t groups, float* shift) {
    const int64_t per_group = channels / groups, count = n < SAMPLE ? n : SAMPLE;
    clear(shift, channels);
    for (int64_t k = 0; k < count; ++k) {
        const T* const pixel = x + k * n / count * channels;
        each_vector(channels, [&](int64_t c, auto lanes) {
            store(shift + c, load(shift + c, lanes) + load(pixel + c, lanes), lanes);
        });
    }
    for (int64_t g = 0; g < channels; g += per_group) {
        float total = 0.0f;
        for (int64_t c = g; c < g + per_group; ++c) total += shift[c];
        for (int64_t c = g; c < g + per_group; ++c) shift[c] = total / static_cast<float>(count * per_group);
    }
}

template <int count>
struct Pixels {
    static constexpr int n = count;
};

// Moments of each group over n pixels. work holds 3 C floats.
template <class T>
inline void measure(const T* x, int64_t n, int64_t channels, int64_t groups, float* work, Moments* out) {
    const int64_t per_group = channels / groups;
    float *const shift = work, *const sums = work + channels, *const squares = work + 2 * channels;
    near_means(x, n, channels, groups, shift);
    clear(sums, 2 * channels);
    const auto add = [&](int64_t first, auto pixels) {  // several pixels to each access of the sums
        each_vector(channels, [&](int64_t c, auto lanes) {
            const F m = load(shift + c, lanes);
            F s = load(sums + c, lanes), t = load(squares + c, lanes);
            for (int64_t i = first; i < first + pixels.n; ++i) {
                const F d = load(x + i * channels + c, lanes) - m;
                s += d;
                t = fma(d, d, t);
            }
            store(sums + c, s, lanes), store(squares + c, t, lanes);
        });
    };
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) add(i, Pixels<4>{});
    for (; i < n; ++i) add(i, Pixels<1>{});
    for (int64_t g = 0; g < groups; ++g) {
        double s = 0, t = 0;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) s += sums[c], t += squares[c];
        out[g] = moments(static_cast<double>(n * per_group), shift[g * per_group], s, t);
    }
}

template <class T, bool silu, bool streamed>
bool forward(const GroupNormSilu& a) {
    const Slabs slabs(a.channels, a.spatial);
    const int64_t units = a.batch, C = a.channels, per_group = C / a.groups, per_sample = C * a.spatial;
    const T* const x = static_cast<const T*>(a.x);
    T* const y = static_cast<T*>(a.y);
    Scratch<Moments> measured(units * slabs.per_unit * a.groups);
    Scratch<float> work(units * slabs.per_unit * 3 * C);  // while measuring; then mean, p and q of each channel
    if (!measured.data || !work.data) return false;

    const auto first = [&](int64_t unit, int64_t slab, int) {
        if (a.phases == Phases::apply) return;
        const int64_t begin = slabs.begin(slab), i = unit * slabs.per_unit + slab;
        measure(x + unit * per_sample + begin * C, slabs.end(slab) - begin, C, a.groups, work.data + i * 3 * C,
                measured.data + i * a.groups);
    };
    const auto between = [&](int64_t unit) {
        float* const mean = work.data + unit * slabs.per_unit * 3 * C;
        const Moments* const of_unit = measured.data + unit * slabs.per_unit * a.groups;
        for (int64_t g = 0; g < a.groups; ++g) {
            const Centre group = conclude(a, unit * a.groups + g, of_unit + g, slabs.per_unit, a.groups);
            const int64_t c = g * per_group;
            each_vector(per_group, [&](int64_t i, auto lanes) { store(mean + c + i, set(group.mean), lanes); });
            write_affine<silu>(a, unit, c, per_group, group, mean + C + c, mean + 2 * C + c);
        }
    };
    const auto last = [&](int64_t unit, int64_t slab, int) {
        if (a.phases == Phases::measure) return;
        const float* const rows = work.data + unit * slabs.per_unit * 3 * C;
        const int64_t begin = slabs.begin(slab), from = unit * per_sample + begin * C;
        each_pixel(slabs.end(slab) - begin, C, [&](int64_t c, int64_t at, auto lanes) {
            const F mean = load(rows + c, lanes), p = load(rows + C + c, lanes), q = load(rows + 2 * C + c, lanes);
            const int64_t i = from + at;
            const F v = activate<T, silu>(fma(load(x + i, lanes) - mean, p, q));
            if constexpr (streamed) {
                stream(y + i, v, lanes);
            } else {
                store(y + i, v, lanes);
            }
        });
        if (streamed) finish_streaming();
    };
    run_phases(units, slabs.per_unit, team(a), first, between, last);
    return true;
}

// Per channel, one row each of `coefficients`: mean, rstd, p, q; after the sums are known also -rstd mean(g), -rstd
// mean(g x̂).
enum Row { MEAN, RSTD, P, Q, MEAN_G, MEAN_G_X, ROWS };

inline void write_coefficients(const GroupNormSiluBackward& a, int64_t unit, float* rows) {
    const int64_t C = a.channels, per_group = C / a.groups;
    for (int64_t g = 0; g < a.groups; ++g) {
        const float mean = a.mean[unit * a.groups + g], rstd = a.rstd[unit * a.groups + g];
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
            const Affine f = affine(a, unit, c);
            rows[MEAN * C + c] = mean, rows[RSTD * C + c] = rstd, rows[P * C + c] = f.p, rows[Q * C + c] = f.q;
        }
    }
}

// The rows of means from the sums of dh and dh·x̂ over the pixels of each channel.
inline void write_means(const GroupNormSiluBackward& a, int64_t unit, const float* s, const float* t, float* rows) {
    const int64_t C = a.channels, per_group = C / a.groups;
    for (int64_t g = 0; g < a.groups; ++g) {
        double sum_g = 0, sum_g_x = 0;
        const int64_t begin = g * per_group, end = begin + per_group;
        for (int64_t c = begin; c < end; ++c)
            sum_g += double{rows[P * C + c]} * s[c], sum_g_x += double{rows[P * C + c]} * t[c];
        const double factor = -a.rstd[unit * a.groups + g] / static_cast<double>(per_group * a.spatial);
        for (int64_t c = begin; c < end; ++c) {
            rows[MEAN_G * C + c] = static_cast<float>(sum_g * factor);
            rows[MEAN_G_X * C + c] = static_cast<float>(sum_g_x * factor);
        }
    }
}

// Adds dh and dh·x̂ of n pixels to sums (2, C); dh goes to `kept` if that is not null.
template <class T, bool silu>
inline void add_pixels(const T* x, const T* grad, int64_t n, int64_t C, const float* rows, float* kept, float* sums) {
    each_pixel(n, C, [&](int64_t c, int64_t i, auto lanes) {
        const F x_hat = (load(x + i, lanes) - load(rows + c, lanes)) * load(rows + RSTD * C + c, lanes);
        const F h = fma(x_hat, load(rows + P * C + c, lanes), load(rows + Q * C + c, lanes));
        const F d = through_activation<T, silu>(load(grad + i, lanes), h);
        store(sums + c, load(sums + c, lanes) + d, lanes);
        store(sums + C + c, fma(d, x_hat, load(sums + C + c, lanes)), lanes);
        if (kept) store(kept + i, d, lanes);
    });
}

// dx of n pixels from dh, kept or computed again. dx and kept may be the same memory.
template <class T, bool silu>
inline void apply_pixels(const T* x, const T* grad, const float* kept, T* dx, int64_t n, int64_t C, const float* rows) {
    each_pixel(n, C, [&](int64_t c, int64_t i, auto lanes) {
        const F rstd = load(rows + RSTD * C + c, lanes), p = load(rows + P * C + c, lanes);
        const F x_hat = (load(x + i, lanes) - load(rows + c, lanes)) * rstd;
        const F means = fma(x_hat, load(rows + MEAN_G_X * C + c, lanes), load(rows + MEAN_G * C + c, lanes));
        const F d =
            kept ? load(kept + i, lanes)
                 : through_activation<T, silu>(load(grad + i, lanes), fma(x_hat, p, load(rows + Q * C + c, lanes)));
        store(dx + i, fma(d, p * rstd, means), lanes);
    });
}

template <class T, bool silu>
bool backward(const GroupNormSiluBackward& a) {
    const Slabs slabs(a.channels, a.spatial);
    const int64_t units = a.batch, C = a.channels, per_sample = C * a.spatial;
    const T *const x = static_cast<const T*>(a.x), *const grad = static_cast<const T*>(a.grad);
    T* const dx = static_cast<T*>(a.dx);
    const int threads = team(a);
    Scratch<float> coefficients(units * ROWS * C), sums(units * slabs.per_unit * 2 * C);
    Scratch<float> dh(units * C), dh_x(units * C);
    Kept<T> kept(dx, per_sample, unit_by_unit(units, slabs.per_unit, threads), threads);
    if (!coefficients.data || !sums.data || !dh.data || !dh_x.data || !kept.scratch.data) return false;
    parallel_for(units, units / (4 * a.threads), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t unit = begin; unit < end; ++unit) write_coefficients(a, unit, coefficients.data + unit * ROWS * C);
    });

    const auto first = [&](int64_t unit, int64_t slab, int slot) {
        float *const s = sums.data + (unit * slabs.per_unit + slab) * 2 * C, *const keep = kept.at(unit, slot);
        const int64_t begin = slabs.begin(slab), at = unit * per_sample + begin * C;
        clear(s, 2 * C);
        add_pixels<T, silu>(x + at, grad + at, slabs.end(slab) - begin, C, coefficients.data + unit * ROWS * C,
                            keep ? keep + begin * C : nullptr, s);
    };
    const auto between = [&](int64_t unit) {
        float *const s = dh.data + unit * C, *const t = dh_x.data + unit * C;
        clear(s, C), clear(t, C);
        for (int64_t slab = 0; slab < slabs.per_unit; ++slab) {
            const float* const from = sums.data + (unit * slabs.per_unit + slab) * 2 * C;
            for (int64_t c = 0; c < C; ++c) s[c] += from[c], t[c] += from[C + c];
        }
        write_means(a, unit, s, t, coefficients.data + unit * ROWS * C);
    };
    const auto last = [&](int64_t unit, int64_t slab, int slot) {
        const float* const keep = kept.at(unit, slot);
        const int64_t begin = slabs.begin(slab), at = unit * per_sample + begin * C;
        apply_pixels<T, silu>(x + at, grad + at, keep ? keep + begin * C : nullptr, dx + at, slabs.end(slab) - begin, C,
                              coefficients.data + unit * ROWS * C);
    };
    run_phases(units, slabs.per_unit, threads, first, between, last);
    parameter_gradients(a, dh.data, dh_x.data);
    return true;
}

}  // namespace ldm::LDM_ISA::channels_last
