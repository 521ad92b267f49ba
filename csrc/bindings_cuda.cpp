// The module ldm_fast._native_cuda. Arguments and errors: cuda/nearest_codebook.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/nearest_codebook.h"

namespace py = pybind11;

PYBIND11_MODULE(_native_cuda, m) {
    m.attr("version") = LDM_FAST_VERSION;
    py::class_<ldm_fast::BuildInfo>(m, "BuildInfo")
        .def_readonly("runtime_version", &ldm_fast::BuildInfo::runtime_version)
        .def_readonly("driver_version", &ldm_fast::BuildInfo::driver_version)
        .def_readonly("architectures", &ldm_fast::BuildInfo::architectures);
    m.def("build_info", &ldm_fast::build_info);
    m.def("nearest_codebook_workspace", &ldm_fast::nearest_codebook_workspace, py::arg("n"), py::arg("k"), py::arg("d"),
          py::arg("stats"), py::arg("device"));
    m.def("nearest_codebook", &ldm_fast::nearest_codebook, py::call_guard<py::gil_scoped_release>(), py::arg("z"),
          py::arg("z_shape"), py::arg("z_strides"), py::arg("codebook"), py::arg("k"), py::arg("codebook_strides"),
          py::arg("out"), py::arg("counts"), py::arg("sums"), py::arg("workspace"), py::arg("dtype"), py::arg("device"),
          py::arg("stream"));
}
