#include "dispatch.h"

#include <algorithm>
#include <new>
#include <stdexcept>

#include "cpuid.h"
#include "kernels.h"

namespace ldm {
namespace {

struct Kernels {
    const char* isa;
    bool (*group_norm_silu)(const GroupNormSilu&);
    bool (*group_norm_silu_backward)(const GroupNormSiluBackward&);
    bool (*attention)(const Attention&);
    bool (*attention_backward)(const AttentionBackward&);
    bool (*nearest_codebook)(const NearestCodebook&);
    void (*exp_array)(const float*, float*, int64_t);
    int64_t (*fused_multiply_adds)(int64_t, float, float*, int);
};

#define LDM_KERNELS(name)                                                                                        \
    Kernels {                                                                                                    \
        #name, name::group_norm_silu, name::group_norm_silu_backward, name::attention, name::attention_backward, \
            name::nearest_codebook, name::exp_array, name::fused_multiply_adds                                   \
    }

// Compiled in, widest last.
constexpr Kernels COMPILED[] = {
    LDM_KERNELS(portable),
#ifdef LDM_HAVE_AVX2
    LDM_KERNELS(avx2),
#endif
#ifdef LDM_HAVE_AVX512
    LDM_KERNELS(avx512),
#endif
#ifdef LDM_HAVE_AVX512BF16
    LDM_KERNELS(avx512bf16),
#endif
};

std::vector<Kernels> supported() {
    const std::vector<std::string> of_machine = machine_isas();
    std::vector<Kernels> found;
    for (const Kernels& kernels : COMPILED)
        if (std::find(of_machine.begin(), of_machine.end(), kernels.isa) != of_machine.end()) found.push_back(kernels);
    return found;
}

const std::vector<Kernels>& all() {
    static const std::vector<Kernels> found = supported();
    return found;
}

const Kernels*& chosen() {
    static const Kernels* kernels = &all().back();
    return kernels;
}

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void check(bool had_memory) {
    if (!had_memory) throw std::bad_alloc();
}

template <size_t n>
void copy(const std::array<int64_t, n>& from, int64_t (&to)[n]) {
    std::copy(from.begin(), from.end(), to);
}

}  // namespace

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels& kernels : all()) names.emplace_back(kernels.isa);
    return names;
}

std::string isa() { return chosen()->isa; }

void set_isa(const std::string& name) {
    for (const Kernels& kernels : all()) {
        if (name == kernels.isa) {
            chosen() = &kernels;
            return;
        }
    }
    throw std::invalid_argument("set_isa: this CPU or build has no " + name);
}

namespace {

template <class Args>
Args norm_arguments(const NormRecord& record) {
    Args args{};
    int dtype;
    Address x, weight, bias, scale, shift;
    std::tie(dtype, args.channels_last, args.silu, args.batch, args.channels, args.spatial, args.groups, x, weight,
             bias, scale, shift, args.eps, args.threads) = record;
    args.dtype = static_cast<Dtype>(dtype);
    args.x = pointer<const void>(x);
    args.weight = pointer<const float>(weight), args.bias = pointer<const float>(bias);
    args.scale = pointer<const float>(scale), args.shift = pointer<const float>(shift);
    return args;
}

}  // namespace

void group_norm_silu(const NormRecord& norm, Address y, Address statistics) {
    auto args = norm_arguments<GroupNormSilu>(norm);
    args.y = pointer<void>(y);
    args.mean = pointer<float>(statistics), args.rstd = args.mean + args.batch * args.groups;
    check(chosen()->group_norm_silu(args));
}

void group_norm_stats(const NormRecord& norm, Address moments) {
    auto args = norm_arguments<GroupNormSilu>(norm);
    args.phases = Phases::measure;
    args.moments = pointer<Moments>(moments);
    check(chosen()->group_norm_silu(args));
}

void group_norm_apply(const NormRecord& norm, Address moments, Address y) {
    auto args = norm_arguments<GroupNormSilu>(norm);
    args.phases = Phases::apply;
    args.moments = pointer<Moments>(moments);
    args.y = pointer<void>(y);
    check(chosen()->group_norm_silu(args));
}

void group_norm_silu_backward(const NormRecord& norm, Address grad, Address statistics, Address dx, Address dweight,
                              Address dbias, Address dscale, Address dshift) {
    auto args = norm_arguments<GroupNormSiluBackward>(norm);
    args.grad = pointer<const void>(grad);
    args.mean = pointer<const float>(statistics), args.rstd = args.mean + args.batch * args.groups;
    args.dx = pointer<void>(dx);
    args.dweight = pointer<float>(dweight), args.dbias = pointer<float>(dbias);
    args.dscale = pointer<float>(dscale), args.dshift = pointer<float>(dshift);
    check(chosen()->group_norm_silu_backward(args));
}

namespace {

Attention attention_arguments(int dtype, int mask_kind, const std::array<int64_t, 5>& shape, Address q, Address k,
                              Address v, Address mask, Address out, Address lse, const std::array<int64_t, 3>& q_stride,
                              const std::array<int64_t, 3>& k_stride, const std::array<int64_t, 3>& v_stride,
                              const std::array<int64_t, 3>& out_stride, const std::array<int64_t, 4>& mask_stride,
                              float scale, int threads) {
    Attention args{};
    args.dtype = static_cast<Dtype>(dtype);
    args.mask_kind = static_cast<MaskKind>(mask_kind);
    args.batch = shape[0], args.heads = shape[1], args.rows = shape[2], args.keys = shape[3], args.width = shape[4];
    args.q = pointer<const void>(q), args.k = pointer<const void>(k), args.v = pointer<const void>(v);
    args.mask = pointer<const void>(mask);
    args.out = pointer<void>(out);
    args.lse = pointer<float>(lse);
    copy(q_stride, args.q_stride), copy(k_stride, args.k_stride), copy(v_stride, args.v_stride);
    copy(out_stride, args.out_stride), copy(mask_stride, args.mask_stride);
    args.scale = scale;
    args.threads = threads;
    return args;
}

}  // namespace

void attention(int dtype, int mask_kind, std::array<int64_t, 5> shape, Address q, Address k, Address v, Address mask,
               Address out, Address lse, std::array<int64_t, 3> q_stride, std::array<int64_t, 3> k_stride,
               std::array<int64_t, 3> v_stride, std::array<int64_t, 3> out_stride, std::array<int64_t, 4> mask_stride,
               float scale, int threads) {
    check(chosen()->attention(attention_arguments(dtype, mask_kind, shape, q, k, v, mask, out, lse, q_stride, k_stride,
                                                  v_stride, out_stride, mask_stride, scale, threads)));
}

void attention_backward(int dtype, int mask_kind, std::array<int64_t, 5> shape, Address q, Address k, Address v,
                        Address mask, Address out, Address lse, Address grad, Address dq, Address dk, Address dv,
                        std::array<int64_t, 3> q_stride, std::array<int64_t, 3> k_stride,
                        std::array<int64_t, 3> v_stride, std::array<int64_t, 3> out_stride,
                        std::array<int64_t, 3> grad_stride, std::array<int64_t, 4> mask_stride, float scale,
                        int threads) {
    AttentionBackward args{};
    args.forward = attention_arguments(dtype, mask_kind, shape, q, k, v, mask, out, lse, q_stride, k_stride, v_stride,
                                       out_stride, mask_stride, scale, threads);
    args.grad = pointer<const void>(grad);
    copy(grad_stride, args.grad_stride);
    args.dq = pointer<void>(dq), args.dk = pointer<void>(dk), args.dv = pointer<void>(dv);
    check(chosen()->attention_backward(args));
}

void nearest_codebook(int dtype, int search, std::array<int64_t, 4> shape, Address z, Address codebook,
                      std::array<int64_t, 3> z_stride, std::array<int64_t, 2> codebook_stride, Address index,
                      Address counts, Address sums, int threads) {
    NearestCodebook args{};
    args.dtype = static_cast<Dtype>(dtype);
    args.search = static_cast<CodebookSearch>(search);
    args.batch = shape[0], args.rows = shape[1], args.codes = shape[2], args.width = shape[3];
    args.z = pointer<const void>(z), args.codebook = pointer<const void>(codebook);
    copy(z_stride, args.z_stride), copy(codebook_stride, args.codebook_stride);
    args.index = pointer<int64_t>(index), args.counts = pointer<int64_t>(counts);
    args.sums = pointer<float>(sums);
    args.threads = threads;
    check(chosen()->nearest_codebook(args));
}

void exp_array(Address x, Address y, int64_t n) { chosen()->exp_array(pointer<const float>(x), pointer<float>(y), n); }

int64_t fused_multiply_adds(int64_t rounds, float factor, Address result, int threads) {
    return chosen()->fused_multiply_adds(rounds, factor, pointer<float>(result), threads);
}

}  // namespace ldm
