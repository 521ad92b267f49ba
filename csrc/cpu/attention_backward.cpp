// attention_backward: dq, dk and dv from dL/dout and what the forward pass kept (its result and its log-sum-exp).
//
// With P the probabilities: dV = Pᵀ dO, dP = dO Vᵀ, dS = scale · P ∘ (dP - rowsum(dO ∘ O)), dQ = dS K, dK = dSᵀ Q
// (FlashAttention, arXiv:2205.14135, appendix B). A block of queries meets the keys a chunk at a time; P and dS of a
// block and a chunk stay in L2, queries in the lanes as in the forward pass (attention_tile.h), so that scores, dP and
// dQ are its loops. dK and dV are sums over queries: there the columns are in the lanes. All sums are float32.
//
// A thread finishes whole heads where there are enough of them. Else the blocks of dq and the chunks of dk and dv are
// separate pieces of work, and P and dS are computed twice. Both ways add in the same order: the result does not
// depend on the number of threads, nor on the other heads.
//
// Where a cell is two bf16 numbers, P and dS are rounded to be operands: dS in pairs of keys for dQ, both in pairs of
// queries for dK and dV.
#include "attention_pack.h"
#include "attention_tile.h"
#include "parallel.h"
#include "scratch.h"

namespace ldm::LDM_ISA {
namespace {

constexpr int64_t CHUNK = 64;                     // keys
constexpr int64_t BLOCK = 4 * VECTORS * W;        // queries
constexpr int64_t WORK_WORTH_A_THREAD = 1 << 16;  // multiplications

template <class Cells>
inline int64_t cells_of(int64_t n) {
    return (n + Cells::numbers - 1) / Cells::numbers;
}

// Sizes of one problem in floats.
template <class Cells>
struct Sizes {
    int64_t width_cells, padded, columns, packed_keys, packed_columns, sums, work;

    explicit Sizes(const Attention& a) {
        width_cells = cells_of<Cells>(a.width), padded = round_up(a.width, W), columns = round_up(a.width, SIDE);
        packed_keys = round_up(a.keys, W) * width_cells;
        packed_columns = cells_of<Cells>(a.keys) * padded;
        sums = round_up(a.keys, SIDE) * padded;
        work = BLOCK * (2 * width_cells + 2 * padded / Cells::numbers + columns + 2 + 2 * CHUNK);
        if (Cells::numbers > 1) work += BLOCK * CHUNK / Cells::numbers;  // dS a second time
    }
    int64_t head() const { return 2 * packed_keys + packed_columns + 2 * sums; }
};

// sums[s][v] += Σ_q left[s][q] · right[q][v] over the first n of a tile's L cells of queries.
template <class Cells, int L, int V>
inline void multiply_rows(const float* left, const float* right, int64_t stride, int64_t n, F (&sums)[SIDE][V]) {
    for (int64_t q = 0; q < n; ++q) {
        F columns[V];
        for (int v = 0; v < V; ++v) columns[v] = load(right + q * stride + v * W, Full{});
        for (int s = 0; s < SIDE; ++s) {
            const F cell = set(left[s * L + q]);
            for (int v = 0; v < V; ++v) sums[s][v] = Cells::add(cell, columns[v], sums[s][v]);
        }
    }
}

// One head: its keys and values, packed, and the sums of their gradients.
template <class Cells, class T>
struct Head {
    const AttentionBackward& b;
    const Attention& a;
    const Sizes<Cells>& sizes;
    int64_t batch, head;
    float *keys, *values, *key_columns, *dk, *dv;

    Head(const AttentionBackward& b, const Sizes<Cells>& sizes, int64_t number, float* memory)
        : b(b),
          a(b.forward),
          sizes(sizes),
          batch(number / a.heads),
          head(number % a.heads),
          keys(memory),
          values(keys + sizes.packed_keys),
          key_columns(values + sizes.packed_keys),
          dk(key_columns + sizes.packed_columns),
          dv(dk + sizes.sums) {}

    void begin() const {
        const T* const k = head_of(static_cast<const T*>(a.k), a.k_stride, batch, head);
        const T* const v = head_of(static_cast<const T*>(a.v), a.v_stride, batch, head);
        pack_keys<Cells>(k, a.k_stride[2], a.keys, a.width, keys);
        pack_keys<Cells>(v, a.v_stride[2], a.keys, a.width, values);
        for (int64_t first = 0; first < a.keys; first += CHUNK)  // the columns of a chunk stand together
            pack_values<Cells>(k + first * a.k_stride[2], a.k_stride[2], smaller(CHUNK, a.keys - first), a.width,
                               key_columns + first / Cells::numbers * sizes.padded);
        memset(dk, 0, static_cast<size_t>(2 * sizes.sums) * sizeof(float));
    }

    void end(int64_t first, int64_t last) const {
        const int64_t row = (batch * a.heads + head) * a.keys;
        for (int64_t k = first; k < last; ++k)
            each_vector(a.width, [&](int64_t c, auto lanes) {
                const int64_t to = (row + k) * a.width + c;
                store(static_cast<T*>(b.dk) + to, load(dk + k * sizes.padded + c, lanes), lanes);
                store(static_cast<T*>(b.dv) + to, load(dv + k * sizes.padded + c, lanes), lanes);
            });
    }
};

// One block of queries of one head, and where its intermediate results are. Those of a tile follow one another, at
// offsets in proportion to its first row.
template <class Cells, class T>
struct Block {
    const Head<Cells, T>& h;
    const Attention& a;
    const Sizes<Cells>& sizes;
    int64_t first_row, rows;
    float *q, *grad, *q_rows, *grad_rows, *dq, *lse, *delta, *p, *ds, *ds_rows;

    Block(const Head<Cells, T>& h, int64_t number, float* work)
        : h(h),
          a(h.a),
          sizes(h.sizes),
          first_row(number * BLOCK),
          rows(smaller(BLOCK, a.rows - first_row)),
          q(work),
          grad(q + BLOCK * sizes.width_cells),
          q_rows(grad + BLOCK * sizes.width_cells),
          grad_rows(q_rows + BLOCK / Cells::numbers * sizes.padded),
          dq(grad_rows + BLOCK / Cells::numbers * sizes.padded),
          lse(dq + BLOCK * sizes.columns),
          delta(lse + BLOCK),
          p(delta + BLOCK),
          ds(p + BLOCK * CHUNK),
          ds_rows(Cells::numbers == 1 ? ds : ds + BLOCK * CHUNK) {}

    void begin() const {
        const int64_t *const q_stride = a.q_stride, *const grad_stride = h.b.grad_stride;
        const T* const from = head_of(static_cast<const T*>(a.q), q_stride, h.batch, h.head) + first_row * q_stride[2];
        const T* const grads =
            head_of(static_cast<const T*>(h.b.grad), grad_stride, h.batch, h.head) + first_row * grad_stride[2];
        const T* const out =
            head_of(static_cast<const T*>(a.out), a.out_stride, h.batch, h.head) + first_row * a.out_stride[2];
        each_tile(rows, [&](int64_t row, auto tile) {
            constexpr int V = decltype(tile)::count;
            pack_queries<Cells, V>(from + row * q_stride[2], q_stride[2], rows - row, a.width, a.scale < 0,
                                   q + row * sizes.width_cells);
            pack_queries<Cells, V>(grads + row * grad_stride[2], grad_stride[2], rows - row, a.width, false,
                                   grad + row * sizes.width_cells);
        });
        const float* const from_lse = a.lse + (h.batch * a.heads + h.head) * a.rows + first_row;
        for (int64_t r = 0; r < rows; ++r) {
            F product = zero();
            for (int64_t c = 0; c < a.width; c += W) {
                const F g = Single::cells(grads + r * grad_stride[2], c, a.width);
                product = fma(g, Single::cells(out + r * a.out_stride[2], c, a.width), product);
            }
            delta[r] = sum(product);
            // With every key masked all scores are -inf; less infinity, and not less -inf, they give weights of 0.
            lse[r] = from_lse[r] == -infinity() ? infinity() : from_lse[r] * LOG2_E;
        }
        for (int64_t r = rows; r < round_up(rows, VECTORS * W); ++r) lse[r] = infinity(), delta[r] = 0.0f;
        keep_rows(from, q_stride[2], q_rows);
        keep_rows(grads, grad_stride[2], grad_rows);
    }

    // to[cell of rows][column]
    void keep_rows(const T* from, int64_t stride, float* to) const {
        for (int64_t r = 0; r < rows; r += Cells::numbers, from += Cells::numbers * stride, to += sizes.padded)
            for (int64_t c = 0; c < a.width; c += W)
                store(to + c, Cells::columns(from, r + 1 < rows ? from + stride : nullptr, c, a.width), Full{});
    }

    // P and dS of a tile, and its share of dq. Where a cell is two numbers, dS is kept in cells of keys, and in cells
    // of queries (ds_rows) like P.
    template <int V>
    void meet(int64_t row, int64_t first, int64_t n, bool want_dq) const {
        Ahead none;
        float *const weights = p + row * CHUNK, *const slopes = ds + row * CHUNK;
        score<Cells, V>(q + row * sizes.width_cells, h.keys + first * sizes.width_cells, sizes.width_cells, n, weights,
                        none);
        score<Cells, V>(grad + row * sizes.width_cells, h.values + first * sizes.width_cells, sizes.width_cells, n,
                        slopes, none);
        const float left = mask_scores<V>(a, h.batch, h.head, first_row + row, rows - row, first, n, weights);
        float* const slope_rows = ds_rows + row / Cells::numbers * CHUNK;
        F base[V], mean[V], one[V];
        for (int v = 0; v < V; ++v) {
            base[v] = load(lse + row + v * W, Full{}), mean[v] = load(delta + row + v * W, Full{});
            one[v] = set(1.0f);
        }
        const auto weigh = [&](int64_t k, int v, F& weight, F& slope) {
            const int64_t at = (k * V + v) * W;
            weight = Cells::weight(fma(load(weights + at, Full{}), set(left), -base[v]));
            slope = weight * (load(slopes + at, Full{}) - mean[v]) * a.scale;
        };
        F weight[V], slope[V], next[V];
        if constexpr (Cells::numbers == 1) {
            for (int v = 0; v < V; ++v)
                for (int64_t k = 0; k < n; ++k) {
                    weigh(k, v, weight[v], slope[v]);
                    store(weights + (k * V + v) * W, weight[v], Full{});
                    store(slopes + (k * V + v) * W, slope[v], Full{});
                }
        } else {
            const auto weigh_all = [&](int64_t k, F(&slope)[V]) {
                for (int v = 0; v < V; ++v) weigh(k, v, weight[v], slope[v]);
                Cells::store_lanes(weights + k * V * W / 2, weight);
                Cells::store_lanes(slope_rows + k * V * W / 2, slope);
            };
            for (int64_t k = 0; k < n; k += 2) {
                weigh_all(k, slope);
                if (k + 1 < n)
                    weigh_all(k + 1, next);
                else
                    for (int v = 0; v < V; ++v) next[v] = zero();
                for (int v = 0; v < V; ++v) store(slopes + (k / 2 * V + v) * W, Cells::both(slope[v], next[v]), Full{});
            }
        }
        const int64_t cells = cells_of<Cells>(n);
        if (want_dq)
            accumulate<Cells, V>(slopes, h.key_columns + first / Cells::numbers * sizes.padded, cells * SIDE, cells,
                                 sizes.columns, first == 0, one, dq + row * sizes.columns, none);
    }

    // to[k] += Σ_q left[k][q] · right[q] for V vectors of columns and SIDE keys, over all queries of the block.
    template <int V, class Left>
    void add_rows(const Left& left, int64_t k, const float* right, float* to) const {
        F sums[SIDE][V] = {};
        each_tile(rows, [&](int64_t row, auto tile) {
            constexpr int L = decltype(tile)::count * W / Cells::numbers;
            multiply_rows<Cells, L, V>(left(row) + k * L, right + row / Cells::numbers * sizes.padded, sizes.padded,
                                       smaller(L, cells_of<Cells>(rows - row)), sums);
        });
        for (int s = 0; s < SIDE; ++s)
            for (int v = 0; v < V; ++v) {
                float* const at = to + s * sizes.padded + v * W;
                store(at, load(at, Full{}) + sums[s][v], Full{});
            }
    }

    template <class Left>
    void add_all_rows(const Left& left, int64_t n, const float* right, float* to) const {
        for (int64_t k = 0; k < n; k += SIDE) {
            float* const row = to + k * sizes.padded;
            int64_t c = 0;
            for (; c + 2 * W <= sizes.padded; c += 2 * W) add_rows<2>(left, k, right + c, row + c);
            if (c < sizes.padded) add_rows<1>(left, k, right + c, row + c);
        }
    }

    void meet_all(int64_t first_key, int64_t last_key, bool want_dq, bool want_dkv) const {
        for (int64_t first = first_key; first < last_key; first += CHUNK) {
            const int64_t n = smaller(CHUNK, last_key - first);
            each_tile(rows, [&](int64_t row, auto tile) { meet<decltype(tile)::count>(row, first, n, want_dq); });
            if (!want_dkv) continue;
            add_all_rows([&](int64_t row) { return p + row * CHUNK; }, n, grad_rows, h.dv + first * sizes.padded);
            add_all_rows([&](int64_t row) { return ds_rows + row / Cells::numbers * CHUNK; }, n, q_rows,
                         h.dk + first * sizes.padded);
        }
    }

    void end() const {
        T* const to = static_cast<T*>(h.b.dq) + ((h.batch * a.heads + h.head) * a.rows + first_row) * a.width;
        each_tile(rows, [&](int64_t row, auto tile) {
            constexpr int V = decltype(tile)::count;
            F one[V];
            for (int v = 0; v < V; ++v) one[v] = set(1.0f);
            unpack_rows<V>(dq + row * sizes.columns, one, rows - row, a.width, to + row * a.width, a.width);
        });
    }
};

template <class Cells, class T>
bool run(const AttentionBackward& b) {
    const Attention& a = b.forward;
    const Sizes<Cells> sizes(a);
    const int64_t heads = a.batch * a.heads, blocks = (a.rows + BLOCK - 1) / BLOCK;
    const int64_t chunks = (a.keys + CHUNK - 1) / CHUNK;
    const double useful = double(heads) * a.rows * a.keys * a.width / WORK_WORTH_A_THREAD;
    const int threads = useful < 1 ? 1 : useful < a.threads ? static_cast<int>(useful) : a.threads;
    const bool by_head = threads == 1 || heads >= 4 * threads || heads % threads == 0;
    Scratch<float> memory((by_head ? threads : heads) * sizes.head()), work(threads * sizes.work);
    if (!memory.data || !work.data) return false;

    const auto head = [&](int64_t number, int64_t at) {
        return Head<Cells, T>(b, sizes, number, memory.data + at * sizes.head());
    };
    const auto block = [&](const Head<Cells, T>& of, int64_t number, int slot, int64_t first, int64_t last, bool dq,
                           bool dkv) {
        const Block<Cells, T> one(of, number, work.data + slot * sizes.work);
        one.begin();
        one.meet_all(first, last, dq, dkv);
        if (dq) one.end();
    };
    if (by_head) {
        parallel_for(heads, 1, threads, [&](int64_t begin, int64_t end, int slot) {
            for (int64_t number = begin; number < end; ++number) {
                const Head<Cells, T> mine = head(number, slot);
                mine.begin();
                for (int64_t i = 0; i < blocks; ++i) block(mine, i, slot, 0, a.keys, true, true);
                mine.end(0, a.keys);
            }
        });
        return true;
    }
    parallel_for(heads, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t number = begin; number < end; ++number) head(number, number).begin();
    });
    parallel_for(heads * (blocks + chunks), 1, threads, [&](int64_t begin, int64_t end, int slot) {
        for (int64_t i = begin; i < end; ++i) {
            const Head<Cells, T> mine = head(i / (blocks + chunks), i / (blocks + chunks));
            const int64_t part = i % (blocks + chunks), first = (part - blocks) * CHUNK;
            if (part < blocks) {
                block(mine, part, slot, 0, a.keys, true, false);
                continue;
            }
            const int64_t last = smaller(first + CHUNK, a.keys);
            for (int64_t number = 0; number < blocks; ++number) block(mine, number, slot, first, last, false, true);
            mine.end(first, last);
        }
    });
    return true;
}

}  // namespace

bool attention_backward(const AttentionBackward& b) {
    switch (b.forward.dtype) {
        case Dtype::bf16:
#if defined(__AVX512BF16__)
            return run<Pair, bf16>(b);
#else
            return run<Single, bf16>(b);
#endif
        case Dtype::f16:
            return run<Single, f16>(b);
        default:
            return run<Single, float>(b);
    }
}

}  // namespace ldm::LDM_ISA
