// attention: softmax(q kᵀ · scale + mask) v and the log-sum-exp of each row, without the (N, M) matrix in memory.
//
// Keys and values of a head are packed once, as panels that the tile loops (attention_tile.h) read from front to back.
// A block of queries then meets the keys a chunk at a time: the scores of a tile of queries are computed, weights take
// their place, and the weighted sum of the values is added to what earlier chunks gave (online softmax, Milakov &
// Gimelshein, arXiv:1805.02867, in base 2). The scores of a tile and a chunk stay in L1, and the chunk's keys and
// values and the block's sums in L2. If all keys fit into one chunk, nothing is ever rescaled, and a block is one tile.
// If the head is also whole vectors wide, its weighted sums have columns in the lanes and go to the result as they are.
//
// Each query has a lane of its own and meets the keys in an order that depends on their number alone. So the result
// depends neither on the other queries nor on the number of threads.
#include "attention_pack.h"
#include "attention_tile.h"
#include "parallel.h"
#include "scratch.h"

namespace ldm::LDM_ISA {
namespace {

constexpr int64_t CHUNK = 128;                    // keys
constexpr int64_t TILE = VECTORS * W;             // queries
constexpr int64_t BLOCK_FLOATS = 1 << 16;         // a block's queries and sums: 256 KB
constexpr int64_t CACHED_FLOATS = 1 << 17;        // half of a common L2
constexpr int64_t WORK_WORTH_A_THREAD = 1 << 16;  // multiplications

// Sizes of one problem; everything packed is counted in floats.
template <class Cells>
struct Sizes {
    int64_t width_cells, padded, columns, block_rows, key_floats, value_floats, block_floats;
    bool by_columns;  // columns are in the lanes of the weighted sums

    explicit Sizes(const Attention& a) {
        width_cells = (a.width + Cells::numbers - 1) / Cells::numbers;
        by_columns = a.keys <= CHUNK && a.width % W == 0;
        padded = round_up(a.width, W);
        columns = round_up(a.width, SIDE);
        const int64_t tiles = a.keys <= CHUNK ? 1 : BLOCK_FLOATS / ((width_cells + columns) * TILE);
        block_rows = TILE * (tiles < 1 ? 1 : smaller(tiles, 8));
        key_floats = round_up(a.keys, W) * width_cells;
        value_floats = (a.keys + Cells::numbers - 1) / Cells::numbers * padded;
        block_floats = block_rows * (width_cells + columns + 2) + TILE * smaller(round_up(a.keys, SIDE), CHUNK);
    }

    // Where the packed values of a chunk start. The values of all columns of a chunk stand together: panels over all
    // keys would lie powers of two apart and compete for the same lines of the cache.
    int64_t values_of(int64_t first_key) const { return first_key / Cells::numbers * padded; }
};

template <class T>
Rows rows_in_memory(const Attention& a, const void* tensor, const int64_t* stride, int64_t batch, int64_t head,
                    int64_t first, int64_t count) {
    const int64_t size = sizeof(T);
    const T* const from = head_of(static_cast<const T*>(tensor), stride, batch, head) + first * stride[2];
    return {reinterpret_cast<const char*>(from), stride[2] * size, a.width * size, count};
}

// One block of queries of one head, and where its intermediate results are.
template <class Cells, class T>
struct Block {
    const Attention& a;
    const Sizes<Cells>& sizes;
    int64_t batch, head, first_row;
    const float *keys, *values;
    float *q, *out, *bases, *sums, *scores;

    Block(const Attention& a, const Sizes<Cells>& sizes, int64_t head, int64_t first_row, const float* keys,
          const float* values, float* work)
        : a(a),
          sizes(sizes),
          batch(head / a.heads),
          head(head % a.heads),
          first_row(first_row),
          keys(keys),
          values(values),
          q(work),
          out(q + sizes.block_rows * sizes.width_cells),
          bases(out + sizes.block_rows * sizes.columns),
          sums(bases + sizes.block_rows),
          scores(sums + sizes.block_rows) {}

    int64_t rows_from(int64_t row) const { return smaller(sizes.block_rows, a.rows - first_row) - row; }

    template <int V>
    void begin(int64_t row) const {
        const T* const from = head_of(static_cast<const T*>(a.q), a.q_stride, batch, head);
        pack_queries<Cells, V>(from + (first_row + row) * a.q_stride[2], a.q_stride[2], rows_from(row), a.width,
                               a.scale < 0, q + row * sizes.width_cells);
        for (int v = 0; v < V; ++v) {
            store(bases + row + v * W, set(LOWEST), Full{});
            store(sums + row + v * W, zero(), Full{});
        }
    }

    // The block's rows of a tensor like q or out.
    Rows rows_of(const void* tensor, const int64_t* stride) const {
        return rows_in_memory<T>(a, tensor, stride, batch, head, first_row, rows_from(0));
    }

    template <int V>
    void meet(int64_t row, int64_t begin, int64_t n, Ahead& next_in, Ahead& next_out) const {
        score<Cells, V>(q + row * sizes.width_cells, keys + begin * sizes.width_cells, sizes.width_cells, n, scores,
                        next_in);
        const float scale = mask_scores<V>(a, batch, head, first_row + row, rows_from(row), begin, n, scores);
        F base[V], sum[V], factor[V], inverse[V];
        for (int v = 0; v < V; ++v) {
            base[v] = load(bases + row + v * W, Full{});
            sum[v] = load(sums + row + v * W, Full{});
        }
        soften<Cells, V>(scores, n, scale, base, sum, factor);
        for (int v = 0; v < V; ++v) {
            store(bases + row + v * W, base[v], Full{});
            store(sums + row + v * W, sum[v], Full{});
            inverse[v] = sum[v] == 0.0f ? zero() : 1.0f / sum[v];  // 0: every key is masked
        }
        const bool last = begin + n == a.keys;
        if (last) store_lse<V>(row);
        const int64_t cells = (n + Cells::numbers - 1) / Cells::numbers;
        float* const from = out + row * sizes.columns;
        T* const to = head_of(static_cast<T*>(a.out), a.out_stride, batch, head) + (first_row + row) * a.out_stride[2];
        if (sizes.by_columns) {
            alignas(64) float factors[V * W];
            for (int v = 0; v < V; ++v) store(factors + v * W, inverse[v], Full{});
            const auto columns = [&](int64_t c, auto vectors) {
                for (int64_t r = 0; r < smaller(V * W, rows_from(row)); r += SIDE) {
                    next_out.fetch();
                    weighted_rows<Cells, V * W, decltype(vectors)::count>(
                        scores + r, values + c, sizes.padded, cells, factors + r, rows_from(row) - r,
                        to + r * a.out_stride[2] + c, a.out_stride[2]);
                }
            };
            int64_t c = 0;
            if (a.width % (2 * W) != 0) {
                if (a.width == W)
                    columns(0, Vectors<1>{});
                else
                    columns(0, Vectors<3>{});
                c = 3 * W;
            }
            for (; c < a.width; c += 2 * W) columns(c, Vectors<2>{});
            return;
        }
        accumulate<Cells, V>(scores, values + sizes.values_of(begin), cells * SIDE, cells, sizes.columns, begin == 0,
                             factor, from, next_out, [&](int64_t end) {
                                 if (last && (end % W == 0 || end == sizes.columns))
                                     unpack_columns<V>(from, inverse, rows_from(row), (end - 1) / W * W, a.width, to,
                                                       a.out_stride[2]);
                             });
    }

    template <int V>
    void store_lse(int64_t row) const {
        float* const lse = a.lse + (batch * a.heads + head) * a.rows + first_row + row;
        each_vector(smaller(V * W, rows_from(row)), [&](int64_t r, auto lanes) {
            const F sum = load(sums + row + r, Full{}), base = load(bases + row + r, Full{});
            store(lse + r, sum == 0.0f ? set(-infinity()) : fma(base, set(LN_2), log(sum)), lanes);
        });
    }

    void attend(Ahead next_in, Ahead next_out) const {
        const int64_t rows = rows_from(0);
        each_tile(rows, [&](int64_t row, auto tile) { begin<decltype(tile)::count>(row); });
        for (int64_t first = 0; first < a.keys; first += CHUNK)
            each_tile(rows, [&](int64_t row, auto tile) {
                meet<decltype(tile)::count>(row, first, smaller(CHUNK, a.keys - first), next_in, next_out);
            });
    }
};

template <class Cells, class T>
bool run(const Attention& a) {
    const Sizes<Cells> sizes(a);
    const int64_t heads = a.batch * a.heads, blocks = (a.rows + sizes.block_rows - 1) / sizes.block_rows;
    const double useful = double(heads) * a.rows * a.keys * a.width / WORK_WORTH_A_THREAD;
    const int threads = useful < 1 ? 1 : useful < a.threads ? static_cast<int>(useful) : a.threads;
    // Usually a thread packs and finishes one head after another, if there are enough heads for all threads. But if the
    // keys of all heads fit into the cache, going through the heads of one block of queries reads and writes whole
    // rows.
    const bool few_keys = a.keys <= CHUNK;
    const bool by_row = few_keys && a.heads * (sizes.key_floats + sizes.value_floats) <= CACHED_FLOATS;
    const bool by_head = !by_row && (threads == 1 || heads >= 4 * threads || heads % threads == 0);
    const int64_t packed = by_head ? threads : heads, chunks = (a.keys + CHUNK - 1) / CHUNK;
    Scratch<float> keys(packed * sizes.key_floats), values(packed * sizes.value_floats);
    Scratch<float> work(threads * sizes.block_floats);
    Scratch<int64_t> own(threads);  // by_head: the head whose keys and values a slot has packed
    if (!keys.data || !values.data || !work.data || !own.data) return false;

    const auto pack = [&](int64_t head, int64_t chunk, int64_t at) {
        const int64_t batch = head / a.heads, h = head % a.heads, first = chunk * CHUNK;
        const int64_t n = smaller(CHUNK, a.keys - first);
        pack_keys<Cells>(head_of(static_cast<const T*>(a.k), a.k_stride, batch, h) + first * a.k_stride[2],
                         a.k_stride[2], n, a.width, keys.data + at * sizes.key_floats + first * sizes.width_cells);
        const T* const v = head_of(static_cast<const T*>(a.v), a.v_stride, batch, h) + first * a.v_stride[2];
        float* const to = values.data + at * sizes.value_floats + sizes.values_of(first);
        if (sizes.by_columns)
            pack_rows<Cells>(v, a.v_stride[2], n, a.width, to);
        else
            pack_values<Cells>(v, a.v_stride[2], n, a.width, to);
    };
    const auto block = [&](int64_t i, int slot) {
        int64_t head = i / blocks, number = i % blocks;
        if (by_row) {
            head = i / (blocks * a.heads) * a.heads + i % a.heads;
            number = i / a.heads % blocks;
        }
        const int64_t at = by_head ? slot : head;
        return Block<Cells, T>(a, sizes, head, number * sizes.block_rows, keys.data + at * sizes.key_floats,
                               values.data + at * sizes.value_floats, work.data + slot * sizes.block_floats);
    };
    // What the thread that does block i will probably need next: the next block and, if that belongs to another head
    // (by_head), the share of that head's keys and values that falls to this block.
    const auto ahead_of = [&](int64_t i, int slot) {
        Ahead ahead;
        if (i + 1 == heads * blocks) return ahead;
        ahead.rows[0] = block(i + 1, slot).rows_of(a.q, a.q_stride);
        const int64_t head = i / blocks + 1, first = i % blocks * a.keys / blocks;
        if (by_head && head < heads) {
            const int64_t count = (i % blocks + 1) * a.keys / blocks - first;
            ahead.rows[1] = rows_in_memory<T>(a, a.k, a.k_stride, head / a.heads, head % a.heads, first, count);
            ahead.rows[2] = rows_in_memory<T>(a, a.v, a.v_stride, head / a.heads, head % a.heads, first, count);
        }
        const int64_t panels = (a.keys + SIDE - 1) / SIDE;
        ahead.share = (ahead.rows[0].count + ahead.rows[1].count + ahead.rows[2].count) / panels + 1;
        return ahead;
    };
    const auto results_ahead_of = [&](int64_t i, int slot) {
        Ahead ahead;
        if (i + 1 == heads * blocks) return ahead;
        ahead.rows[0] = block(i + 1, slot).rows_of(a.out, a.out_stride);
        ahead.share = ahead.rows[0].count / (sizes.columns / SIDE) + 1;
        return ahead;
    };
    for (int slot = 0; slot < threads; ++slot) own.data[slot] = -1;
    if (!by_head)
        parallel_for(heads * chunks, by_row ? chunks : 1, threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) pack(i / chunks, i % chunks, i / chunks);
        });
    parallel_shares(heads * blocks, threads, [&](int64_t i, int slot) {
        if (by_head && own.data[slot] != i / blocks) {
            own.data[slot] = i / blocks;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) pack(i / blocks, chunk, slot);
        }
        block(i, slot).attend(ahead_of(i, slot), results_ahead_of(i, slot));
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
