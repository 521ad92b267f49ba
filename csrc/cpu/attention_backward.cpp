// attention_backward: dq, dk and dv from dL/dout and from what the forward pass kept (its result and its log-sum-exp).
//
// With P the probabilities: dV = Pᵀ dO, dP = dO Vᵀ, dS = scale · P ∘ (dP - rowsum(dO ∘ O)), dQ = dS K, dK = dSᵀ Q
// (FlashAttention, arXiv:2205.14135, appendix B). A block of queries meets the keys a chunk at a time; P and dS of a
// block and a chunk stay in L2. Queries are in the lanes, as in the forward pass (attention_tile.h), so scores, dP and
// dQ use its loops. dK and dV are sums over queries, and have columns in the lanes. All sums are float32.
//
// A thread finishes whole heads if there are enough of them. Otherwise all threads work on one block of queries: each
// chunk of keys gets its share of dk and dv and leaves its dS in memory, from which tiles of queries and panels of
// columns then get dq. Both ways add in the same order, so the result depends neither on the number of threads nor on
// the other heads.
//
// If a cell is two bf16 numbers, P and dS are rounded to become operands: dS in pairs of keys for dQ, both in pairs of
// queries for dK and dV.
#include "attention_pack.h"
#include "attention_tile.h"
#include "parallel.h"
#include "scratch.h"

namespace ldm::LDM_ISA {
namespace {

constexpr int64_t CHUNK = 64;                     // keys
constexpr int64_t BLOCK = 4 * VECTORS * W;        // queries
constexpr int64_t STRIP = 64;                     // columns of dq
constexpr int64_t MOST_SLOPES = 1 << 23;          // floats of dS: 32 MB
constexpr int64_t WORK_WORTH_A_THREAD = 1 << 16;  // multiplications

template <class Cells>
inline int64_t cells_of(int64_t n) {
    return (n + Cells::numbers - 1) / Cells::numbers;
}

// Sizes of one problem in floats.
template <class Cells>
struct Sizes {
    int64_t width_cells, padded, columns, packed_keys, packed_columns, sums, block, slopes, work;

    explicit Sizes(const Attention& a) {
        width_cells = cells_of<Cells>(a.width), padded = round_up(a.width, W), columns = round_up(a.width, SIDE);
        packed_keys = round_up(a.keys, W) * width_cells;
        packed_columns = cells_of<Cells>(a.keys) * padded;
        sums = round_up(a.keys, SIDE) * padded;
        block = BLOCK * (2 * width_cells + 2 * padded / Cells::numbers + columns + 2);
        slopes = BLOCK * CHUNK;
        work = BLOCK * CHUNK;
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
#pragma GCC unroll 8
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

// One block of queries of one head, and where its intermediate results are: `block` holds those of all keys, `work`
// those of one chunk. Those of a tile follow one another, at offsets proportional to its first row.
template <class Cells, class T>
struct Block {
    const Head<Cells, T>& h;
    const Attention& a;
    const Sizes<Cells>& sizes;
    int64_t first_row, rows;
    float *q, *grad, *q_rows, *grad_rows, *dq, *lse, *delta, *p, *ds_rows;

    Block(const Head<Cells, T>& h, int64_t number, float* block, float* work)
        : h(h),
          a(h.a),
          sizes(h.sizes),
          first_row(number * BLOCK),
          rows(smaller(BLOCK, a.rows - first_row)),
          q(block),
          grad(q + BLOCK * sizes.width_cells),
          q_rows(grad + BLOCK * sizes.width_cells),
          grad_rows(q_rows + BLOCK / Cells::numbers * sizes.padded),
          dq(grad_rows + BLOCK / Cells::numbers * sizes.padded),
          lse(dq + BLOCK * sizes.columns),
          delta(lse + BLOCK),
          p(work),
          ds_rows(p + BLOCK * CHUNK) {}

    // Packs the operands of a tile.
    template <int V>
    void begin(int64_t row) const {
        const int64_t count = smaller(V * W, rows - row);
        const T* const from = rows_of(static_cast<const T*>(a.q), a.q_stride, row);
        const T* const grads = rows_of(static_cast<const T*>(h.b.grad), h.b.grad_stride, row);
        const T* const out = rows_of(static_cast<const T*>(a.out), a.out_stride, row);
        pack_queries<Cells, V>(from, a.q_stride[2], count, a.width, a.scale < 0, q + row * sizes.width_cells);
        pack_queries<Cells, V>(grads, h.b.grad_stride[2], count, a.width, false, grad + row * sizes.width_cells);
        const float* const from_lse = a.lse + (h.batch * a.heads + h.head) * a.rows + first_row;
        for (int64_t r = 0; r < count; ++r) {
            F product = zero();
            for (int64_t c = 0; c < a.width; c += W) {
                const F g = Single::cells(grads + r * h.b.grad_stride[2], c, a.width);
                product = fma(g, Single::cells(out + r * a.out_stride[2], c, a.width), product);
            }
            delta[row + r] = sum(product);
            // If every key is masked, all scores are -inf. Less infinity, and not less -inf, they give weights of 0.
            lse[row + r] = from_lse[row + r] == -infinity() ? infinity() : from_lse[row + r] * LOG2_E;
        }
        for (int64_t r = row + count; r < row + V * W; ++r) lse[r] = infinity(), delta[r] = 0.0f;
        pack_rows<Cells>(from, a.q_stride[2], count, a.width, q_rows + row / Cells::numbers * sizes.padded);
        pack_rows<Cells>(grads, h.b.grad_stride[2], count, a.width, grad_rows + row / Cells::numbers * sizes.padded);
    }

    template <class U>
    U* rows_of(U* tensor, const int64_t* stride, int64_t row) const {
        return head_of(tensor, stride, h.batch, h.head) + (first_row + row) * stride[2];
    }

    // Computes P and dS of a tile. If a cell is two numbers, dS is kept in cells of keys and also, like P, in cells of
    // queries (ds_rows).
    template <int V>
    void meet(int64_t row, int64_t first, int64_t n, float* ds) const {
        Ahead none;
        float *const weights = p + row * CHUNK, *const slopes = ds + row * CHUNK;
        score<Cells, V>(q + row * sizes.width_cells, h.keys + first * sizes.width_cells, sizes.width_cells, n, weights,
                        none);
        score<Cells, V>(grad + row * sizes.width_cells, h.values + first * sizes.width_cells, sizes.width_cells, n,
                        slopes, none);
        const float left = mask_scores<V>(a, h.batch, h.head, first_row + row, rows - row, first, n, weights);
        float* const slope_rows = ds_rows + row / Cells::numbers * CHUNK;
        F base[V], mean[V];
        for (int v = 0; v < V; ++v) {
            base[v] = load(lse + row + v * W, Full{}), mean[v] = load(delta + row + v * W, Full{});
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
    }

    // Adds a tile's share of dq from dS of a chunk, for the columns from c on.
    template <int V>
    void add_dq(int64_t row, int64_t first, int64_t n, const float* ds, int64_t c, int64_t columns) const {
        Ahead none;
        F one[V];
        for (int v = 0; v < V; ++v) one[v] = set(1.0f);
        const int64_t cells = cells_of<Cells>(n);
        accumulate<Cells, V>(ds + row * CHUNK, h.key_columns + first / Cells::numbers * sizes.padded + c * cells,
                             cells * SIDE, cells, columns, first == 0, one, dq + row * sizes.columns + c * V * W, none,
                             [](int64_t) {});
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
#pragma GCC unroll 8
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

    // Computes P and dS of a chunk, and adds the block's part to dk and dv of the chunk's keys.
    void meet_chunk(int64_t first, float* ds) const {
        const int64_t n = smaller(CHUNK, a.keys - first);
        each_tile(rows, [&](int64_t row, auto tile) { meet<decltype(tile)::count>(row, first, n, ds); });
        const float* const slopes = Cells::numbers == 1 ? ds : ds_rows;
        add_all_rows([&](int64_t row) { return p + row * CHUNK; }, n, grad_rows, h.dv + first * sizes.padded);
        add_all_rows([&](int64_t row) { return slopes + row / Cells::numbers * CHUNK; }, n, q_rows,
                     h.dk + first * sizes.padded);
    }

    // Writes columns c .. c + W of a tile's dq, which are complete.
    template <int V>
    void end(int64_t row, int64_t c) const {
        T* const to = static_cast<T*>(h.b.dq) + ((h.batch * a.heads + h.head) * a.rows + first_row + row) * a.width;
        F one[V];
        for (int v = 0; v < V; ++v) one[v] = set(1.0f);
        unpack_columns<V>(dq + row * sizes.columns, one, rows - row, c, a.width, to, a.width);
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
    if (by_head) {
        Scratch<float> memory(threads * sizes.head());
        Scratch<float> blocks_memory(threads * (sizes.block + sizes.slopes)), work(threads * sizes.work);
        if (!memory.data || !blocks_memory.data || !work.data) return false;
        parallel_for(heads, 1, threads, [&](int64_t begin, int64_t end, int slot) {
            float* const mine = blocks_memory.data + slot * (sizes.block + sizes.slopes);
            for (int64_t number = begin; number < end; ++number) {
                const Head<Cells, T> head(b, sizes, number, memory.data + slot * sizes.head());
                head.begin();
                for (int64_t i = 0; i < blocks; ++i) {
                    const Block<Cells, T> block(head, i, mine, work.data + slot * sizes.work);
                    each_tile(block.rows,
                              [&](int64_t row, auto tile) { block.template begin<decltype(tile)::count>(row); });
                    for (int64_t first = 0; first < a.keys; first += CHUNK) {
                        float* const ds = mine + sizes.block;
                        block.meet_chunk(first, ds);
                        each_tile(block.rows, [&](int64_t row, auto tile) {
                            block.template add_dq<decltype(tile)::count>(row, first, smaller(CHUNK, a.keys - first), ds,
                                                                         0, sizes.columns);
                        });
                    }
                    each_tile(block.rows, [&](int64_t row, auto tile) {
                        for (int64_t c = 0; c < a.width; c += W) block.template end<decltype(tile)::count>(row, c);
                    });
                }
                head.end(0, a.keys);
            }
        });
        return true;
    }

    // dS of a block and all keys is kept, for as many heads at once as MOST_SLOPES allows.
    const int64_t one_head = sizes.head() + sizes.block + chunks * sizes.slopes;
    const int64_t together = smaller(heads, 1 + MOST_SLOPES / (chunks * sizes.slopes));
    Scratch<float> memory(together * one_head), work(threads * sizes.work);
    if (!memory.data || !work.data) return false;
    for (int64_t first_head = 0; first_head < heads; first_head += together) {
        const int64_t count = smaller(together, heads - first_head);
        const auto head = [&](int64_t i) {
            return Head<Cells, T>(b, sizes, first_head + i, memory.data + i * one_head);
        };
        const auto block_memory = [&](int64_t i) { return memory.data + i * one_head + sizes.head(); };
        // Calls what(block, part, slot) for `parts` parts of block `number` of each of these heads.
        const auto each_part = [&](int64_t number, int64_t parts, const auto& what) {
            parallel_for(count * parts, 1, threads, [&](int64_t begin, int64_t end, int slot) {
                for (int64_t i = begin; i < end; ++i) {
                    const Head<Cells, T> mine = head(i / parts);
                    const Block<Cells, T> block(mine, number, block_memory(i / parts), work.data + slot * sizes.work);
                    what(block, block_memory(i / parts) + sizes.block, i % parts);
                }
            });
        };
        parallel_for(count, 1, threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) head(i).begin();
        });
        for (int64_t number = 0; number < blocks; ++number) {
            const int64_t rows = smaller(BLOCK, a.rows - number * BLOCK), tiles = tiles_of(rows);
            const int64_t strips = (a.width + STRIP - 1) / STRIP;
            each_part(number, tiles, [&](const Block<Cells, T>& block, float*, int64_t part) {
                one_tile(rows, part, [&](int64_t row, auto tile) { block.template begin<decltype(tile)::count>(row); });
            });
            each_part(number, chunks, [&](const Block<Cells, T>& block, float* slopes, int64_t part) {
                block.meet_chunk(part * CHUNK, slopes + part * sizes.slopes);
            });
            each_part(number, tiles * strips, [&](const Block<Cells, T>& block, float* slopes, int64_t part) {
                const int64_t c = part % strips * STRIP, columns = smaller(STRIP, sizes.columns - c);
                one_tile(rows, part / strips, [&](int64_t row, auto tile) {
                    constexpr int V = decltype(tile)::count;
                    for (int64_t i = 0; i < chunks; ++i)
                        block.template add_dq<V>(row, i * CHUNK, smaller(CHUNK, a.keys - i * CHUNK),
                                                 slopes + i * sizes.slopes, c, columns);
                    for (int64_t at = c; at < smaller(c + STRIP, a.width); at += W) block.template end<V>(row, at);
                });
            });
        }
        parallel_for(count * chunks, 1, threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i)
                head(i / chunks).end(i % chunks * CHUNK, smaller(i % chunks * CHUNK + CHUNK, a.keys));
        });
    }
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
