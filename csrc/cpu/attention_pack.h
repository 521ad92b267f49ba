// Everything that attention and its backward pass do around the tile loops (attention_tile.h), whole vectors at a time:
// moving operands from and to memory (queries and keys are transposed, values are cut into panels, sums are transposed
// back), masks, and the tiles of a block.
#pragma once

#include "attention_tile.h"
#include "simd/transpose.h"

namespace ldm::LDM_ISA {

// Stores the parts of a vector in neighbouring panels.
inline void store_sides(float* to, int64_t panel_stride, F v) {
#if defined(__AVX512F__)
    _mm256_storeu_ps(to, _mm512_castps512_ps256((__m512)v));
    _mm256_storeu_ps(to + panel_stride, _mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
    _mm_storeu_ps(to, _mm256_castps256_ps128((__m256)v));
    _mm_storeu_ps(to + panel_stride, _mm256_extractf128_ps((__m256)v, 1));
#else
    (void)panel_stride;
    store(to, v, Full{});
#endif
}

template <class T>
inline T* head_of(T* p, const int64_t* stride, int64_t batch, int64_t head) {
    return p + batch * stride[0] + head * stride[1];
}

template <int n>
struct Vectors {
    static constexpr int count = n;
};

// Calls tile(row, Vectors<...>) for one of the tiles that cover `rows` queries.
template <class Tile>
inline void one_tile(int64_t rows, int64_t number, const Tile& tile) {
    const int64_t row = number * VECTORS * W;
    if (rows - row > (VECTORS - 1) * W)
        tile(row, Vectors<VECTORS>{});
    else
        tile(row, Vectors<1>{});
}

inline int64_t tiles_of(int64_t rows) { return (rows + VECTORS * W - 1) / (VECTORS * W); }

template <class Tile>
inline void each_tile(int64_t rows, const Tile& tile) {
    for (int64_t number = 0; number < tiles_of(rows); ++number) one_tile(rows, number, tile);
}

// Calls put(i, vector) for each cell i of W rows. Only the first `rows` of them exist; the others repeat the last one,
// so that nobody but the caller has to know how many there are.
template <class Cells, class T, class Put>
inline void transpose_rows(const T* from, int64_t stride, int64_t rows, int64_t width, const Put& put) {
    const int64_t cells = (width + Cells::numbers - 1) / Cells::numbers;
    for (int64_t i = 0; i < cells; i += W) {
        F block[W];
        for (int64_t r = 0; r < W; ++r)
            block[r] = Cells::cells(from + smaller(r, rows - 1) * stride, i * Cells::numbers, width);
        transpose(block);
        const int n = static_cast<int>(smaller(W, cells - i));
        for (int j = 0; j < n; ++j) put(i + j, block[j]);
    }
}

// Packs a tile of queries as tile[cell][V * W], with their signs changed if `negative`.
template <class Cells, int V, class T>
inline void pack_queries(const T* q, int64_t stride, int64_t rows, int64_t width, bool negative, float* tile) {
    for (int v = 0; v < V && v * W < rows; ++v)
        transpose_rows<Cells>(q + v * W * stride, stride, smaller(W, rows - v * W), width, [&](int64_t i, F cells) {
            store(tile + (i * V + v) * W, negative ? Cells::negative(cells) : cells, Full{});
        });
}

// Packs keys as keys[panel][cell][SIDE], with panels up to a multiple of W keys.
template <class Cells, class T>
inline void pack_keys(const T* k, int64_t stride, int64_t rows, int64_t width, float* keys) {
    const int64_t panel = (width + Cells::numbers - 1) / Cells::numbers * SIDE;
    for (int64_t begin = 0; begin < rows; begin += W) {
        float* const to = keys + begin / SIDE * panel;
        transpose_rows<Cells>(k + begin * stride, stride, smaller(W, rows - begin), width,
                              [&](int64_t i, F cells) { store_sides(to + i * SIDE, panel, cells); });
    }
}

// Packs values as values[panel of columns][cell of keys][SIDE], with panels up to a multiple of W columns. A few rows
// are packed at a time, so that the lines of a panel are filled while they are in the cache: panels lie powers of two
// apart and push one another out.
template <class Cells, class T>
inline void pack_values(const T* v, int64_t stride, int64_t rows, int64_t width, float* values) {
    constexpr int64_t GROUP = 4;  // cells
    const int64_t cells = (rows + Cells::numbers - 1) / Cells::numbers;
    for (int64_t first = 0; first < cells; first += GROUP)
        for (int64_t c = 0; c < width; c += W)
            for (int64_t cell = first; cell < smaller(first + GROUP, cells); ++cell) {
                const int64_t row = cell * Cells::numbers;
                const T *const from = v + row * stride, *const next = row + 1 < rows ? from + stride : nullptr;
                store_sides(values + (c / SIDE * cells + cell) * SIDE, cells * SIDE,
                            Cells::columns(from, next, c, width));
            }
}

// Packs rows as to[cell of rows][column], with columns up to a multiple of W.
template <class Cells, class T>
inline void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t width, float* to) {
    for (int64_t r = 0; r < rows; r += Cells::numbers, from += Cells::numbers * stride, to += round_up(width, W))
        for (int64_t c = 0; c < width; c += W)
            store(to + c, Cells::columns(from, r + 1 < rows ? from + stride : nullptr, c, width), Full{});
}

// Writes columns c .. c + W of the result's rows from sums[column][V * W], each row times the factor of its query.
template <int V, class T>
inline void unpack_columns(const float* sums, const F (&factor)[V], int64_t rows, int64_t c, int64_t width, T* out,
                           int64_t stride) {
    for (int v = 0; v < V && v * W < rows; ++v) {
        const int64_t n = smaller(W, rows - v * W);
        T* const to = out + v * W * stride + c;
        F block[W];
        for (int64_t i = 0; i < W; ++i)
            block[i] = load(sums + (smaller(c + i, width - 1) * V + v) * W, Full{}) * factor[v];
        transpose(block);
        if (width - c >= W) {
            for (int64_t r = 0; r < n; ++r) store(to + r * stride, block[r], Full{});
        } else {
            for (int64_t r = 0; r < n; ++r) store(to + r * stride, block[r], Part{static_cast<int>(width - c)});
        }
    }
}

// ---- masks ----

// log2(e) times an additive mask. Finite numbers stay finite: a row that holds nothing but the lowest number is
// uniform, not masked.
inline F in_bits(F mask) {
    const F product = mask * LOG2_E;
    return mask == set(-infinity()) ? product : max(set(LOWEST), product);
}

template <class T>
inline F addends(const T* mask, int64_t i, int64_t n) {
    return in_bits(Single::cells(mask, i, n));
}

inline F addends(const bool* mask, int64_t i, int64_t n) {
    F found;
    for (int64_t lane = 0; lane < W; ++lane) found[lane] = i + lane < n && mask[i + lane] ? 0.0f : -infinity();
    return found;
}

template <class T>
inline float addend(const T* mask) {
    return in_bits(set(to_float(*mask)))[0];
}
inline float addend(const bool* mask) { return *mask ? 0.0f : -infinity(); }

// scores[k] = scale · scores[k] + log2(e) · mask for n keys of a tile. mask points at the first query's first key.
template <int V, class T>
inline void add_mask(const T* mask, int64_t row_stride, int64_t key_stride, int64_t rows, int64_t n, float scale,
                     float* scores) {
    const auto add = [&](int64_t k, int v, F what) {
        float* const at = scores + (k * V + v) * W;
        store(at, fma(load(at, Full{}), set(scale), what), Full{});
    };
    if (row_stride == 0) {  // the same for all queries, as for padded keys
        for (int64_t k = 0; k < n; ++k) {
            const F what = set(addend(mask + k * key_stride));
            for (int v = 0; v < V; ++v) add(k, v, what);
        }
        return;
    }
    for (int v = 0; v < V && v * W < rows; ++v) {
        for (int64_t k = 0; k < n; k += W) {
            F block[W];
            for (int64_t r = 0; r < W; ++r) {
                const T* const from = mask + smaller(v * W + r, rows - 1) * row_stride;
                if (key_stride == 1) {
                    block[r] = addends(from, k, n);
                } else {
                    for (int64_t i = 0; i < W; ++i) block[r][i] = addend(from + smaller(k + i, n - 1) * key_stride);
                }
            }
            transpose(block);
            const int m = static_cast<int>(smaller(W, n - k));
            for (int i = 0; i < m; ++i) add(k + i, v, block[i]);
        }
    }
}

template <int V, class T>
inline void add_mask_of(const Attention& a, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t begin,
                        int64_t n, float scale, float* scores) {
    const int64_t* const stride = a.mask_stride;
    const T* const from = head_of(static_cast<const T*>(a.mask), stride, batch, head);
    add_mask<V>(from + row * stride[2] + begin * stride[3], stride[2], stride[3], rows, n, scale, scores);
}

// Scales and masks the scores of queries row .. row + rows and keys begin .. begin + n if there is a mask. Returns the
// factor by which they still have to be multiplied.
template <int V>
inline float mask_scores(const Attention& a, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t begin,
                         int64_t n, float* scores) {
    const float scale = (a.scale < 0 ? -a.scale : a.scale) * LOG2_E;  // its sign is in the queries
    switch (a.mask_kind) {
        case MaskKind::none:
            return scale;
        case MaskKind::boolean:
            return add_mask_of<V, bool>(a, batch, head, row, rows, begin, n, scale, scores), 1.0f;
        case MaskKind::f32:
            return add_mask_of<V, float>(a, batch, head, row, rows, begin, n, scale, scores), 1.0f;
        case MaskKind::bf16:
            return add_mask_of<V, bf16>(a, batch, head, row, rows, begin, n, scale, scores), 1.0f;
        case MaskKind::f16:
            return add_mask_of<V, f16>(a, batch, head, row, rows, begin, n, scale, scores), 1.0f;
    }
    return scale;
}

}  // namespace ldm::LDM_ISA
