// attention: softmax(q kᵀ · scale + mask) v and the log-sum-exp of each row, without the (N, M) matrix in memory.
//
// Keys and values of a head are packed once, as vectors the tile loops (attention_tile.h) can load. A block of queries
// then meets the keys a chunk at a time: scores of a tile of queries, their running maximum and sum (online softmax,
// Milakov & Gimelshein, arXiv:1805.02867, in base 2), and the weighted sum of the values on top of what earlier chunks
// gave. A chunk is small enough to stay in the L2 cache for all tiles of the block. If all keys fit one chunk, nothing
// is ever rescaled.
//
// The order of all sums is fixed by the shapes: the result does not depend on the number of threads.
#include "attention_tile.h"
#include "parallel.h"
#include "scratch.h"

namespace ldm::LDM_ISA {
namespace {

constexpr int64_t CHUNK = 256;             // keys
constexpr int64_t BLOCK_ROWS = 16 * ROWS;  // queries
constexpr float LN_2 = 0x1.62e430p-1f;
constexpr int64_t WORK_WORTH_A_THREAD = 1 << 16;  // multiplications

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline float infinity() { return __builtin_inff(); }

// Sizes of one problem in cells and padded numbers.
template <class Cells>
struct Sizes {
    int64_t width_cells, padded_keys, padded_width, chunk_keys, key_floats, value_floats, block_floats;

    explicit Sizes(const Attention& a) {
        width_cells = round_up(a.width, Cells::numbers) / Cells::numbers;
        padded_keys = round_up(a.keys, W);
        padded_width = round_up(a.width, W);
        chunk_keys = smaller(padded_keys, CHUNK);
        key_floats = padded_keys * width_cells;
        value_floats = padded_keys / Cells::numbers * padded_width;
        block_floats = BLOCK_ROWS * (width_cells + padded_width + 2) + (ROWS + 1) * chunk_keys;
    }
};

template <class T>
inline const T* head_of(const void* p, const int64_t* stride, int64_t batch, int64_t head) {
    return static_cast<const T*>(p) + batch * stride[0] + head * stride[1];
}

// Keys: W of them to a vector, one vector for each cell. Values: a row of columns for each cell of keys.
template <class Cells, class T>
void pack_head(const Attention& a, const Sizes<Cells>& sizes, int64_t batch, int64_t head, float* keys, float* values) {
    const T *const k = head_of<T>(a.k, a.k_stride, batch, head), *const v = head_of<T>(a.v, a.v_stride, batch, head);
    for (int64_t begin = 0; begin < sizes.padded_keys; begin += W) {
        float* const to = keys + begin * sizes.width_cells;
        for (int64_t lane = 0; lane < W; ++lane) {
            const bool exists = begin + lane < a.keys;
            const T* const row = k + (begin + lane) * a.k_stride[2];
            for (int64_t i = 0; i < sizes.width_cells; ++i)
                to[i * W + lane] = exists ? Cells::cell(row, 1, i, a.width) : 0.0f;
        }
    }
    for (int64_t i = 0; i < sizes.padded_keys / Cells::numbers; ++i) {
        float* const to = values + i * sizes.padded_width;
        for (int64_t column = 0; column < a.width; ++column)
            to[column] = Cells::cell(v + column, a.v_stride[2], i, a.keys);
        for (int64_t column = a.width; column < sizes.padded_width; ++column) to[column] = 0.0f;
    }
}

template <class T>
inline float as_addend(T value) {
    return to_float(value) * LOG2_E;
}

inline float as_addend(bool allowed) { return allowed ? 0.0f : -infinity(); }

template <class T>
void read_mask(const Attention& a, int64_t batch, int64_t head, int64_t row, int64_t begin, int64_t n, float* addend) {
    const int64_t* const stride = a.mask_stride;
    const T* const from = static_cast<const T*>(a.mask) + batch * stride[0] + head * stride[1] + row * stride[2];
    for (int64_t k = 0; k < n; ++k) addend[k] = as_addend(from[(begin + k) * stride[3]]);
}

void add_mask(const Attention& a, int64_t batch, int64_t head, int64_t row, int64_t begin, int64_t n, float* buffer,
              float* scores) {
    switch (a.mask_kind) {
        case MaskKind::none:
            return;
        case MaskKind::boolean:
            read_mask<bool>(a, batch, head, row, begin, n, buffer);
            break;
        case MaskKind::f32:
            read_mask<float>(a, batch, head, row, begin, n, buffer);
            break;
        case MaskKind::bf16:
            read_mask<bf16>(a, batch, head, row, begin, n, buffer);
            break;
        case MaskKind::f16:
            read_mask<f16>(a, batch, head, row, begin, n, buffer);
            break;
    }
    for (int64_t k = 0; k < n; ++k) scores[k] += buffer[k];
}

// Scores of one row (base 2, n of them real, padded to a multiple of W) become weights 2^(score - maximum). Updates the
// row's running maximum and sum and returns the factor for what was summed under the old maximum.
inline float soften(float* scores, int64_t n, int64_t padded, float* maximum, float* sum_of_weights) {
    for (int64_t k = n; k < padded; ++k) scores[k] = -infinity();
    F high = set(*maximum);
    for (int64_t k = 0; k < padded; k += W) high = max(load(scores + k, Full{}), high);
    const float top = largest(high);
    const float base = top == -infinity() ? 0.0f : top;  // nothing but masked keys so far
    F total = zero();
    for (int64_t k = 0; k < padded; k += W) {
        const F weight = exp2(load(scores + k, Full{}) - base);
        total += weight;
        store(scores + k, weight, Full{});
    }
    const float factor = exp2(set(*maximum - base))[0];
    *sum_of_weights = *sum_of_weights * factor + sum(total);
    *maximum = top;
    return factor;
}

// One block of queries of one head.
template <class Cells, class T>
void attend(const Attention& a, const Sizes<Cells>& sizes, int64_t batch, int64_t head, int64_t first_row,
            const float* keys, const float* values, float* work) {
    const int64_t rows = smaller(BLOCK_ROWS, a.rows - first_row), cells = sizes.width_cells;
    float *const q = work, *const out = q + BLOCK_ROWS * cells, *const maxima = out + BLOCK_ROWS * sizes.padded_width;
    float *const sums = maxima + BLOCK_ROWS, *const scores = sums + BLOCK_ROWS;
    float* const mask = scores + ROWS * sizes.chunk_keys;

    const T* const from = head_of<T>(a.q, a.q_stride, batch, head) + first_row * a.q_stride[2];
    for (int64_t r = 0; r < BLOCK_ROWS; ++r) {
        for (int64_t i = 0; i < cells; ++i)
            q[r * cells + i] = r < rows ? Cells::cell(from + r * a.q_stride[2], 1, i, a.width) : 0.0f;
        maxima[r] = -infinity(), sums[r] = 0.0f;
    }
    memset(out, 0, static_cast<size_t>(BLOCK_ROWS * sizes.padded_width) * sizeof(float));

    for (int64_t begin = 0; begin < a.keys; begin += sizes.chunk_keys) {
        const int64_t n = smaller(sizes.chunk_keys, a.keys - begin), padded = round_up(n, W);
        const int64_t stride = sizes.chunk_keys;
        for (int64_t tile = 0; tile < rows; tile += ROWS) {
            int64_t k = 0;
            for (; k + VECTORS * W <= padded; k += VECTORS * W)
                score<Cells, VECTORS>(q + tile * cells, keys + (begin + k) * cells, cells, a.scale * LOG2_E, scores + k,
                                      stride);
            for (; k < padded; k += W)
                score<Cells, 1>(q + tile * cells, keys + (begin + k) * cells, cells, a.scale * LOG2_E, scores + k,
                                stride);
            float factor[ROWS];
            for (int64_t r = 0; r < ROWS; ++r) {
                float* const row = scores + r * stride;
                if (tile + r < rows) add_mask(a, batch, head, first_row + tile + r, begin, n, mask, row);
                factor[r] = soften(row, n, padded, maxima + tile + r, sums + tile + r);
                Cells::narrow(row, padded);
            }
            accumulate_all<Cells>(scores, stride, values + begin / Cells::numbers * sizes.padded_width,
                                  sizes.padded_width, padded / Cells::numbers, factor, out + tile * sizes.padded_width);
        }
    }

    T* const to = static_cast<T*>(a.out) + batch * a.out_stride[0] + head * a.out_stride[1];
    float* const lse = a.lse + (batch * a.heads + head) * a.rows + first_row;
    for (int64_t r = 0; r < rows; ++r) {
        const float inverse = sums[r] == 0.0f ? 0.0f : 1.0f / sums[r];
        each_vector(a.width, [&](int64_t c, auto lanes) {
            store(to + (first_row + r) * a.out_stride[2] + c, load(out + r * sizes.padded_width + c, lanes) * inverse,
                  lanes);
        });
        lse[r] = sums[r] == 0.0f ? -infinity() : maxima[r] * LN_2 + __builtin_logf(sums[r]);
    }
}

template <class Cells, class T>
bool run(const Attention& a) {
    const Sizes<Cells> sizes(a);
    const int64_t heads = a.batch * a.heads, blocks = (a.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const double useful = double(heads) * a.rows * a.keys * a.width / WORK_WORTH_A_THREAD;
    const int threads = useful < 1 ? 1 : useful < a.threads ? static_cast<int>(useful) : a.threads;
    // With enough heads for everybody a thread packs and finishes one head after the other.
    const bool by_head = threads == 1 || heads >= 4 * threads || heads % threads == 0;
    const int64_t packed = by_head ? threads : heads;
    Scratch<float> keys(packed * sizes.key_floats), values(packed * sizes.value_floats);
    Scratch<float> work(threads * sizes.block_floats);
    if (!keys.data || !values.data || !work.data) return false;

    const auto pack = [&](int64_t head, int64_t at) {
        pack_head<Cells, T>(a, sizes, head / a.heads, head % a.heads, keys.data + at * sizes.key_floats,
                            values.data + at * sizes.value_floats);
    };
    const auto attend_block = [&](int64_t head, int64_t block, int64_t at, int slot) {
        attend<Cells, T>(a, sizes, head / a.heads, head % a.heads, block * BLOCK_ROWS,
                         keys.data + at * sizes.key_floats, values.data + at * sizes.value_floats,
                         work.data + slot * sizes.block_floats);
    };
    if (by_head) {
        parallel_for(heads, 1, threads, [&](int64_t begin, int64_t end, int slot) {
            for (int64_t head = begin; head < end; ++head) {
                pack(head, slot);
                for (int64_t block = 0; block < blocks; ++block) attend_block(head, block, slot, slot);
            }
        });
        return true;
    }
    parallel_for(heads, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t head = begin; head < end; ++head) pack(head, head);
    });
    parallel_for(heads * blocks, 1, threads, [&](int64_t begin, int64_t end, int slot) {
        for (int64_t i = begin; i < end; ++i) attend_block(i / blocks, i % blocks, i / blocks, slot);
    });
    return true;
}

}  // namespace

bool attention(const Attention& a) {
    switch (a.dtype) {
        case Dtype::bf16:
#if defined(__AVX512BF16__)
            return run<Pair, bf16>(a);
#else
            return run<Single, bf16>(a);
#endif
        case Dtype::f16:
            return run<Single, f16>(a);
        default:
            return run<Single, float>(a);
    }
}

}  // namespace ldm::LDM_ISA
