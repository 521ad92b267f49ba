// Brute force: every row against every code.
//
// d fused multiply-adds and one minimum serve W pairs. A tile of ROWS rows × VECTORS vectors of codes stays in
// registers; narrow rows stay there too, while the codes stream by. The loop keeps no indices. It knows the smallest
// distance of a whole chunk of codes, and a row remembers the first chunk that holds its minimum; at the end that chunk
// is computed once more, to find the first code at that distance. NaN never wins a minimum, and the codes that fill up
// the last vectors have NaN for their norms.
#pragma once

#include "nearest_codebook_codes.h"

namespace ldm::LDM_ISA {
namespace {

constexpr int VECTORS = W == 16 ? 4 : 2;  // what the registers hold
constexpr int STEP = VECTORS * W;
constexpr int64_t CHUNK = 512;                     // codes; a multiple of every STEP
constexpr int NARROW = W == 16 ? 4 : 2;            // coordinates of ROWS rows that fit into half of the registers
constexpr int64_t CHUNK_BYTES = int64_t{1} << 14;  // of wide codes, to stay in the cache for all rows of a block
static_assert(CHUNK % STEP == 0);

// Codes per chunk at this width.
inline int64_t chunk_codes(int64_t width) {
    const int64_t fit = CHUNK_BYTES / (width * static_cast<int64_t>(sizeof(float))) / STEP * STEP;
    return fit < STEP ? STEP : fit < CHUNK ? fit : CHUNK;
}

// What a tile of rows knows after the chunks so far, lane by lane: the smallest distance, and the first chunk that held
// it (-1 if none did, because nothing was below infinity so far).
struct Lowest {
    F value[ROWS];
    I chunk[ROWS];
};

// Takes the chunk's smallest distances into account.
inline void lower(Lowest& lowest, const F* value, int64_t chunk) {
    for (int r = 0; r < ROWS; ++r) {
        lowest.chunk[r] = value[r] < lowest.value[r] ? I{} + static_cast<int32_t>(chunk) : lowest.chunk[r];
        lowest.value[r] = value[r];
    }
}

// Compares the codes [begin, end), a chunk, with a tile of rows whose coordinate i, negated, is at z[i * ROWS + r].
template <int D>
void search_chunk_narrow(const PackedCodes& codes, int64_t begin, int64_t end, const float* z, F* low) {
    F minus_z[ROWS][D];
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < D; ++i) minus_z[r][i] = set(z[i * ROWS + r]);
    for (int64_t k = begin; k < end; k += W) {
        const F norm = load(codes.norms + k, Full{});
        F e[D];
        for (int i = 0; i < D; ++i) e[i] = load(codes.data + k * D + i * W, Full{});
        for (int r = 0; r < ROWS; ++r) {
            F s = norm;
            for (int i = 0; i < D; ++i) s = fused(minus_z[r][i], e[i], s);
            low[r] = min(s, low[r]);
        }
    }
}

inline void search_chunk_wide(const PackedCodes& codes, int64_t begin, int64_t end, const float* z, F* low) {
    for (int64_t k = begin; k < end; k += STEP) {
        F s[ROWS][VECTORS];
        const float* const data = codes.data + k * codes.width;
        for (int v = 0; v < VECTORS; ++v) {
            const F norm = load(codes.norms + k + v * W, Full{});
            for (int r = 0; r < ROWS; ++r) s[r][v] = norm;
        }
        for (int64_t i = 0; i < codes.width; ++i) {
            F e[VECTORS];
            for (int v = 0; v < VECTORS; ++v) e[v] = load(data + v * W * codes.width + i * W, Full{});
            for (int r = 0; r < ROWS; ++r) {
                const F minus_z = set(z[i * ROWS + r]);
                for (int v = 0; v < VECTORS; ++v) s[r][v] = fused(minus_z, e[v], s[r][v]);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) low[r] = min(s[r][v], low[r]);
    }
}

inline void search_chunk(const PackedCodes& codes, int64_t begin, int64_t end, const float* z, Lowest& lowest) {
    static_assert(NARROW == 2 || NARROW == 4);
    F low[ROWS];
    for (int r = 0; r < ROWS; ++r) low[r] = lowest.value[r];
    if (codes.width == 1) {
        search_chunk_narrow<1>(codes, begin, end, z, low);
    } else if (codes.width == 2) {
        search_chunk_narrow<2>(codes, begin, end, z, low);
    } else if (codes.width == 3 && NARROW == 4) {
        search_chunk_narrow<3>(codes, begin, end, z, low);
    } else if (codes.width == 4 && NARROW == 4) {
        search_chunk_narrow<4>(codes, begin, end, z, low);
    } else {
        search_chunk_wide(codes, begin, end, z, low);
    }
    lower(lowest, low, begin / STEP);
}

// The first of the codes [begin, end) whose distance is `value`, or 0.
inline int64_t find(const PackedCodes& codes, int64_t begin, int64_t end, const float* z, float value) {
    for (int64_t k = begin; k < end; k += W) {
        const int hit = first_equal(distances(codes, k, z, ROWS), value);
        if (hit < W) return k + hit;
    }
    return 0;
}

// The first code at the smallest distance from row r of a tile that starts at z.
inline int64_t find_lowest(const PackedCodes& codes, int64_t chunk_size, const float* z, const Lowest& lowest, int r) {
    const float value = smallest(lowest.value[r]);
    int64_t first = codes.padded / STEP;
    for (int j = 0; j < W; ++j)
        if (lowest.value[r][j] == value && lowest.chunk[r][j] < first) first = lowest.chunk[r][j];
    // No chunk held anything below infinity: the first infinite distance anywhere, or 0 if all are NaN.
    if (first < 0) return find(codes, 0, codes.padded, z + r, value);
    const int64_t begin = first * STEP, end = begin + chunk_size < codes.padded ? begin + chunk_size : codes.padded;
    return find(codes, begin, end, z + r, value);
}

// Finds the indices of the rows [begin, end) of a block; begin is a multiple of ROWS.
inline void search_by_brute_force(const PackedCodes& codes, const Block& block, int64_t begin, int64_t end,
                                  int64_t* index) {
    const int64_t chunk_size = chunk_codes(codes.width);
    Lowest lowest[BLOCK_ROWS / ROWS];
    for (Lowest& tile : lowest)
        for (int r = 0; r < ROWS; ++r) tile.value[r] = set(__builtin_inff()), tile.chunk[r] = I{} - 1;
    for (int64_t k = 0; k < codes.padded; k += chunk_size) {
        const int64_t behind = k + chunk_size < codes.padded ? k + chunk_size : codes.padded;
        for (int64_t r = begin; r < end; r += ROWS) search_chunk(codes, k, behind, block.row(r), lowest[r / ROWS]);
    }
    for (int64_t r = begin; r < end; ++r) {
        const int64_t tile = r / ROWS;
        index[block.first + r] =
            find_lowest(codes, chunk_size, block.row(tile * ROWS), lowest[tile], static_cast<int>(r % ROWS));
    }
}

template <class T>
void pack_codes(const NearestCodebook& a, int64_t padded, int threads, float* data, float* norms) {
    const T* const codebook = static_cast<const T*>(a.codebook);
    parallel_for(padded / W, 64, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t k = begin * W; k < end * W; k += W) {
            const int64_t count = a.codes - k < W ? a.codes - k : W;
            const auto number = [&](int64_t j, int64_t i) {
                return j < count ? to_float(codebook[(k + j) * a.codebook_stride[0] + i * a.codebook_stride[1]]) : 0.0f;
            };
            pack_vector(a.width, count, __builtin_nanf(""), number, data + k * a.width, norms + k);
        }
    });
}

}  // namespace
}  // namespace ldm::LDM_ISA
