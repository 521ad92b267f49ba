// nearest_codebook: argmin over k of s(n, k) = ½‖e_k‖² - ⟨z_n, e_k⟩.
//
// s is float32 with fused multiply-adds in index order: norm = fma(e_i, e_i, norm) from 0, s = norm / 2, then
// s = fma(-z_i, e_i, s). Every instruction set and every blocking computes the same bits for a pair, so the answer
// depends on none of them.
//
// Lanes are codes: the codebook is packed into vectors of W codes, one coordinate after the other, so d fused
// multiply-adds and one minimum serve W pairs. A tile of ROWS rows × VECTORS vectors stays in registers. The loop keeps
// no indices: it knows the smallest distance of a whole chunk of codes, a row remembers the first chunk that holds its
// minimum, and in the end that chunk is computed once more to find the first code that has it. NaN never wins a
// minimum; the codes that fill up the last vectors have a NaN for their norm.
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd/vec.h"

namespace ldm::LDM_ISA {
namespace {

constexpr int ROWS = 4;
constexpr int VECTORS = W == 16 ? 4 : 2;  // what the registers hold
constexpr int STEP = VECTORS * W;
constexpr int64_t CHUNK = 512;      // codes; a multiple of every STEP
constexpr int64_t BLOCK_ROWS = 64;  // rows that share one pass over the codebook
constexpr int64_t PAIRS_WORTH_A_THREAD = 1 << 16;
static_assert(CHUNK % STEP == 0 && BLOCK_ROWS % ROWS == 0);

// Codes [k, k + W) as vectors: coordinate i at data + (k * width + i * W), halved norms at norms + k.
struct PackedCodes {
    const float *data, *norms;
    int64_t padded, width;
};

template <class T>
void pack(const NearestCodebook& a, int64_t k, float* data, float* norms) {
    const T* const codebook = static_cast<const T*>(a.codebook);
    F norm = zero();
    for (int64_t i = 0; i < a.width; ++i) {
        float lane[W];
        for (int64_t j = 0; j < W; ++j)
            lane[j] =
                k + j < a.codes ? to_float(codebook[(k + j) * a.codebook_stride[0] + i * a.codebook_stride[1]]) : 0.0f;
        const F e = load(lane, Full{});
        store(data + k * a.width + i * W, e, Full{});
        norm = fused(e, e, norm);
    }
    store(norms + k, norm * 0.5f, Full{});
    for (int64_t j = k < a.codes ? a.codes - k : 0; j < W; ++j) norms[k + j] = __builtin_nanf("");
}

// Distances of one row (negated, coordinate i at z[i * stride]) to the codes of one vector.
inline F distances(const PackedCodes& codes, int64_t k, const float* z, int64_t stride) {
    F s = load(codes.norms + k, Full{});
    for (int64_t i = 0; i < codes.width; ++i)
        s = fused(set(z[i * stride]), load(codes.data + k * codes.width + i * W, Full{}), s);
    return s;
}

// Smallest distance of each of ROWS rows to the codes [begin, end); z holds coordinate i of row r at z[i * ROWS + r],
// negated.
inline void smallest_in_chunk(const PackedCodes& codes, int64_t begin, int64_t end, const float* z, float* smallest) {
    F low[ROWS];
    for (int r = 0; r < ROWS; ++r) low[r] = set(__builtin_inff());
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
    for (int r = 0; r < ROWS; ++r) smallest[r] = -largest(-low[r]);
}

// The first of the codes [begin, end) whose distance is `smallest`, or 0.
int64_t find(const PackedCodes& codes, int64_t begin, int64_t end, const float* z, int64_t stride, float smallest) {
    for (int64_t k = begin; k < end; k += W) {
        float lane[W];
        store(lane, distances(codes, k, z, stride), Full{});
        int hit = W;
        for (int j = W - 1; j >= 0; --j) hit = lane[j] == smallest ? j : hit;
        if (hit < W) return k + hit;
    }
    return 0;
}

template <class T>
void search_block(const NearestCodebook& a, const PackedCodes& codes, int64_t first_row, float* z) {
    const int64_t rows = a.rows - first_row < BLOCK_ROWS ? a.rows - first_row : BLOCK_ROWS;
    const T* const from = static_cast<const T*>(a.z) + first_row * a.z_stride[0];
    float best[BLOCK_ROWS];
    int64_t chunk_of[BLOCK_ROWS];
    for (int64_t r = 0; r < BLOCK_ROWS; ++r) {
        best[r] = __builtin_inff(), chunk_of[r] = -1;
        float* const to = z + r / ROWS * ROWS * a.width + r % ROWS;
        for (int64_t i = 0; i < a.width; ++i)
            to[i * ROWS] = r < rows ? -to_float(from[r * a.z_stride[0] + i * a.z_stride[1]]) : 0.0f;
    }
    for (int64_t begin = 0; begin < codes.padded; begin += CHUNK) {
        const int64_t end = begin + CHUNK < codes.padded ? begin + CHUNK : codes.padded;
        for (int64_t r = 0; r < rows; r += ROWS) {
            float smallest[ROWS];
            smallest_in_chunk(codes, begin, end, z + r * a.width, smallest);
            for (int j = 0; j < ROWS; ++j)
                if (smallest[j] < best[r + j]) best[r + j] = smallest[j], chunk_of[r + j] = begin;
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        // No chunk held anything below infinity: the first infinite distance anywhere, or 0 if all are NaN.
        const int64_t begin = chunk_of[r] < 0 ? 0 : chunk_of[r];
        const int64_t end = chunk_of[r] < 0 || begin + CHUNK > codes.padded ? codes.padded : begin + CHUNK;
        const float* const row = z + r / ROWS * ROWS * a.width + r % ROWS;
        a.index[first_row + r] = find(codes, begin, end, row, ROWS, best[r]);
    }
}

template <class T>
bool search(const NearestCodebook& a) {
    const int64_t padded = (a.codes + STEP - 1) / STEP * STEP;
    const int64_t useful = a.rows * a.codes * a.width / PAIRS_WORTH_A_THREAD;
    const int threads = useful < 1 ? 1 : useful < a.threads ? static_cast<int>(useful) : a.threads;
    Scratch<float> data(padded * a.width), norms(padded), rows(threads * BLOCK_ROWS * a.width);
    if (!data.data || !norms.data || !rows.data) return false;
    parallel_for(padded / W, 64, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t v = begin; v < end; ++v) pack<T>(a, v * W, data.data, norms.data);
    });
    const PackedCodes codes{data.data, norms.data, padded, a.width};
    parallel_for((a.rows + BLOCK_ROWS - 1) / BLOCK_ROWS, 1, threads, [&](int64_t begin, int64_t end, int slot) {
        for (int64_t block = begin; block < end; ++block)
            search_block<T>(a, codes, block * BLOCK_ROWS, rows.data + slot * BLOCK_ROWS * a.width);
    });
    return true;
}

}  // namespace

bool nearest_codebook(const NearestCodebook& a) {
    switch (a.dtype) {
        case Dtype::bf16:
            return search<bf16>(a);
        case Dtype::f16:
            return search<f16>(a);
        default:
            return search<float>(a);
    }
}

}  // namespace ldm::LDM_ISA
