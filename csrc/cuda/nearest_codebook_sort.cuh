// Sorts the rows of nearest_codebook_stats by their codes, those of one code in their original order: a radix sort from
// the lowest digit of the code to the highest, with RADIX values to a digit. It is stable, so there is only one result,
// whatever runs first.
//
// A pass over one digit is three kernels. count_digits counts how often each value occurs in each block's BLOCK_ITEMS
// entries. scan_digits finds, for each value, how many there are in the blocks before. scatter_digits moves every entry
// to its place: the number of smaller digits, plus the equal ones in earlier blocks, in earlier warps, in earlier
// rounds of the warp and in lower lanes.
//
// Bytes: 16 per entry and pass read, 8 written; a codebook of up to 65536 codes takes two passes.
#pragma once

#include "nearest_codebook_common.cuh"

namespace ldm_fast::nearest {

constexpr int DIGIT_BITS = 8;
constexpr int RADIX = 1 << DIGIT_BITS;
constexpr int WARPS = THREADS / WARP;
constexpr int ROUNDS = 16;  // entries per lane
constexpr int BLOCK_ITEMS = THREADS * ROUNDS;

// An entry is a Key with a code in the place of the distance and the number of a row in that of the index.
struct Sort {
    const Key* indices;  // code of each row; the entries of the first pass
    const Key* from;     // entries after another pass, null in the first one
    Key* to;
    std::int64_t count;
    std::int64_t blocks;
    int shift;               // of the digit in the code
    unsigned* digit_counts;  // [RADIX][blocks]; after scan_digits, how many are in the blocks before
    unsigned* digit_totals;  // [RADIX]

    __device__ Key entry(std::int64_t i) const {
        return from != nullptr ? from[i] : indices[i] << 32 | static_cast<std::uint32_t>(i);
    }
    __device__ int digit(Key entry) const { return static_cast<int>(entry >> (32 + shift)) & (RADIX - 1); }
};

__global__ void __launch_bounds__(THREADS) count_digits(Sort sort) {
    using Counts = unsigned[RADIX];
    Counts& counts = shared_memory<Counts>();
    for (int digit = threadIdx.x; digit < RADIX; digit += THREADS) counts[digit] = 0;
    __syncthreads();  // all are zero
    const std::int64_t first = std::int64_t{blockIdx.x} * BLOCK_ITEMS + threadIdx.x;
#pragma unroll 4
    for (int round = 0; round < ROUNDS; ++round) {
        const std::int64_t i = first + round * THREADS;
        if (i < sort.count) atomicAdd(&counts[sort.digit(sort.entry(i))], 1u);
    }
    __syncthreads();  // all are counted
    for (int digit = threadIdx.x; digit < RADIX; digit += THREADS) {
        sort.digit_counts[digit * sort.blocks + blockIdx.x] = counts[digit];
    }
}

// The sum over this lane and those below it.
__device__ inline unsigned scan_warp(unsigned value) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const unsigned below = __shfl_sync(ALL_LANES, value, lane < distance ? lane : lane - distance);
        if (lane >= distance) value += below;
    }
    return value;
}

// One warp per value of the digit.
__global__ void __launch_bounds__(THREADS) scan_digits(Sort sort) {
    const int lane = threadIdx.x % WARP;
    const int digit = blockIdx.x * WARPS + threadIdx.x / WARP;
    unsigned* const counts = sort.digit_counts + digit * sort.blocks;
    unsigned before = 0;
    for (std::int64_t first = 0; first < sort.blocks; first += WARP) {
        const bool inside = first + lane < sort.blocks;
        const unsigned count = inside ? counts[first + lane] : 0;
        const unsigned so_far = scan_warp(count);
        if (inside) counts[first + lane] = before + so_far - count;
        before += __shfl_sync(ALL_LANES, so_far, WARP - 1);
    }
    if (lane == 0) sort.digit_totals[digit] = before;
}

struct ScatterTile {
    unsigned smaller[RADIX];            // entries with a smaller digit, anywhere
    unsigned counts[WARPS][RADIX + 1];  // of each warp, then where its first entry goes; the last one is for no entry
};

// One warp counts, for every digit, the entries with a smaller one.
__device__ inline void count_smaller(const Sort& sort, ScatterTile& tile) {
    constexpr int PER_LANE = RADIX / WARP;
    unsigned totals[PER_LANE];
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        totals[i] = sort.digit_totals[threadIdx.x * PER_LANE + i];
        sum += totals[i];
    }
    unsigned smaller = scan_warp(sum) - sum;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        tile.smaller[threadIdx.x * PER_LANE + i] = smaller;
        smaller += totals[i];
    }
}

__global__ void __launch_bounds__(THREADS) scatter_digits(Sort sort) {
    ScatterTile& tile = shared_memory<ScatterTile>();
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    unsigned* const counts = tile.counts[warp];
    for (int digit = lane; digit <= RADIX; digit += WARP) counts[digit] = 0;
    if (warp == 0) count_smaller(sort, tile);
    __syncwarp();  // the warp's counts are zero

    const std::int64_t first = std::int64_t{blockIdx.x} * BLOCK_ITEMS + warp * (WARP * ROUNDS) + lane;
    Key entries[ROUNDS];
    unsigned ranks[ROUNDS];  // among the equal digits of the warp
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const std::int64_t i = first + round * WARP;
        entries[round] = i < sort.count ? sort.entry(i) : NO_KEY;
        const int digit = i < sort.count ? sort.digit(entries[round]) : RADIX;
        const unsigned equal = __match_any_sync(ALL_LANES, digit);
        const unsigned lower = equal & ((1u << lane) - 1);
        const unsigned before = counts[digit];
        ranks[round] = before + __popc(lower);
        __syncwarp();  // all have read the count
        if (lower == 0) counts[digit] = before + __popc(equal);
        __syncwarp();  // the count of the next round is there
    }
    __syncthreads();  // all warps have counted
    for (int digit = threadIdx.x; digit < RADIX; digit += THREADS) {
        unsigned place = tile.smaller[digit] + sort.digit_counts[digit * sort.blocks + blockIdx.x];
        for (int w = 0; w < WARPS; ++w) {
            const unsigned count = tile.counts[w][digit];
            tile.counts[w][digit] = place;
            place += count;
        }
    }
    __syncthreads();  // all places are there
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        if (first + round * WARP < sort.count) {
            sort.to[counts[sort.digit(entries[round])] + ranks[round]] = entries[round];
        }
    }
}

}  // namespace ldm_fast::nearest
