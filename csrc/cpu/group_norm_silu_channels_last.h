// group_norm_silu for (B, S, C): a unit is one sample, a slab is some of its pixels, and vectors run over channels.
//
// Everything that differs between channels or groups is first written out per channel. So the inner loops know neither
// groups nor their size, and any C / G is equally fast.
#pragma once

#include "group_norm_silu.h"

namespace ldm::LDM_ISA::channels_last {

constexpr int64_t SAMPLE = 8;  // pixels of a unit, whose mean the deviations of a group are taken from

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

template <int count>
struct Pixels {
    static constexpr int n = count;
};

// Calls body(channel of the first lane, offset of the first pixel's vectors, pixels, offset of what comes next,
// vectors) for n pixels, `at_once` at a time, so that the numbers per channel are loaded once for all of them. That
// makes as many streams of memory as pixels, which the processor does not foresee well. For the body to prefetch,
// `next` grows in the order of memory, by the body's vectors for each pixel.
template <int at_once, class Body>
inline void each_pixel(int64_t n, int64_t channels, const Body& body) {
    const auto go = [&](int64_t i, auto pixels) {
        each_pair(channels, [&](int64_t c, auto vectors) {
            body(c, i * channels + c, pixels, (i + pixels.n) * channels + c * pixels.n, vectors);
        });
    };
    int64_t i = 0;
    for (; i + at_once <= n; i += at_once) go(i, Pixels<at_once>{});
    for (; i < n; ++i) go(i, Pixels<1>{});
}

inline void fill(float* values, int64_t n, float value) {
    if (n < W) {
        for (int64_t i = 0; i < n; ++i) values[i] = value;
        return;
    }
    each_vector(n, [&](int64_t i, auto lanes) { store(values + i, set(value), lanes); });
}

inline float total(const float* values, int64_t n) {
    float few = 0.0f;
    if (n < W) {
        for (int64_t i = 0; i < n; ++i) few += values[i];
        return few;
    }
    F s = zero();
    each_vector(n, [&](int64_t i, auto lanes) { s += load(values + i, lanes); });
    return sum(s);
}

// Adds up rows of n numbers, pair by pair, into the first row.
inline void add_rows(float* row, int64_t rows, int64_t n) {
    for (int64_t step = 1; step < rows; step *= 2)
        for (int64_t k = 0; k + step < rows; k += 2 * step)
            each_vector(n, [&](int64_t i, auto lanes) {
                float* const at = row + k * n + i;
                store(at, load(at, lanes) + load(at + step * n, lanes), lanes);
            });
}

// The first twelve bits of v. If a shift had more digits than bf16 or f16 have, its excess digits would be the last
// ones of every deviation from it, and the sums would round them all in the same direction.
inline float few_digits(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof v);
    bits &= 0xfffff000;
    memcpy(&v, &bits, sizeof v);
    return v;
}

// Sets shift[c] to a number near the mean of the group of c, from SAMPLE of the n pixels.
template <class T>
inline void near_means(const T* x, int64_t n, int64_t channels, int64_t groups, float* shift) {
    const int64_t per_group = channels / groups, count = n < SAMPLE ? n : SAMPLE;
    fill(shift, channels, 0.0f);
    for (int64_t k = 0; k < count; ++k) {
        const T* const pixel = x + k * n / count * channels;
        each_vector(channels, [&](int64_t c, auto lanes) {
            store(shift + c, load(shift + c, lanes) + load(pixel + c, lanes), lanes);
        });
    }
    for (int64_t c = 0; c < channels; c += per_group)
        fill(shift + c, per_group, few_digits(total(shift + c, per_group) / static_cast<float>(count * per_group)));
}

// Computes sums (2, C) over n pixels: of the deviations from `shift`, which is in the order of T, and of their squares.
template <class T>
inline void measure(const T* x, int64_t n, int64_t channels, const float* shift, float* sums) {
    float* const squares = sums + channels;
    fill(sums, 2 * channels, 0.0f);
    each_pixel<8>(n, channels, [&](int64_t c, int64_t i, auto pixels, int64_t next, auto vectors) {
        constexpr int V = decltype(vectors)::n;
        F m[V], s[V], t[V], d[V];
        load(shift + c, m, vectors), load(sums + c, s, vectors), load(squares + c, t, vectors);
        for (int k = 0; k < pixels.n; ++k) {
            load(x + i + k * channels, d, vectors);
            for (int v = 0; v < V; ++v) {
                __builtin_prefetch(x + next + (k * V + v) * W, 0, 2);
                d[v] = d[v] - m[v];
                s[v] += d[v];
                t[v] = fma(d[v], d[v], t[v]);
            }
        }
        store<false>(sums + c, s, vectors), store<false>(squares + c, t, vectors);
    });
}

// Rows of numbers per channel: first what measuring needs, then what applying needs.
enum ForwardRow { MEAN, GAIN, OFFSET, FORWARD_ROWS };

// Computes y of n pixels.
template <class T, bool silu, bool streamed>
inline void apply(const T* x, T* y, int64_t n, int64_t C, const float* rows) {
    each_pixel<4>(n, C, [&](int64_t c, int64_t i, auto pixels, int64_t next, auto vectors) {
        constexpr int V = decltype(vectors)::n;
        F mean[V], p[V], q[V], t[V];
        load(rows + MEAN * C + c, mean, vectors), load(rows + GAIN * C + c, p, vectors);
        load(rows + OFFSET * C + c, q, vectors);
        for (int k = 0; k < pixels.n; ++k) {
            load(x + i + k * C, t, vectors);
            for (int v = 0; v < V; ++v) {
                const int64_t ahead = next + (k * V + v) * W;
                __builtin_prefetch(x + ahead, 0, 2);
                if (!streamed) __builtin_prefetch(y + ahead, 1);
                t[v] = fma(t[v] - mean[v], p[v], q[v]);
            }
            activate<T, silu>(t);
            store<streamed>(y + i + k * C, t, vectors);
        }
    });
}

template <class T>
bool forward(const GroupNormSilu& a, bool streamed) {
    const Slabs slabs(a.channels, a.spatial);
    const int64_t units = a.batch, C = a.channels, per_group = C / a.groups, per_sample = C * a.spatial;
    const T* const x = static_cast<const T*>(a.x);
    T* const y = static_cast<T*>(a.y);
    const int threads = team(a);
    const bool alone = unit_by_unit(units, slabs.per_unit, threads);
    Scratch<float> coefficients(units * FORWARD_ROWS * C), sums((alone ? threads : units) * slabs.per_unit * 2 * C);
    if (!coefficients.data || !sums.data) return false;

    const auto rows_of = [&](int64_t unit) { return coefficients.data + unit * FORWARD_ROWS * C; };
    const auto sums_of = [&](int64_t unit, int slot) {
        return sums.data + (alone ? slot : unit) * slabs.per_unit * 2 * C;
    };
    const auto prepare = [&](int64_t unit) {
        if (a.phases == Phases::apply) return;
        float* const shift = rows_of(unit) + MEAN * C;
        near_means(x + unit * per_sample, a.spatial, C, a.groups, shift);
        to_order_of<T>(shift, C);
    };
    const auto first = [&](int64_t unit, int64_t slab, int slot) {
        if (a.phases == Phases::apply) return;
        if (alone && slab == 0) prepare(unit);
        const int64_t begin = slabs.begin(slab);
        measure(x + unit * per_sample + begin * C, slabs.end(slab) - begin, C, rows_of(unit) + MEAN * C,
                sums_of(unit, slot) + slab * 2 * C);
    };
    const auto between = [&](int64_t unit, int slot) {
        float *const rows = rows_of(unit), *const s = sums_of(unit, slot), *const t = s + C;
        if (a.phases != Phases::apply) {
            add_rows(s, slabs.per_unit, 2 * C);
            from_order_of<T>(rows + MEAN * C, C), from_order_of<T>(s, C), from_order_of<T>(t, C);
        }
        for (int64_t g = 0; g < a.groups; ++g) {
            const int64_t c = g * per_group;
            Moments measured{};
            if (a.phases != Phases::apply) {
                measured = moments(static_cast<double>(per_group * a.spatial), rows[MEAN * C + c],
                                   total(s + c, per_group), total(t + c, per_group));
            }
            const Centre group = conclude(a, unit * a.groups + g, measured);
            fill(rows + MEAN * C + c, per_group, group.mean);
            write_affine(a, unit, c, per_group, group, rows + GAIN * C + c, rows + OFFSET * C + c);
        }
        for (int row = 0; row < FORWARD_ROWS; ++row) to_order_of<T>(rows + row * C, C);
    };
    const auto last = [&](int64_t unit, int64_t slab, int) {
        if (a.phases == Phases::measure) return;
        const int64_t begin = slabs.begin(slab), at = unit * per_sample + begin * C;
        choose(a.silu, streamed, [&](auto silu, auto streamed) {
            apply<T, silu.value, streamed.value>(x + at, y + at, slabs.end(slab) - begin, C, rows_of(unit));
        });
        if (streamed) finish_streaming();
    };
    for (int64_t unit = 0; !alone && unit < units; ++unit) prepare(unit);
    run_phases(units, slabs.per_unit, threads, first, between, last);
    return true;
}

// The same for the backward pass. MEAN_G and MEAN_G_X hold the means of dL/dx̂ and of dL/dx̂ · x̂, so that dx is rstd
// dL/dx̂ + MEAN_G + MEAN_G_X (x - mean).
enum BackwardRow { MEAN_G = FORWARD_ROWS, MEAN_G_X, BACKWARD_ROWS };

template <class T>
inline void write_coefficients(const GroupNormSiluBackward& a, int64_t unit, float* rows) {
    const int64_t C = a.channels, per_group = C / a.groups;
    for (int64_t g = 0; g < a.groups; ++g) {
        const Centre group{a.mean[unit * a.groups + g], a.rstd[unit * a.groups + g], 0.0f};
        const int64_t c = g * per_group;
        fill(rows + MEAN * C + c, per_group, group.mean);
        write_affine(a, unit, c, per_group, group, rows + GAIN * C + c, rows + OFFSET * C + c);
    }
    for (int row = 0; row < FORWARD_ROWS; ++row) to_order_of<T>(rows + row * C, C);
}

// Computes the rows of means from the sums of dh and dh·x̂ over the pixels of each channel.
template <class T>
inline void write_means(const GroupNormSiluBackward& a, int64_t unit, const float* s, const float* t, float* rows) {
    const int64_t C = a.channels, per_group = C / a.groups;
    float *const gain = rows + GAIN * C, *const mean_g = rows + MEAN_G * C, *const mean_g_x = rows + MEAN_G_X * C;
    from_order_of<T>(gain, C);
    for (int64_t g = 0; g < a.groups; ++g) {
        double sum_g = 0, sum_g_x = 0;
        const int64_t begin = g * per_group, end = begin + per_group;
        for (int64_t c = begin; c < end; ++c) sum_g += double{gain[c]} * s[c], sum_g_x += double{gain[c]} * t[c];
        const double factor = -1.0 / (stretch(a.silu) * static_cast<double>(per_group * a.spatial));
        fill(mean_g + begin, per_group, static_cast<float>(sum_g * factor));
        fill(mean_g_x + begin, per_group, static_cast<float>(sum_g_x * factor * a.rstd[unit * a.groups + g]));
    }
    to_order_of<T>(gain, C), to_order_of<T>(mean_g, C), to_order_of<T>(mean_g_x, C);
}

// Adds dh and dh (x - mean) of n pixels to sums (2, C); dh goes to `kept` if that is not null.
template <class T, bool silu>
inline void add_pixels(const T* x, const T* grad, int64_t n, int64_t C, const float* rows, float* kept, float* sums) {
    each_pixel<4>(n, C, [&](int64_t c, int64_t first, auto pixels, int64_t next, auto vectors) {
        constexpr int V = decltype(vectors)::n;
        F mean[V], p[V], q[V], s[V], t[V], off[V], h[V], d[V];
        load(rows + MEAN * C + c, mean, vectors), load(rows + GAIN * C + c, p, vectors);
        load(rows + OFFSET * C + c, q, vectors), load(sums + c, s, vectors), load(sums + C + c, t, vectors);
        for (int k = 0; k < pixels.n; ++k) {
            const int64_t i = first + k * C;
            load(x + i, off, vectors), load(grad + i, d, vectors);
            for (int v = 0; v < V; ++v) {
                const int64_t ahead = next + (k * V + v) * W;
                __builtin_prefetch(x + ahead, 0, 2), __builtin_prefetch(grad + ahead, 0, 2);
                off[v] = off[v] - mean[v], h[v] = fma(off[v], p[v], q[v]);
            }
            through_activation<T, silu>(d, h);
            for (int v = 0; v < V; ++v) s[v] += d[v], t[v] = fma(d[v], off[v], t[v]);
            if (kept) store<false>(kept + i, d, vectors);
        }
        store<false>(sums + c, s, vectors), store<false>(sums + C + c, t, vectors);
    });
}

// Computes dx of n pixels from dh, which is kept or computed again.
template <class T, bool silu, bool streamed>
inline void apply_pixels(const T* x, const T* grad, const float* kept, T* dx, int64_t n, int64_t C, const float* rows) {
    each_pixel<4>(n, C, [&](int64_t c, int64_t first, auto pixels, int64_t next, auto vectors) {
        constexpr int V = decltype(vectors)::n;
        F mean[V], p[V], q[V], g[V], g_x[V], off[V], h[V], d[V];
        load(rows + MEAN * C + c, mean, vectors), load(rows + GAIN * C + c, p, vectors);
        load(rows + OFFSET * C + c, q, vectors);
        load(rows + MEAN_G * C + c, g, vectors), load(rows + MEAN_G_X * C + c, g_x, vectors);
        for (int k = 0; k < pixels.n; ++k) {
            const int64_t i = first + k * C;
            load(x + i, off, vectors);
            for (int v = 0; v < V; ++v) {
                const int64_t ahead = next + (k * V + v) * W;
                __builtin_prefetch(x + ahead, 0, 2);
                if (!kept) __builtin_prefetch(grad + ahead, 0, 2);
                if (!kept && !streamed) __builtin_prefetch(dx + ahead, 1);
                off[v] = off[v] - mean[v], h[v] = fma(off[v], p[v], q[v]);
            }
            if (kept) {
                load(kept + i, d, vectors);
            } else {
                load(grad + i, d, vectors);
                through_activation<T, silu>(d, h);
            }
            for (int v = 0; v < V; ++v) d[v] = fma(d[v], p[v] * (1.0f / stretch(silu)), fma(off[v], g_x[v], g[v]));
            store<streamed>(dx + i, d, vectors);
        }
    });
}

template <class T>
bool backward(const GroupNormSiluBackward& a, bool streamed) {
    const Slabs slabs(a.channels, a.spatial);
    const int64_t units = a.batch, C = a.channels, per_group = C / a.groups, per_sample = C * a.spatial;
    const T *const x = static_cast<const T*>(a.x), *const grad = static_cast<const T*>(a.grad);
    T* const dx = static_cast<T*>(a.dx);
    const int threads = team(a);
    Scratch<float> coefficients(units * BACKWARD_ROWS * C), sums(units * slabs.per_unit * 2 * C);
    Scratch<float> dh(units * C), dh_x(units * C);
    Kept<T> kept(dx, per_sample, unit_by_unit(units, slabs.per_unit, threads), threads);
    if (!coefficients.data || !sums.data || !dh.data || !dh_x.data || !kept.scratch.data) return false;
    for (int64_t unit = 0; unit < units; ++unit)
        write_coefficients<T>(a, unit, coefficients.data + unit * BACKWARD_ROWS * C);

    const auto first = [&](int64_t unit, int64_t slab, int slot) {
        float *const s = sums.data + (unit * slabs.per_unit + slab) * 2 * C, *const keep = kept.at(unit, slot);
        const int64_t begin = slabs.begin(slab), at = unit * per_sample + begin * C;
        fill(s, 2 * C, 0.0f);
        choose(a.silu, [&](auto silu) {
            add_pixels<T, silu.value>(x + at, grad + at, slabs.end(slab) - begin, C,
                                      coefficients.data + unit * BACKWARD_ROWS * C, keep ? keep + begin * C : nullptr,
                                      s);
        });
    };
    const auto between = [&](int64_t unit, int) {
        float *const s = dh.data + unit * C, *const t = dh_x.data + unit * C;
        fill(s, C, 0.0f), fill(t, C, 0.0f);
        for (int64_t slab = 0; slab < slabs.per_unit; ++slab) {
            const float* const from = sums.data + (unit * slabs.per_unit + slab) * 2 * C;
            for (int64_t c = 0; c < C; ++c) s[c] += from[c], t[c] += from[C + c];
        }
        from_order_of<T>(s, C), from_order_of<T>(t, C);
        for (int64_t g = 0; g < a.groups; ++g)
            for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) t[c] *= a.rstd[unit * a.groups + g];
        write_means<T>(a, unit, s, t, coefficients.data + unit * BACKWARD_ROWS * C);
    };
    const auto last = [&](int64_t unit, int64_t slab, int slot) {
        const float* const keep = kept.at(unit, slot);
        const int64_t begin = slabs.begin(slab), at = unit * per_sample + begin * C;
        const float* const rows = coefficients.data + unit * BACKWARD_ROWS * C;
        choose(a.silu, streamed && !keep, [&](auto silu, auto streamed) {
            apply_pixels<T, silu.value, streamed.value>(x + at, grad + at, keep ? keep + begin * C : nullptr, dx + at,
                                                        slabs.end(slab) - begin, C, rows);
        });
        if (streamed) finish_streaming();
    };
    run_phases(units, slabs.per_unit, threads, first, between, last);
    parameter_gradients(a, dh.data, dh_x.data);
    return true;
}

}  // namespace ldm::LDM_ISA::channels_last
