// nearest_codebook: argmin over k of s(n, k) = ½‖e_k‖² - ⟨z_n, e_k⟩, and counts and sums of the rows that chose each
// code.
//
// Three searches find the same indices (nearest_codebook_codes.h says why): brute force; brute force that skips groups
// of codes which are too far away, for many narrow codes; and brute force over the candidates of a bfloat16 product,
// for wide codes. Rows are independent, and threads take blocks of them.
#include "nearest_codebook_bf16.h"
#include "nearest_codebook_pruned.h"
#include "nearest_codebook_stats.h"

namespace ldm::LDM_ISA {
namespace {

constexpr double PRODUCTS_WORTH_A_THREAD = 1 << 16;
constexpr int64_t FEWEST_GROUPS = 4;
// Sorting the codes into groups costs about what brute force takes for this many rows of one number.
constexpr int64_t ROWS_WORTH_GROUPS = 36864;

// Only `load` depends on the dtype, so all searches are compiled once.
struct Searched {
    const NearestCodebook& args;
    const PackedCodes& codes;
    int64_t total;  // rows
    int threads;
    Block (*load)(const NearestCodebook&, int64_t number, float* z);
};

// Calls fn(block, slot) for every block of rows. Returns false if there was no memory.
template <class Fn>
bool each_block(const Searched& s, const Fn& fn) {
    Scratch<float> rows(s.threads * BLOCK_ROWS * s.args.width);
    if (!rows.data) return false;
    parallel_for((s.total + BLOCK_ROWS - 1) / BLOCK_ROWS, 1, s.threads, [&](int64_t begin, int64_t end, int slot) {
        for (int64_t number = begin; number < end; ++number)
            fn(s.load(s.args, number, rows.data + slot * BLOCK_ROWS * s.args.width), slot);
    });
    return true;
}

bool brute_force(const Searched& s) {
    return each_block(
        s, [&](const Block& block, int) { search_by_brute_force(s.codes, block, 0, block.count, s.args.index); });
}

// Runs `search` on each block that it is tried on, and brute force on the others.
template <class Fn>
bool with_patience(const Searched& s, const Fn& search) {
    Scratch<Patience> patience(s.threads);
    if (!patience.data) return false;
    for (int slot = 0; slot < s.threads; ++slot) patience.data[slot] = Patience{};
    return each_block(s, [&](const Block& block, int slot) {
        Patience& p = patience.data[slot];
        if (!p.try_now()) return search_by_brute_force(s.codes, block, 0, block.count, s.args.index);
        search(block, slot) ? p.paid() : p.failed();
    });
}

template <int D>
bool pruned(const Searched& s) {
    const int64_t count = (s.args.codes + GROUP - 1) / GROUP;
    Scratch<float> data(count * GROUP * D), norms(count * GROUP), boxes(count * D * 2), start(count), slope(count);
    Scratch<int32_t> number(count * GROUP);
    Scratch<float> bounds(s.threads * count * BLOCK_ROWS);
    Scratch<PrunedBlock<D>> blocks(s.threads);
    if (!data.data || !norms.data || !boxes.data || !start.data || !slope.data || !number.data || !bounds.data ||
        !blocks.data)
        return false;
    const Groups groups{count, data.data, norms.data, boxes.data, start.data, slope.data, number.data};
    if (!build_groups<D <= 4 ? 4 : 8>(s.codes, s.args.codes, s.threads, groups)) return false;
    for (int slot = 0; slot < s.threads; ++slot) blocks.data[slot].bounds = bounds.data + slot * count * BLOCK_ROWS;
    return with_patience(s, [&](const Block& block, int slot) {
        return search_by_groups<D>(s.codes, groups, block, blocks.data[slot], s.args.index);
    });
}

bool pruned_of_width(const Searched& s) {
    static_assert(WIDEST_PRUNED == 8);
    using Search = bool (*)(const Searched&);
    constexpr Search OF_WIDTH[] = {pruned<1>, pruned<2>, pruned<3>, pruned<4>,
                                   pruned<5>, pruned<6>, pruned<7>, pruned<8>};
    return OF_WIDTH[s.args.width - 1](s);
}

#if defined(__AVX512BF16__)
bool bf16_candidates(const Searched& s) {
    const int64_t half = (s.args.width + 1) / 2, padded = s.codes.padded;
    Scratch<uint32_t> pairs(padded * half), row_pairs(s.threads * BLOCK_ROWS * half);
    Scratch<float> base(padded), own(padded), length(padded), error(padded);
    Scratch<Bf16Block> blocks(s.threads);
    if (!pairs.data || !row_pairs.data || !base.data || !own.data || !length.data || !error.data || !blocks.data)
        return false;
    const Bf16Codes codes{pairs.data, base.data, own.data, length.data, error.data, half};
    pack_bf16(s.codes, s.args.codes, codes, s.threads);
    for (int slot = 0; slot < s.threads; ++slot) blocks.data[slot].pairs = row_pairs.data + slot * BLOCK_ROWS * half;
    return with_patience(s, [&](const Block& block, int slot) {
        return search_by_candidates(s.codes, codes, block, blocks.data[slot], s.args.index);
    });
}
#endif

CodebookSearch choose(const Searched& s) {
    const NearestCodebook& a = s.args;
    const bool forced = a.search != CodebookSearch::automatic;
    if (a.search == CodebookSearch::brute_force || !bounds_hold(s.codes, a.codes)) return CodebookSearch::brute_force;
    if (a.width <= WIDEST_PRUNED && a.search != CodebookSearch::bf16_candidates) {
        const bool pays =
            a.codes >= FEWEST_GROUPS * GROUP && s.total * (a.width + 1) >= ROWS_WORTH_GROUPS * (3 + s.threads) / 4;
        if (forced || pays) return CodebookSearch::pruned;
    }
#if defined(__AVX512BF16__)
    if (a.width <= WIDEST_BF16 && a.search != CodebookSearch::pruned) {
        const bool pays = a.width >= NARROWEST_BF16 && a.codes >= FEWEST_CODES_BF16 && s.total >= FEWEST_ROWS_BF16;
        if (forced || pays) return CodebookSearch::bf16_candidates;
    }
#endif
    return CodebookSearch::brute_force;
}

template <class T>
bool run(const NearestCodebook& a) {
    const int64_t total = a.batch * a.rows, padded = (a.codes + STEP - 1) / STEP * STEP;
    const double worth = static_cast<double>(total) * static_cast<double>(a.codes) * static_cast<double>(a.width) /
                         PRODUCTS_WORTH_A_THREAD;
    const int threads = worth < 1.0 ? 1 : worth < a.threads ? static_cast<int>(worth) : a.threads;
    Scratch<float> data(padded * a.width), norms(padded);
    if (!data.data || !norms.data) return false;
    pack_codes<T>(a, padded, threads, data.data, norms.data);
    const PackedCodes codes{data.data, norms.data, padded, a.width};
    const Searched searched{a, codes, total, threads, load_block<T>};
    bool done = false;
    switch (choose(searched)) {
        case CodebookSearch::pruned:
            done = pruned_of_width(searched);
            break;
#if defined(__AVX512BF16__)
        case CodebookSearch::bf16_candidates:
            done = bf16_candidates(searched);
            break;
#endif
        default:
            done = brute_force(searched);
    }
    return done && (a.counts == nullptr || add_up<T>(a, threads));
}

}  // namespace

bool nearest_codebook(const NearestCodebook& a) {
    switch (a.dtype) {
        case Dtype::bf16:
            return run<bf16>(a);
        case Dtype::f16:
            return run<f16>(a);
        default:
            return run<float>(a);
    }
}

}  // namespace ldm::LDM_ISA
