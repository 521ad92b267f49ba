// group_norm_silu_backward: chooses the loops for the dtype and the layout.
#include "group_norm_silu_channels_last.h"
#include "group_norm_silu_contiguous.h"

namespace ldm::LDM_ISA {
namespace {

template <class T>
bool run(const GroupNormSiluBackward& a) {
    const bool stream = streamed<T>(a, a.dx, 3);
    return channels_innermost(a) ? channels_last::backward<T>(a, stream) : contiguous::backward<T>(a, stream);
}

}  // namespace

bool group_norm_silu_backward(const GroupNormSiluBackward& a) {
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
