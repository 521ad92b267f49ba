// group_norm_silu, forward and backward: chooses the loops for the layout, the dtype and the activation.
#include "group_norm_silu_channels_last.h"
#include "group_norm_silu_contiguous.h"
#include "huge_pages.h"

namespace ldm::LDM_ISA {
namespace {

template <class T, bool silu, bool streamed>
bool forward(const GroupNormSilu& a) {
    // With one pixel both layouts are the same memory, and vectors should run over channels.
    if (a.channels_last || a.spatial == 1) return channels_last::forward<T, silu, streamed>(a);
    return contiguous::forward<T, silu, streamed>(a);
}

template <class T, bool silu>
bool forward(const GroupNormSilu& a) {
    T* const y = static_cast<T*>(a.y);
    const int64_t bytes = y ? a.batch * a.channels * a.spatial * static_cast<int64_t>(sizeof(T)) : 0;
    prefer_huge_pages(y, bytes);
    const bool streamed = bytes >= STREAMED_BYTES && streamable(y, a.channels_last ? a.channels : a.spatial);
    return streamed ? forward<T, silu, true>(a) : forward<T, silu, false>(a);
}

template <class T>
bool forward(const GroupNormSilu& a) {
    return a.silu ? forward<T, true>(a) : forward<T, false>(a);
}

template <class T>
bool backward(const GroupNormSiluBackward& a) {
    prefer_huge_pages(a.dx, a.batch * a.channels * a.spatial * static_cast<int64_t>(sizeof(T)));
    if (a.channels_last || a.spatial == 1)
        return a.silu ? channels_last::backward<T, true>(a) : channels_last::backward<T, false>(a);
    return a.silu ? contiguous::backward<T, true>(a) : contiguous::backward<T, false>(a);
}

}  // namespace

bool group_norm_silu(const GroupNormSilu& a) {
    switch (a.dtype) {
        case Dtype::bf16:
            return forward<bf16>(a);
        case Dtype::f16:
            return forward<f16>(a);
        default:
            return forward<float>(a);
    }
}

bool group_norm_silu_backward(const GroupNormSiluBackward& a) {
    switch (a.dtype) {
        case Dtype::bf16:
            return backward<bf16>(a);
        case Dtype::f16:
            return backward<f16>(a);
        default:
            return backward<float>(a);
    }
}

void exp_array(const float* x, float* y, int64_t n) {
    each_vector(n, [&](int64_t i, auto lanes) { store(y + i, exp(load(x + i, lanes)), lanes); });
}

}  // namespace ldm::LDM_ISA
