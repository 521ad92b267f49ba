// group_norm_silu for (B, S, C): a unit is one sample, a slab is some of its pixels, vectors run over channels.
//
// Everything that differs between channels or groups is first written out per channel, so that the inner loops know
// neither groups nor their size: any C / G is equally fast.
#pragma once

#include "group_norm_silu.h"

namespace ldm::LDM_ISA::channels_last {

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

// Adds term(vector of a pixel's channels) over n pixels to the per-channel sums, four pixels to each access of the
// sums.
template <class T, class Term>
inline void add_pixels(const T* x, int64_t n, int64_t channels, const Term& term) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const T* const p = x + i * channels;
        each_vector(channels, [&](int64_t c, auto lanes) {
            term(c, lanes, load(p + c, lanes), load(p + channels + c, lanes), load(p + 2 * channels + c, lanes),
                 load(p + 3 * channels + c, lanes));
        });
    }
    for (; i < n; ++i)
        each_vector(channels, [&](int64_t c, auto lanes) { term(c, lanes, load(x + i * channels + c, lanes)); });
}

struct AddSums {
    float* sums;

    template <class Lanes>
    void operator()(int64_t c, Lanes lanes, F v) const {
        store(sums + c, load(sums + c, lanes) + v, lanes);
    }
    template <class Lanes>
    void operator()(int64_t c, Lanes lanes, F v0, F v1, F v2, F v3) const {
        (*this)(c, lanes, (v0 + v1) + (v2 + v3));
    }
};

struct AddDeviations {
    const float* shift;
    float *sums, *squares;

    template <class Lanes>
    void operator()(int64_t c, Lanes lanes, F v) const {
        const F d = v - load(shift + c, lanes);
        store(sums + c, load(sums + c, lanes) + d, lanes);
        store(squares + c, fma(d, d, load(squares + c, lanes)), lanes);
    }
    template <class Lanes>
    void operator()(int64_t c, Lanes lanes, F v0, F v1, F v2, F v3) const {
        const F m = load(shift + c, lanes);
        v0 -= m, v1 -= m, v2 -= m, v3 -= m;
        store(sums + c, load(sums + c, lanes) + ((v0 + v1) + (v2 + v3)), lanes);
        store(squares + c, load(squares + c, lanes) + (fma(v0, v0, v1 * v1) + fma(v2, v2, v3 * v3)), lanes);
    }
};

inline void clear(float* values, int64_t n) { memset(values, 0, static_cast<size_t>(n) * sizeof(float)); }

// Moments of each group over n pixels. work holds 3 C floats.
template <class T>
inline void measure(const T* x, int64_t n, int64_t channels, int64_t groups, float* work, Moments* out) {
    const int64_t per_group = channels / groups;
    float *const shift = work, *const sums = work + channels, *const squares = work + 2 * channels;
    clear(work, 3 * channels);
    add_pixels(x, n, channels, AddSums{sums});
    const float count = static_cast<float>(n * per_group);
    for (int64_t g = 0; g < groups; ++g) {
        float total = 0.0f;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) total += sums[c];
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) shift[c] = total / count;
    }
    clear(sums, channels);
    add_pixels(x, n, channels, AddDeviations{shift, sums, squares});
    for (int64_t g = 0; g < groups; ++g) {
        double s = 0, t = 0;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) s += sums[c], t += squares[c];
        out[g] = moments(count, shift[g * per_group], s, t);
    }
}

template <class T, bool silu>
bool forward(const GroupNormSilu& a) {
    const Slabs slabs(a.channels, a.spatial);
    const int64_t units = a.batch, C = a.channels, per_group = C / a.groups, per_sample = C * a.spatial;
    const T* const x = static_cast<const T*>(a.x);
    T* const y = static_cast<T*>(a.y);
    Scratch<Moments> measured(units * slabs.per_unit * a.groups);
    Scratch<float> work(units * slabs.per_unit * 3 * C);  // while measuring; then mean, p and q of each channel
    if (!measured.data || !work.data) return false;

    const auto first = [&](int64_t unit, int64_t slab) {
        const int64_t begin = slabs.begin(slab), i = unit * slabs.per_unit + slab;
        measure(x + unit * per_sample + begin * C, slabs.end(slab) - begin, C, a.groups, work.data + i * 3 * C,
                measured.data + i * a.groups);
    };
    const auto between = [&](int64_t unit) {
        float* const mean = work.data + unit * slabs.per_unit * 3 * C;
        for (int64_t g = 0; g < a.groups; ++g) {
            Moments total = measured.data[unit * slabs.per_unit * a.groups + g];
            for (int64_t slab = 1; slab < slabs.per_unit; ++slab)
                total.merge(measured.data[(unit * slabs.per_unit + slab) * a.groups + g]);
            const float rounded = static_cast<float>(total.mean), rstd = reciprocal_std(total, a.eps);
            const float rest = static_cast<float>(total.mean - rounded) * rstd;  // see contiguous::forward
            a.mean[unit * a.groups + g] = rounded, a.rstd[unit * a.groups + g] = rstd;
            for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
                const Affine f = affine(a, unit, c);
                mean[c] = rounded, mean[C + c] = rstd * f.p, mean[2 * C + c] = f.q - rest * f.p;
            }
        }
    };
    const auto last = [&](int64_t unit, int64_t slab) {
        const float* const mean = work.data + unit * slabs.per_unit * 3 * C;
        for (int64_t pixel = slabs.begin(slab); pixel < slabs.end(slab); ++pixel) {
            const int64_t at = unit * per_sample + pixel * C;
            each_vector(C, [&](int64_t c, auto lanes) {
                const F centred = load(x + at + c, lanes) - load(mean + c, lanes);
                const F h = fma(centred, load(mean + C + c, lanes), load(mean + 2 * C + c, lanes));
                store(y + at + c, activate<silu>(h), lanes);
            });
        }
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

template <class T, bool silu>
bool backward(const GroupNormSiluBackward& a) {
    const Slabs slabs(a.channels, a.spatial);
    const int64_t units = a.batch, C = a.channels, per_group = C / a.groups, per_sample = C * a.spatial;
    const T *const x = static_cast<const T*>(a.x), *const grad = static_cast<const T*>(a.grad);
    T* const dx = static_cast<T*>(a.dx);
    Scratch<float> coefficients(units * ROWS * C), sums(units * slabs.per_unit * 2 * C);
    Scratch<float> dh(units * C), dh_x(units * C);
    if (!coefficients.data || !sums.data || !dh.data || !dh_x.data) return false;
    parallel_for(units, units / (4 * a.threads), team(a), [&](int64_t begin, int64_t end, int) {
        for (int64_t unit = begin; unit < end; ++unit) write_coefficients(a, unit, coefficients.data + unit * ROWS * C);
    });

    const auto first = [&](int64_t unit, int64_t slab) {
        const float* const rows = coefficients.data + unit * ROWS * C;
        float* const s = sums.data + (unit * slabs.per_unit + slab) * 2 * C;
        clear(s, 2 * C);
        for (int64_t pixel = slabs.begin(slab); pixel < slabs.end(slab); ++pixel) {
            const int64_t at = unit * per_sample + pixel * C;
            each_vector(C, [&](int64_t c, auto lanes) {
                const F x_hat = (load(x + at + c, lanes) - load(rows + c, lanes)) * load(rows + RSTD * C + c, lanes);
                const F h = fma(x_hat, load(rows + P * C + c, lanes), load(rows + Q * C + c, lanes));
                const F d = through_activation<silu>(load(grad + at + c, lanes), h);
                store(s + c, load(s + c, lanes) + d, lanes);
                store(s + C + c, fma(d, x_hat, load(s + C + c, lanes)), lanes);
            });
        }
    };
    const auto between = [&](int64_t unit) {
        float *const rows = coefficients.data + unit * ROWS * C, *const s = dh.data + unit * C;
        float* const t = dh_x.data + unit * C;
        clear(s, C), clear(t, C);
        for (int64_t slab = 0; slab < slabs.per_unit; ++slab) {
            const float* const from = sums.data + (unit * slabs.per_unit + slab) * 2 * C;
            for (int64_t c = 0; c < C; ++c) s[c] += from[c], t[c] += from[C + c];
        }
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
    };
    const auto last = [&](int64_t unit, int64_t slab) {
        const float* const rows = coefficients.data + unit * ROWS * C;
        for (int64_t pixel = slabs.begin(slab); pixel < slabs.end(slab); ++pixel) {
            const int64_t at = unit * per_sample + pixel * C;
            each_vector(C, [&](int64_t c, auto lanes) {
                const F rstd = load(rows + RSTD * C + c, lanes), p = load(rows + P * C + c, lanes);
                const F x_hat = (load(x + at + c, lanes) - load(rows + c, lanes)) * rstd;
                const F d =
                    through_activation<silu>(load(grad + at + c, lanes), fma(x_hat, p, load(rows + Q * C + c, lanes)));
                const F means = fma(x_hat, load(rows + MEAN_G_X * C + c, lanes), load(rows + MEAN_G * C + c, lanes));
                store(dx + at + c, fma(d, p * rstd, means), lanes);
            });
        }
    };
    run_phases(units, slabs.per_unit, team(a), first, between, last);
    parameter_gradients(a, dh.data, dh_x.data);
    return true;
}

}  // namespace ldm::LDM_ISA::channels_last
