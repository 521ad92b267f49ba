// group_norm_silu, forward and backward: chooses the loops for the layout, the dtype and the activation.
#include "group_norm_silu_channels_last.h"
#include "group_norm_silu_contiguous.h"
#include "huge_pages.h"

namespace ldm::LDM_ISA {
namespace {

// With one pixel both layouts are the same memory, and vectors should run over channels.
template <class Args>
bool channels_innermost(const Args& a) {
    return a.channels_last || a.spatial == 1;
}

template <class T, bool silu, bool streamed>
bool run(const GroupNormSilu& a) {
    return channels_innermost(a) ? channels_last::forward<T, silu, streamed>(a)
                                 : contiguous::forward<T, silu, streamed>(a);
}

template <class T, bool silu, bool streamed>
bool run(const GroupNormSiluBackward& a) {
    return channels_innermost(a) ? channels_last::backward<T, silu, streamed>(a)
                                 : contiguous::backward<T, silu, streamed>(a);
}

// `out`: what is written, null where that is not so much; `arrays`: how many of its size are read and written.
template <class T, bool silu, class Args>
bool run(const Args& a, void* out, int arrays) {
    const int64_t bytes = out ? a.batch * a.channels * a.spatial * static_cast<int64_t>(sizeof(T)) : 0;
    prefer_huge_pages(out, bytes);
    const int64_t row = channels_innermost(a) ? a.channels : a.spatial;
    const bool streamed = arrays * bytes >= CACHED_BYTES && streamable(static_cast<const T*>(out), row);
    return streamed ? run<T, silu, true>(a) : run<T, silu, false>(a);
}

template <class T, class Args>
bool run(const Args& a, void* out, int arrays) {
    return a.silu ? run<T, true>(a, out, arrays) : run<T, false>(a, out, arrays);
}

template <class Args>
bool run(const Args& a, void* out, int arrays) {
    switch (a.dtype) {
        case Dtype::bf16:
            return run<bf16>(a, out, arrays);
        case Dtype::f16:
            return run<f16>(a, out, arrays);
        default:
            return run<float>(a, out, arrays);
    }
}

}  // namespace

bool group_norm_silu(const GroupNormSilu& a) { return run(a, a.y, 2); }

bool group_norm_silu_backward(const GroupNormSiluBackward& a) { return run(a, a.dx, 3); }

void exp_array(const float* x, float* y, int64_t n) {
    each_vector(n, [&](int64_t i, auto lanes) { store(y + i, exp(load(x + i, lanes)), lanes); });
}

}  // namespace ldm::LDM_ISA
