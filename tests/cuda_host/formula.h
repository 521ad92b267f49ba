// The results that nearest_codebook and nearest_codebook_stats must give, computed as plainly as possible.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace formula {

// The formula in the first lines of nearest_codebook.cuh.
template <class Problem>
std::int64_t nearest(const Problem& problem, std::int64_t n) {
    using ldm_fast::nearest::to_float;
    const auto* const query = problem.queries.row(n);
    std::int64_t winner = 0;
    float best = NAN;
    for (std::int64_t k = 0; k < problem.codes.count; ++k) {
        const auto* const code = problem.codes.row(k);
        float norm = 0.0f;
        for (int i = 0; i < problem.dim; ++i) {
            const float e = to_float(code[i * problem.codes.column_stride]);
            norm = std::fmaf(e, e, norm);
        }
        float distance = 0.5f * norm;
        for (int i = 0; i < problem.dim; ++i) {
            distance = std::fmaf(-to_float(query[i * problem.queries.column_stride]),
                                 to_float(code[i * problem.codes.column_stride]), distance);
        }
        if (std::isnan(distance) || (!std::isnan(best) && distance >= best)) continue;
        best = distance;
        winner = k;
    }
    return winner;
}

struct Stats {
    std::vector<std::int64_t> counts;
    std::vector<double> sums;
};

// Computes counts and sums for the indices in problem.out. The rows are ordered by code and then by number. A piece is
// 128 places of this order; if all of a piece belongs to one code, it is added up by itself.
template <class Problem>
Stats stats(const Problem& problem) {
    constexpr std::int64_t PIECE = 128;
    const std::int64_t count = problem.queries.count;
    const int dim = problem.dim;
    Stats result{std::vector<std::int64_t>(problem.codes.count), std::vector<double>(problem.codes.count * dim)};
    std::vector<std::int64_t> rows(count);
    for (std::int64_t n = 0; n < count; ++n) {
        rows[n] = n;
        ++result.counts[problem.out[n]];
    }
    std::stable_sort(rows.begin(), rows.end(),
                     [&](std::int64_t a, std::int64_t b) { return problem.out[a] < problem.out[b]; });
    const auto element = [&](std::int64_t place, int i) {
        return double{ldm_fast::nearest::to_float(problem.queries.row(rows[place])[i * problem.queries.column_stride])};
    };
    std::int64_t first = 0;
    for (std::int64_t k = 0; k < problem.codes.count; ++k) {
        const std::int64_t end = first + result.counts[k];
        for (int i = 0; i < dim; ++i) {
            double sum = 0;
            for (std::int64_t place = first; place < end;) {
                if (place % PIECE == 0 && place + PIECE <= end) {
                    double piece = 0;
                    for (std::int64_t last = place + PIECE; place < last; ++place) piece += element(place, i);
                    sum += piece;
                } else {
                    sum += element(place++, i);
                }
            }
            result.sums[k * dim + i] = static_cast<float>(sum);
        }
        first = end;
    }
    return result;
}

}  // namespace formula
