// ldm_fast._native: the CPU kernels as Python sees them. No tensors here: addresses, shapes and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cpuid.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "from_python.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
    using Release = py::call_guard<py::gil_scoped_release>;
    m.attr("version") = LDM_FAST_VERSION;
    m.def("machine_isas", &ldm::machine_isas);
    m.def("isas", &ldm::isas);
    m.def("isa", &ldm::isa);
    m.def("set_isa", &ldm::set_isa);
    m.def("set_openmp", &ldm::set_openmp);
    m.def("group_norm_silu", &ldm::group_norm_silu, Release());
    m.def("group_norm_stats", &ldm::group_norm_stats, Release());
    m.def("group_norm_apply", &ldm::group_norm_apply, Release());
    m.def("group_norm_silu_backward", &ldm::group_norm_silu_backward, Release());
    m.def("attention", &ldm::attention, Release());
    m.def("attention_backward", &ldm::attention_backward, Release());
    m.def("nearest_codebook", &ldm::nearest_codebook, Release());
    m.def("exp_array", &ldm::exp_array, Release());
    m.def("fused_multiply_adds", &ldm::fused_multiply_adds, Release());
}
