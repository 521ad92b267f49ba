#include "dispatch.h"

#include <algorithm>
#include <new>
#include <stdexcept>

#include "cpuid.h"

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

void group_norm_silu(const Norm& norm, Address y, Address statistics) {
    float* const mean = pointer<float>(statistics);
    check(chosen()->group_norm_silu(
        {norm, Phases::whole, pointer<void>(y), mean, mean + norm.batch * norm.groups, nullptr}));
}

void group_norm_stats(const Norm& norm, Address moments) {
    check(chosen()->group_norm_silu({norm, Phases::measure, nullptr, nullptr, nullptr, pointer<Moments>(moments)}));
}

void group_norm_apply(const Norm& norm, Address moments, Address y) {
    check(chosen()->group_norm_silu(
        {norm, Phases::apply, pointer<void>(y), nullptr, nullptr, pointer<Moments>(moments)}));
}

void group_norm_silu_backward(const Norm& norm, Address grad, Address statistics, Address dx, Address dweight,
                              Address dbias, Address dscale, Address dshift) {
    const float* const mean = pointer<const float>(statistics);
    check(chosen()->group_norm_silu_backward({norm, pointer<const void>(grad), mean, mean + norm.batch * norm.groups,
                                              pointer<void>(dx), pointer<float>(dweight), pointer<float>(dbias),
                                              pointer<float>(dscale), pointer<float>(dshift)}));
}

void attention(const Attention& arguments) { check(chosen()->attention(arguments)); }

void attention_backward(const AttentionBackward& arguments) { check(chosen()->attention_backward(arguments)); }

void nearest_codebook(const NearestCodebook& arguments) { check(chosen()->nearest_codebook(arguments)); }

void exp_array(Address x, Address y, int64_t n) { chosen()->exp_array(pointer<const float>(x), pointer<float>(y), n); }

int64_t fused_multiply_adds(int64_t rounds, float factor, Address result, int threads) {
    return chosen()->fused_multiply_adds(rounds, factor, pointer<float>(result), threads);
}

}  // namespace ldm
