// Runs the CUDA source of nearest_codebook on the CPU for the cases in a file, and next to it the documented formulas.
//
// usage: nearest_codebook CASES RESULTS [FILE:LINE | bounds]      leaves out the barrier on that line, or the bounds
// CASES: for each case twelve int64 (batches, rows, k, d, dtype 0 float32 / 1 float16 / 2 bfloat16, SMs of the GPU to
// plan for, three strides of z and two of the codebook in elements, and 1 if counts and sums are wanted), then the
// bytes of z and of the codebook as they lie in memory. RESULTS: for each case the method (0 chunk, 1 tiled, 2 tensor),
// the number of ranges that the codes were divided into, n indices from the kernels and n from the formula, all int64.
// If counts and sums are wanted, k counts as int64 and k * d sums as float64 from the kernels follow, and the same from
// the formula.
#include "instructions_on_host.h"
// The shim first: it stands in for the CUDA headers.
#include "../../csrc/cuda/nearest_codebook.cuh"

#include <algorithm>
#include <fstream>
#include <stdexcept>
#include <string>

#include "formula.h"

namespace nearest = ldm_fast::nearest;

// To test the tests: if true, nearest_tensor assumes that bfloat16 makes no errors.
bool bounds_to_skip = false;

template <class Arguments>
void forget_bounds(void (*)(Arguments), nearest::Grid, const Arguments&) {}

template <class T>
void forget_bounds(void (*kernel)(nearest::Problem<T>), nearest::Grid grid, const nearest::Problem<T>& problem) {
    if (kernel != nearest::nearest_tensor<T>) return;
    const std::int64_t code_tiles = nearest::divide_up(problem.codes.count, nearest::TENSOR_ROWS);
    std::fill_n(problem.operands.query_bounds, grid.x * nearest::TENSOR_ROWS, nearest::Bound{0, 0});
    std::fill_n(problem.operands.code_bounds, code_tiles * nearest::BOUNDS, nearest::Bound{0, 0});
}

struct Launcher {
    std::int64_t ranges = 0;

    template <class Arguments>
    void operator()(void (*kernel)(Arguments), nearest::Grid grid, const Arguments& arguments) {
        ranges = grid.y > ranges ? grid.y : ranges;
        if (bounds_to_skip) forget_bounds(kernel, grid, arguments);
        cuda_on_host::run_grid(grid.x, grid.y, nearest::THREADS, [&] { kernel(arguments); });
    }
};

// Makes each piece of the workspace a buffer of exactly the size asked for, so that AddressSanitizer sees an access one
// element too far. The buffers are filled with bytes that are NaN and no valid index.
class Pieces {
  public:
    template <class U>
    U* take(std::int64_t count) {
        const std::size_t size = static_cast<std::size_t>(count) * sizeof(U);
        void* memory = nullptr;
        if (posix_memalign(&memory, 256, size + (size == 0)) != 0) throw std::bad_alloc();
        std::memset(memory, 0xff, size);
        pieces_.push_back(memory);
        size_ += nearest::divide_up(static_cast<std::int64_t>(size), 256) * 256;
        return static_cast<U*>(memory);
    }
    Pieces() = default;
    Pieces(const Pieces&) = delete;
    Pieces& operator=(const Pieces&) = delete;
    ~Pieces() {
        for (void* piece : pieces_) std::free(piece);
    }
    std::int64_t size() const { return size_; }

  private:
    std::vector<void*> pieces_;
    std::int64_t size_ = 0;
};

// A buffer of exactly the bytes that the strides reach, aligned as on a GPU.
template <class T>
class Elements {
  public:
    Elements(std::istream& in, std::initializer_list<std::int64_t> sizes, std::initializer_list<std::int64_t> strides) {
        std::int64_t count = 1;
        auto stride = strides.begin();
        for (const std::int64_t size : sizes) count += (size - 1) * *stride++;
        for (const std::int64_t size : sizes) count = size == 0 ? 0 : count;
        const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
        if (posix_memalign(&memory_, 256, bytes + (bytes == 0)) != 0) throw std::bad_alloc();
        in.read(static_cast<char*>(memory_), static_cast<std::streamsize>(bytes));
    }
    ~Elements() { std::free(memory_); }
    Elements(const Elements&) = delete;
    Elements& operator=(const Elements&) = delete;
    const T* data() const { return static_cast<const T*>(memory_); }

  private:
    void* memory_ = nullptr;
};

constexpr int HEADER = 12;

template <class U>
void write(std::ostream& results, const std::vector<U>& values) {
    results.write(reinterpret_cast<const char*>(values.data()),
                  static_cast<std::streamsize>(values.size() * sizeof(U)));
}

template <class T>
void run_stats(const nearest::Problem<T>& problem, Launcher& launcher, std::ostream& results) {
    const std::int64_t k = problem.codes.count;
    std::vector<std::int64_t> counts(k, -1);
    std::vector<float> sums(k * problem.dim, NAN);
    Pieces pieces;
    nearest::enqueue_stats(problem, pieces, counts.data(), sums.data(), launcher);
    const std::int64_t size = nearest::workspace_size(problem.queries.count, k, problem.dim, 0, true);
    if (pieces.size() > size) throw std::runtime_error("the stats take more memory than they say");
    write(results, counts);
    write(results, std::vector<double>(sums.begin(), sums.end()));
    formula::Stats by_formula = formula::stats(problem);
    write(results, by_formula.counts);
    write(results, by_formula.sums);
}

template <class T>
void run_case(std::istream& in, std::ostream& results, const std::int64_t (&header)[HEADER]) {
    const auto [batches, rows, k, d, dtype, sm_count, z_batch, z_row, z_column, code_row, code_column, stats] = header;
    static_cast<void>(dtype);
    const std::int64_t n = batches * rows;
    const Elements<T> z(in, {batches, rows, d}, {z_batch, z_row, z_column});
    const Elements<T> codebook(in, {k, d}, {code_row, code_column});
    if (!in) throw std::runtime_error("the file of cases ends too early");
    std::vector<nearest::Key> out(n, 0x5a5a5a5a5a5a5a5aull);  // this can be no index
    nearest::Problem<T> problem{};
    problem.queries = nearest::make_queries(z.data(), batches, rows, z_batch, z_row, z_column);
    problem.codes = nearest::make_codes(codebook.data(), k, code_row, code_column);
    problem.dim = static_cast<int>(d);
    problem.out = out.data();
    Launcher launcher;
    {
        Pieces pieces;
        nearest::enqueue(problem, pieces, static_cast<int>(sm_count), launcher);
        if (pieces.size() != (n == 0 ? 0 : nearest::workspace_size(n, k, d, static_cast<int>(sm_count), false))) {
            throw std::runtime_error("the search takes a different amount of memory than it says");
        }
    }
    write(results, std::vector<std::int64_t>{static_cast<int>(nearest::choose_method(n, k, d)), launcher.ranges});
    write(results, out);
    std::vector<std::int64_t> by_formula(n);
    for (std::int64_t i = 0; i < n; ++i) by_formula[i] = formula::nearest(problem, i);
    write(results, by_formula);
    if (stats) run_stats(problem, launcher, results);
}

int main(int argc, char** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: nearest_codebook CASES RESULTS [FILE:LINE | bounds]\n");
        return 2;
    }
    const std::string without = argc > 3 ? argv[3] : "";
    bounds_to_skip = without == "bounds";
    cuda_on_host::barrier_to_skip = without.c_str();
    std::ifstream in(argv[1], std::ios::binary);
    std::ofstream results(argv[2], std::ios::binary);
    std::int64_t header[HEADER];
    while (in.read(reinterpret_cast<char*>(header), sizeof header)) {
        if (header[4] == 0) run_case<float>(in, results, header);
        if (header[4] == 1) run_case<__half>(in, results, header);
        if (header[4] == 2) run_case<__nv_bfloat16>(in, results, header);
    }
    results.close();
    return results ? 0 : 1;
}
