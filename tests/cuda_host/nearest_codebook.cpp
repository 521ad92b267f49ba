// Runs the CUDA source of nearest_codebook on the CPU for the cases in a file, and the documented formula beside it.
//
// usage: nearest_codebook CASES RESULTS [FILE:LINE]      leaves out the barrier in that line
// CASES: per case nine int64 (n, k, d, dtype 0 float32 / 1 float16 / 2 bfloat16, SMs of the GPU to plan for, then row
// and column stride of z and of the codebook, in elements), then the bytes of z and of the codebook as they lie in
// memory. RESULTS: per case the number of ranges that the codes were divided into, then n indices from the kernels and
// n from the formula, all int64.
#include "cuda_on_host.h"
// The shim first: it stands in for the CUDA headers.
#include "../../csrc/cuda/nearest_codebook.cuh"

#include <fstream>
#include <stdexcept>
#include <string>

namespace nearest = ldm_fast::nearest;

struct Launcher {
    std::int64_t ranges = 0;

    template <class Problem>
    void operator()(void (*kernel)(Problem), nearest::Grid grid, const Problem& problem) {
        ranges = grid.y > ranges ? grid.y : ranges;
        cuda_on_host::run_grid(grid.x, grid.y, nearest::THREADS, [&] { kernel(problem); });
    }
};

// The formula of the header's first lines, as plainly as it can be written.
template <class T>
std::int64_t nearest_by_formula(const nearest::Problem<T>& problem, std::int64_t n) {
    std::int64_t winner = 0;
    float best = NAN;
    for (std::int64_t k = 0; k < problem.codes.count; ++k) {
        float norm = 0.0f;
        for (int i = 0; i < problem.dim; ++i) {
            const float e = nearest::to_float(*problem.codes.at(k, i));
            norm = std::fmaf(e, e, norm);
        }
        float distance = 0.5f * norm;
        for (int i = 0; i < problem.dim; ++i) {
            distance = std::fmaf(-nearest::to_float(*problem.queries.at(n, i)),
                                 nearest::to_float(*problem.codes.at(k, i)), distance);
        }
        if (std::isnan(distance) || (!std::isnan(best) && distance >= best)) continue;
        best = distance;
        winner = k;
    }
    return winner;
}

// A buffer of exactly the bytes that the strides reach, so that AddressSanitizer sees one element too many; aligned as
// on a GPU.
template <class T>
class Matrix {
  public:
    Matrix(std::istream& in, std::int64_t rows, std::int64_t columns, std::int64_t row_stride,
           std::int64_t column_stride) {
        const std::int64_t count = rows == 0 ? 0 : (rows - 1) * row_stride + (columns - 1) * column_stride + 1;
        if (posix_memalign(&memory_, 256, count * sizeof(T) + (count == 0)) != 0) throw std::bad_alloc();
        in.read(static_cast<char*>(memory_), static_cast<std::streamsize>(count * sizeof(T)));
        rows_ = {static_cast<const T*>(memory_), rows, row_stride, column_stride, false};
    }
    ~Matrix() { std::free(memory_); }
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;
    const nearest::Rows<T>& rows() const { return rows_; }

  private:
    void* memory_ = nullptr;
    nearest::Rows<T> rows_{};
};

template <class T>
void run_case(std::istream& in, std::ostream& results, const std::int64_t (&header)[9]) {
    const auto [n, k, d, dtype, sm_count, z_row, z_column, code_row, code_column] = header;
    static_cast<void>(dtype);
    const Matrix<T> queries(in, n, d, z_row, z_column);
    const Matrix<T> codes(in, k, d, code_row, code_column);
    if (!in) throw std::runtime_error("the file of cases ends too early");
    // Exact sizes here too, and filled with what no index can be.
    std::vector<float> half_norms(d > nearest::MAX_CHUNK_DIM ? k : 0, NAN);
    std::vector<nearest::Key> out(n, 0x5a5a5a5a5a5a5a5aull);
    nearest::Problem<T> problem{};
    problem.queries = queries.rows();
    problem.codes = codes.rows();
    problem.dim = static_cast<int>(d);
    problem.half_norms = half_norms.data();
    problem.out = out.data();
    Launcher launcher;
    nearest::enqueue(problem, static_cast<int>(sm_count), launcher);
    const auto write = [&](std::int64_t index) { results.write(reinterpret_cast<const char*>(&index), sizeof index); };
    write(launcher.ranges);
    for (const nearest::Key index : out) write(static_cast<std::int64_t>(index));
    for (std::int64_t i = 0; i < n; ++i) write(nearest_by_formula(problem, i));
}

int main(int argc, char** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: nearest_codebook CASES RESULTS [FILE:LINE]\n");
        return 2;
    }
    if (argc > 3) cuda_on_host::barrier_to_skip = argv[3];
    std::ifstream in(argv[1], std::ios::binary);
    std::ofstream results(argv[2], std::ios::binary);
    std::int64_t header[9];
    while (in.read(reinterpret_cast<char*>(header), sizeof header)) {
        if (header[3] == 0) run_case<float>(in, results, header);
        if (header[3] == 1) run_case<__half>(in, results, header);
        if (header[3] == 2) run_case<__nv_bfloat16>(in, results, header);
    }
    results.close();
    return results ? 0 : 1;
}
