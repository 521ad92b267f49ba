// group_norm_silu: chooses the loops for the dtype and the layout.
#include "group_norm_silu_channels_last.h"
#include "group_norm_silu_contiguous.h"

namespace ldm::LDM_ISA {
namespace {

template <class T>
bool run(const GroupNormSilu& a) {
    const bool stream = streamed<T>(a, a.y, 2);
    return channels_innermost(a) ? channels_last::forward<T>(a, stream) : contiguous::forward<T>(a, stream);
}

}  // namespace

bool group_norm_silu(const GroupNormSilu& a) {
    switch (a.dtype) {
        case Dtype::bf16:
            return run<bf16>(a);
        case Dtype::f16:
            return run<f16>(a);
        default:
            return run<float>(a);
    }
}

void exp_array(const float* x, float* y, int64_t n) {
    each_vector(n, [&](int64_t i, auto lanes) { store(y + i, exp(load(x + i, lanes)), lanes); });
}

}  // namespace ldm::LDM_ISA
