// group_norm_silu for (B, C, S): a unit is one group, C / G channels of S numbers each; a slab is some of these
// channels.
#pragma once

#include "group_norm_silu.h"

namespace ldm::LDM_ISA::contiguous {

constexpr int64_t CHUNK = 4096;  // numbers whose mean is taken before their squares: half an L1 cache in float32

// Sum of term(vector of x, lanes) over n numbers, four chains of additions at a time.
template <class T, class Term>
inline F sum_of(const T* x, int64_t n, const Term& term) {
    F a = zero(), b = zero(), c = zero(), d = zero();
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        a = term(load(x + i, Full{}), a, Full{});
        b = term(load(x + i + W, Full{}), b, Full{});
        c = term(load(x + i + 2 * W, Full{}), c, Full{});
        d = term(load(x + i + 3 * W, Full{}), d, Full{});
    }
    each_vector(n - i, [&](int64_t j, auto lanes) { a = term(load(x + i + j, lanes), a, lanes); });
    return (a + b) + (c + d);
}

template <class T>
inline Moments measure(const T* x, int64_t n) {
    Moments total{0, 0, 0};
    for (int64_t begin = 0; begin < n; begin += CHUNK) {
        const T* chunk = x + begin;
        const int64_t count = n - begin < CHUNK ? n - begin : CHUNK;
        const float mean = sum(sum_of(chunk, count, [](F v, F s, auto) { return s + v; })) / static_cast<float>(count);
        F first = zero();
        const F squares = sum_of(chunk, count, [&](F v, F s, auto lanes) {
            const F d = only(v - mean, lanes);
            first += d;
            return fma(d, d, s);
        });
        total.merge(moments(static_cast<double>(count), mean, sum(first), sum(squares)));
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
    int64_t begin(int64_t slab) const { return slab * channels_per_slab; }
    int64_t end(int64_t slab) const {
        const int64_t end = (slab + 1) * channels_per_slab;
        return end < channels_per_group ? end : channels_per_group;
    }
};

template <class T, bool silu>
bool forward(const GroupNormSilu& a) {
    const Slabs slabs(a.channels, a.groups, a.spatial);
    const int64_t units = a.batch * a.groups;
    const T* const x = static_cast<const T*>(a.x);
    T* const y = static_cast<T*>(a.y);
    Scratch<Moments> measured(units * slabs.per_unit);
    Scratch<double> means(units);
    if (!measured.data || !means.data) return false;

    const auto first = [&](int64_t unit, int64_t slab) {
        const int64_t begin = slabs.begin(slab), n = (slabs.end(slab) - begin) * a.spatial;
        const int64_t channel = unit * slabs.channels_per_group + begin;
        measured.data[unit * slabs.per_unit + slab] = measure(x + channel * a.spatial, n);
    };
    const auto between = [&](int64_t unit) {
        Moments total = measured.data[unit * slabs.per_unit];
        for (int64_t slab = 1; slab < slabs.per_unit; ++slab) total.merge(measured.data[unit * slabs.per_unit + slab]);
        means.data[unit] = total.mean;
        a.mean[unit] = static_cast<float>(total.mean);
        a.rstd[unit] = reciprocal_std(total, a.eps);
    };
    const auto last = [&](int64_t unit, int64_t slab) {
        // What rounding the mean to float32 loses goes into q: with mean 1e3 and std 1 that is 3e-5 of the result.
        const int64_t sample = unit / a.groups;
        const float mean = a.mean[unit], rstd = a.rstd[unit];
        const float rest = static_cast<float>(means.data[unit] - mean) * rstd;
        for (int64_t k = slabs.begin(slab); k < slabs.end(slab); ++k) {
            const int64_t channel = unit * slabs.channels_per_group + k;  // of all B * C
            const Affine f = affine(a, sample, channel - sample * a.channels);
            const float p = rstd * f.p, q = f.q - rest * f.p;
            const T* const from = x + channel * a.spatial;
            T* const to = y + channel * a.spatial;
            each_vector(a.spatial, [&](int64_t i, auto lanes) {
                store(to + i, activate<silu>(fma(load(from + i, lanes) - mean, set(p), set(q))), lanes);
            });
        }
    };
    run_phases(units, slabs.per_unit, team(a), first, between, last);
    return true;
}

template <class T, bool silu>
bool backward(const GroupNormSiluBackward& a) {
    const Slabs slabs(a.channels, a.groups, a.spatial);
    const int64_t units = a.batch * a.groups, channels_per_group = slabs.channels_per_group;
    const T *const x = static_cast<const T*>(a.x), *const grad = static_cast<const T*>(a.grad);
    T* const dx = static_cast<T*>(a.dx);
    Scratch<float> dh(a.batch * a.channels), dh_x(a.batch * a.channels);  // Σ dL/dh and Σ dL/dh · x̂ of each channel
    Scratch<float> mean_g(units), mean_g_x(units);                        // means over a group of g = dL/dx̂ and g · x̂
    if (!dh.data || !dh_x.data || !mean_g.data || !mean_g_x.data) return false;

    const auto first = [&](int64_t unit, int64_t slab) {
        const int64_t sample = unit / a.groups;
        const float mean = a.mean[unit], rstd = a.rstd[unit];
        for (int64_t k = slabs.begin(slab); k < slabs.end(slab); ++k) {
            const int64_t channel = unit * channels_per_group + k;
            const Affine f = affine(a, sample, channel - sample * a.channels);
            double sum_dh = 0, sum_dh_x = 0;
            for (int64_t begin = 0; begin < a.spatial; begin += SLAB_ELEMENTS) {
                const int64_t n = a.spatial - begin < SLAB_ELEMENTS ? a.spatial - begin : SLAB_ELEMENTS;
                const T *const from = x + channel * a.spatial + begin, *const g = grad + channel * a.spatial + begin;
                F s = zero(), t = zero();
                each_vector(n, [&](int64_t i, auto lanes) {
                    const F x_hat = (load(from + i, lanes) - mean) * rstd;
                    // A lane behind the end has grad = 0, but 0 times an overflow would be NaN.
                    const F d =
                        only(through_activation<silu>(load(g + i, lanes), fma(x_hat, set(f.p), set(f.q))), lanes);
                    s += d;
                    t = fma(d, only(x_hat, lanes), t);
                });
                sum_dh += sum(s), sum_dh_x += sum(t);
            }
            dh.data[channel] = static_cast<float>(sum_dh), dh_x.data[channel] = static_cast<float>(sum_dh_x);
        }
    };
    const auto between = [&](int64_t unit) {
        const int64_t sample = unit / a.groups;
        double s = 0, t = 0;
        for (int64_t k = 0; k < channels_per_group; ++k) {
            const int64_t channel = unit * channels_per_group + k;
            const float p = affine(a, sample, channel - sample * a.channels).p;
            s += double{p} * dh.data[channel], t += double{p} * dh_x.data[channel];
        }
        const double count = static_cast<double>(channels_per_group * a.spatial);
        mean_g.data[unit] = static_cast<float>(s / count), mean_g_x.data[unit] = static_cast<float>(t / count);
    };
    const auto last = [&](int64_t unit, int64_t slab) {
        const int64_t sample = unit / a.groups;
        const float mean = a.mean[unit], rstd = a.rstd[unit];
        const F mg = set(-mean_g.data[unit] * rstd), mgx = set(-mean_g_x.data[unit] * rstd);
        for (int64_t k = slabs.begin(slab); k < slabs.end(slab); ++k) {
            const int64_t channel = unit * channels_per_group + k;
            const Affine f = affine(a, sample, channel - sample * a.channels);
            const T *const from = x + channel * a.spatial, *const g = grad + channel * a.spatial;
            T* const to = dx + channel * a.spatial;
            each_vector(a.spatial, [&](int64_t i, auto lanes) {
                const F x_hat = (load(from + i, lanes) - mean) * rstd;
                const F d = through_activation<silu>(load(g + i, lanes), fma(x_hat, set(f.p), set(f.q)));
                store(to + i, fma(d, set(f.p * rstd), fma(x_hat, mgx, mg)), lanes);
            });
        }
    };
    run_phases(units, slabs.per_unit, team(a), first, between, last);
    parameter_gradients(a, dh.data, dh_x.data);
    return true;
}

}  // namespace ldm::LDM_ISA::contiguous
