// How often each code was chosen, and the sums of the vectors that chose it.
//
// The rows are sorted by their codes, keeping their order (a counting sort over ranges of rows, one for each thread).
// Then the rows of a code are added up in float64 by one thread and rounded once. Neither the counts nor the sums
// depend on the number of threads.
#pragma once

#include "nearest_codebook_codes.h"

namespace ldm::LDM_ISA {
namespace {

constexpr int64_t ROWS_WORTH_A_RANGE = 8192;

// Fills a.counts and sorts the rows by code: `sorted` holds where they begin in z, and those of code k end at ends[k].
inline void sort_rows(const NearestCodebook& a, int64_t ranges, int64_t* next, int64_t* ends, int64_t* sorted) {
    const int64_t total = a.batch * a.rows;
    const auto each_range = [&](const auto& work) {
        parallel_for(ranges, 1, static_cast<int>(ranges), [&](int64_t t, int64_t behind, int) {
            for (; t < behind; ++t) work(next + t * a.codes, total * t / ranges, total * (t + 1) / ranges);
        });
    };
    each_range([&](int64_t* count, int64_t begin, int64_t end) {
        for (int64_t k = 0; k < a.codes; ++k) count[k] = 0;
        for (int64_t n = begin; n < end; ++n) ++count[a.index[n]];
    });
    int64_t place = 0;
    for (int64_t k = 0; k < a.codes; ++k) {
        const int64_t begin = place;
        for (int64_t t = 0; t < ranges; ++t) {
            const int64_t count = next[t * a.codes + k];
            next[t * a.codes + k] = place;
            place += count;
        }
        ends[k] = place;
        a.counts[k] = place - begin;
    }
    each_range([&](int64_t* to, int64_t begin, int64_t end) {
        Rows row(a, begin);
        for (int64_t n = begin; n < end; ++n, row.step()) sorted[to[a.index[n]]++] = row.offset;
    });
}

// Adds up L coordinates from z on, over the rows that begin at the offsets [begin, end).
template <int L, class T>
void add_rows(const T* z, int64_t stride, const int64_t* begin, const int64_t* end, float* out) {
    double sum[L] = {};
    for (; begin < end; ++begin)
        for (int i = 0; i < L; ++i) sum[i] += static_cast<double>(to_float(z[*begin + i * stride]));
    for (int i = 0; i < L; ++i) out[i] = static_cast<float>(sum[i]);
}

// Fills counts and sums from the indices. Returns false if there was no memory.
template <class T>
bool add_up(const NearestCodebook& a, int threads) {
    const int64_t total = a.batch * a.rows, worth = total / ROWS_WORTH_A_RANGE + 1;
    const int64_t ranges = worth < threads ? worth : threads;
    Scratch<int64_t> next(ranges * a.codes), ends(a.codes), sorted(total);
    if (!next.data || !ends.data || !sorted.data) return false;
    sort_rows(a, ranges, next.data, ends.data, sorted.data);
    const T* const z = static_cast<const T*>(a.z);
    const int64_t stride = a.z_stride[2];
    parallel_for(a.codes, a.codes / (8 * threads), threads, [&](int64_t k, int64_t behind, int) {
        for (; k < behind; ++k) {
            const int64_t *const end = sorted.data + ends.data[k], *const begin = end - a.counts[k];
            float* const out = a.sums + k * a.width;
            int64_t i = 0;
            for (; i + 16 <= a.width; i += 16) add_rows<16>(z + i * stride, stride, begin, end, out + i);
            for (; i + 4 <= a.width; i += 4) add_rows<4>(z + i * stride, stride, begin, end, out + i);
            for (; i < a.width; ++i) add_rows<1>(z + i * stride, stride, begin, end, out + i);
        }
    });
    return true;
}

}  // namespace
}  // namespace ldm::LDM_ISA
