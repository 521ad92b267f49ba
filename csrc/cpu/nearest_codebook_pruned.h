// Narrow codes: groups of codes whose bounding box is too far away are skipped.
//
// The codes are divided into groups of GROUP by halving them again and again, at the median of the coordinate that
// varies most. For a row, a lower bound of the distance to anything in a group's box costs about as much as the
// distance to one code, and W groups are done at a time. The group with the smallest bound is searched first, and after
// that only groups whose bound is not above the best distance so far. If the codebook follows its data, most groups are
// skipped. If it does not (all codes near one point, seen from afar), none are. So a few rows of each block are tried,
// and if more than half of the groups had to be searched, the block goes on with brute force.
//
// The bound. On a box the exact distance ½‖e‖² - ⟨z, e⟩ = Σ ½e_i² - z_i e_i is smallest at c_i = z_i clamped to [lo_i,
// hi_i]. Let R be the length of the box's farthest corner, u = 2^-24 and M = ½R² + ‖z‖R. The float32 distance s of a
// code in the box has 2d roundings, each at most u times a partial sum that does not exceed M: s ≥ exact - 2du·M to
// first order. The bound adds up d terms c_i (½c_i - z_i) with at most three roundings each (two where there are fused
// multiply-adds): 3du·M. γ = (d + 2)·8u is well above the sum 5du: it also covers the roundings of R, ‖z‖ and the start
// of the sum, which is -γM - A with A = d·2^-120 for numbers below 2^-126. So s ≥ bound for every code in the box, and
// a group with bound > best holds neither the nearest code nor one as near. (2^-100 is added to lengths so that γM also
// covers what a CPU set to read subnormal numbers as zero loses: ‖z‖·2^-126 a term.) All this holds if nothing
// overflows: no code may be longer than 2^60, and rows that are longer, or have a NaN, go to brute force.
//
// Of equal distances the lowest index must win, whatever the order of the groups. So codes keep their order inside a
// group, and between groups indices are compared.
#pragma once

#include "nearest_codebook_brute.h"

namespace ldm::LDM_ISA {
namespace {

constexpr int64_t GROUP = 64, GROUP_VECTORS = GROUP / W;
constexpr int64_t WIDEST_PRUNED = 8;

// Codes in the order of their groups; `number` holds their places in the codebook. The box of group g spans
// boxes[g][i][0] to boxes[g][i][1] in coordinate i; the start of its bound is -(γ½R² + A), the slope γR.
struct Groups {
    int64_t count;
    float *data, *norms, *boxes, *start, *slope;
    int32_t* number;
};

// Codes while they are divided into groups: P coordinates each, zeros after the last one, and their numbers.
struct Points {
    float* at;
    int32_t* number;
};

// The coordinates of one code.
template <int P>
struct PointOf;
template <>
struct PointOf<4> {
    using type = float __attribute__((vector_size(16)));
};
template <>
struct PointOf<8> {
    using type = float __attribute__((vector_size(32)));
};
template <int P>
using Point = typename PointOf<P>::type;

// The coordinate that varies most, with its mean and standard deviation.
struct Spread {
    int axis;
    float mean, deviation;
};

// Finds it for n points, from a sample of them.
template <int P>
Spread widest(const float* at, int64_t n) {
    const int64_t step = n / 256 + 1;
    Point<P> origin, sum{}, square{};
    memcpy(&origin, at, sizeof origin);
    float taken = 0.0f;
    for (int64_t k = 0; k < n; k += step, taken += 1.0f) {
        Point<P> point;
        memcpy(&point, at + k * P, sizeof point);
        point -= origin;
        sum += point, square += point * point;
    }
    Spread most{0, origin[0], 0.0f};
    float largest_variance = 0.0f;
    for (int i = 0; i < P; ++i) {
        const float off = sum[i] / taken, variance = square[i] / taken - off * off;
        if (variance > largest_variance) {
            largest_variance = variance;
            most = {i, origin[i] + off, __builtin_sqrtf(variance)};
        }
    }
    return most;
}

// Puts about the `left` smallest of n points along the widest coordinate first and the others after them; both keep
// their order. "About", because points are sorted into bins of a fiftieth of a deviation. (No quantile from 1/3 to 2/3
// is farther than √2 deviations from the mean; the bins reach to 2.5.)
template <int P>
void split(const Points& from, int64_t n, int64_t left, uint8_t* bin, const Points& to) {
    const Spread spread = widest<P>(from.at, n);
    const float scale = spread.deviation > 0.0f ? 50.0f / spread.deviation : 0.0f;
    const float *const in = from.at, shift = 128.0f - spread.mean * scale;
    for (int64_t k = 0; k < n; ++k) {
        float place = in[k * P + spread.axis] * scale + shift;
        place = place > 0.0f ? place : 0.0f;
        place = place < 255.0f ? place : 255.0f;
        bin[k] = static_cast<uint8_t>(static_cast<int>(place));
    }
    int32_t histogram[256] = {};
    for (int64_t k = 0; k < n; ++k) ++histogram[bin[k]];
    int median = 0;
    int64_t quota = left;  // how many of the points in the median's bin go left
    while (histogram[median] < quota) quota -= histogram[median++];
    float* const out = to.at;
    const int32_t* const in_number = from.number;
    int32_t* const out_number = to.number;
    int64_t next_left = 0, next_right = left;
    for (int64_t k = 0; k < n; ++k) {
        const int64_t at_median = bin[k] == median, goes_left = (bin[k] < median) | (at_median & (quota > 0));
        quota -= at_median;
        const int64_t place = next_right + (next_left - next_right) * goes_left;
        next_left += goes_left, next_right += 1 - goes_left;
        memcpy(out + place * P, in + k * P, sizeof(Point<P>));
        out_number[place] = in_number[k];
    }
}

// The range of groups [begin, end) of node `node` of level `level`: the whole, halved as the bits of `node` say.
inline void node_groups(int64_t groups, int level, int64_t node, int64_t& begin, int64_t& end) {
    begin = 0, end = groups;
    for (int bit = level - 1; bit >= 0; --bit) {
        const int64_t middle = begin + (end - begin + 1) / 2;
        (node >> bit & 1 ? begin : end) = middle;
    }
}

// Sorts the points of one node into two halves, or copies them if they are one group.
template <int P>
void split_node(const Points& from, int64_t begin, int64_t middle, int64_t end, uint8_t* bin, const Points& to) {
    const Points in{from.at + begin * P, from.number + begin}, out{to.at + begin * P, to.number + begin};
    if (middle < end) return split<P>(in, end - begin, middle - begin, bin + begin, out);
    memcpy(out.at, in.at, (end - begin) * sizeof(Point<P>));
    memcpy(out.number, in.number, (end - begin) * sizeof(int32_t));
}

// Packs group g of the sorted points, with its box.
template <int P>
void pack_group(const Points& points, int64_t codes, int64_t width, int64_t g, const Groups& groups) {
    const int64_t first = g * GROUP, count = codes - first < GROUP ? codes - first : GROUP;
    for (int64_t v = 0; v < GROUP; v += W) {
        // the lanes after the last code repeat the group's first one, so that they do not widen the box
        const auto number = [&](int64_t j, int64_t i) {
            return points.at[(first + (v + j < count ? v + j : 0)) * P + i];
        };
        pack_vector(width, count - v, __builtin_inff(), number, groups.data + (first + v) * width,
                    groups.norms + first + v);
    }
    memcpy(groups.number + first, points.number + first, count * sizeof(int32_t));
    float square = 0.0f;
    for (int64_t i = 0; i < width; ++i) {
        const float* const data = groups.data + first * width + i * W;
        F low = load(data, Full{}), high = low;
        for (int64_t v = W; v < GROUP; v += W) {
            const F value = load(data + v * width, Full{});
            low = min(value, low), high = max(value, high);
        }
        float* const side = groups.boxes + (g * width + i) * 2;
        side[0] = smallest(low), side[1] = largest(high);
        const float farthest = -side[0] > side[1] ? -side[0] : side[1];
        square += farthest * farthest;
    }
    const float gamma = static_cast<float>(width + 2) * 0x1p-21f, length = length_above(square) + 0x1p-100f;
    groups.start[g] = -(gamma * 0.5f * length * length + static_cast<float>(width) * 0x1p-120f);
    groups.slope[g] = gamma * length;
}

// Fills `groups` from packed codes. Returns false if there was no memory.
template <int P>
bool build_groups(const PackedCodes& codes, int64_t count, int threads, const Groups& groups) {
    Scratch<float> here(count * P), there(count * P);
    Scratch<int32_t> here_number(count), there_number(count);
    Scratch<uint8_t> bin(count);
    if (!here.data || !there.data || !here_number.data || !there_number.data || !bin.data) return false;
    Points from{here.data, here_number.data}, to{there.data, there_number.data};
    parallel_for(count, 4096, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t k = begin; k < end; ++k) {
            from.number[k] = static_cast<int32_t>(k);
            for (int64_t i = 0; i < P; ++i)
                from.at[k * P + i] = i < codes.width ? codes.data[k / W * W * codes.width + i * W + k % W] : 0.0f;
        }
    });
    for (int level = 0; int64_t{1} << level < groups.count; ++level) {
        const int64_t nodes = int64_t{1} << level;
        parallel_for(nodes, nodes / 256, threads, [&](int64_t node, int64_t behind, int) {
            for (; node < behind; ++node) {
                int64_t begin, end;
                node_groups(groups.count, level, node, begin, end);
                const int64_t middle = begin + (end - begin + 1) / 2;
                const auto codes_before = [&](int64_t g) { return g * GROUP < count ? g * GROUP : count; };
                if (begin < end)
                    split_node<P>(from, codes_before(begin), codes_before(middle), codes_before(end), bin.data, to);
            }
        });
        const Points last = from;
        from = to, to = last;
    }
    parallel_for(groups.count, 8, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t g = begin; g < end; ++g) pack_group<P>(from, count, codes.width, g, groups);
    });
    return true;
}

// The rows of a block during the search: z[i][r] are their coordinates, bounds[g * BLOCK_ROWS + r] is the bound of
// group g.
template <int D>
struct PrunedBlock {
    float z[D][BLOCK_ROWS], length[BLOCK_ROWS], best[BLOCK_ROWS];
    int32_t number[BLOCK_ROWS], first[BLOCK_ROWS];  // nearest code so far; group with the smallest bound
    float* bounds;
};

// Fills z and length. Returns false if a row is too long for the bound.
template <int D>
bool load_pruned(const Block& block, PrunedBlock<D>& b) {
    bool hold = true;
    for (int64_t r = 0; r < BLOCK_ROWS; ++r) {
        const float* const row = block.row(r);
        float square = 0.0f;
        for (int i = 0; i < D; ++i) {
            const float value = row[i * ROWS];
            b.z[i][r] = -value;
            square += value * value;
        }
        hold &= square <= LARGEST_SQUARE;
        b.length[r] = length_above(square) + 0x1p-100f;
        b.best[r] = __builtin_inff(), b.number[r] = 0;
    }
    return hold;
}

// Computes the bounds of all groups for all rows, and which is the smallest for each row. Lanes are rows here.
template <int D>
void bound_groups(const Groups& groups, PrunedBlock<D>& b) {
    constexpr int TOGETHER = D <= 4 && W == 16 ? 4 : 2;  // vectors of rows
    const F half = set(0.5f);
    for (int64_t r = 0; r < BLOCK_ROWS; r += TOGETHER * W) {
        F z[TOGETHER][D], minus_length[TOGETHER], least[TOGETHER];
        I first[TOGETHER];
        for (int v = 0; v < TOGETHER; ++v) {
            for (int i = 0; i < D; ++i) z[v][i] = load(b.z[i] + r + v * W, Full{});
            minus_length[v] = -load(b.length + r + v * W, Full{});
            least[v] = set(__builtin_inff()), first[v] = I{};
        }
        for (int64_t g = 0; g < groups.count; ++g) {
            const float* const box = groups.boxes + g * D * 2;
            for (int v = 0; v < TOGETHER; ++v) {
                F bound = fma(minus_length[v], set(groups.slope[g]), set(groups.start[g]));
                for (int i = 0; i < D; ++i) {
                    const F c = max(set(box[2 * i]), min(set(box[2 * i + 1]), z[v][i]));
                    bound = fma(c, fma(c, half, -z[v][i]), bound);
                }
                store(b.bounds + g * BLOCK_ROWS + r + v * W, bound, Full{});
                first[v] = bound < least[v] ? I{} + static_cast<int32_t>(g) : first[v];
                least[v] = min(bound, least[v]);
            }
        }
        for (int v = 0; v < TOGETHER; ++v) memcpy(b.first + r + v * W, &first[v], sizeof(I));
    }
}

// Compares row r with the codes of group g.
template <int D>
inline void search_group(const Groups& groups, int64_t g, PrunedBlock<D>& b, int64_t r) {
    const float* const data = groups.data + g * GROUP * D;
    F s[GROUP_VECTORS];
    for (int v = 0; v < GROUP_VECTORS; ++v) s[v] = load(groups.norms + g * GROUP + v * W, Full{});
    for (int i = 0; i < D; ++i) {
        const F minus_z = set(-b.z[i][r]);
        for (int v = 0; v < GROUP_VECTORS; ++v) s[v] = fused(minus_z, load(data + (v * D + i) * W, Full{}), s[v]);
    }
    F low = s[0];
    for (int v = 1; v < GROUP_VECTORS; ++v) low = min(s[v], low);
    if (__builtin_expect(at_most(low, set(b.best[r])) == 0, 1)) return;
    const float distance = smallest(low);
    int v = 0, hit = first_equal(s[0], distance);
    while (hit == W) hit = first_equal(s[++v], distance);
    const int32_t number = groups.number[g * GROUP + v * W + hit];
    if (distance < b.best[r] || number < b.number[r]) b.best[r] = distance, b.number[r] = number;
}

// Bit r is set if the bound of group g for row r is not above the best distance that the row has found.
template <int D>
uint64_t open_rows(const PrunedBlock<D>& b, int64_t g) {
    static_assert(BLOCK_ROWS == 64, "rows are bits of a word");
    uint64_t open = 0;
    for (int64_t r = 0; r < BLOCK_ROWS; r += W) {
        const F bound = load(b.bounds + g * BLOCK_ROWS + r, Full{});
        open |= static_cast<uint64_t>(at_most(bound, load(b.best + r, Full{}))) << r;
    }
    return open;
}

// Searches all groups for the rows that they are open to.
template <int D>
void search_open(const Groups& groups, PrunedBlock<D>& b) {
    for (int64_t g = 0; g < groups.count; ++g)
        for (uint64_t open = open_rows(b, g); open; open &= open - 1) search_group(groups, g, b, __builtin_ctzll(open));
}

// Finds the indices of a block. Returns whether that paid: false if most groups were open to most rows.
template <int D>
bool search_by_groups(const PackedCodes& codes, const Groups& groups, const Block& block, PrunedBlock<D>& b,
                      int64_t* index) {
    if (!load_pruned(block, b)) {
        search_by_brute_force(codes, block, 0, block.count, index);
        return true;
    }
    bound_groups(groups, b);
    for (int r = 0; r < BLOCK_ROWS; ++r) {
        b.bounds[b.first[r] * BLOCK_ROWS + r] = __builtin_inff();
        search_group(groups, b.first[r], b, r);
    }
    int64_t open = 0;
    for (int64_t g = 0; g < groups.count; ++g) open += __builtin_popcountll(open_rows(b, g));
    if (2 * open > groups.count * BLOCK_ROWS) {
        search_by_brute_force(codes, block, 0, block.count, index);
        return false;
    }
    search_open(groups, b);
    for (int64_t r = 0; r < block.count; ++r) index[block.first + r] = b.number[r];
    return true;
}

}  // namespace
}  // namespace ldm::LDM_ISA
