// The module ldm_fast._native_cuda. Arguments and errors: cuda/nearest_codebook.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/nearest_codebook.h"

namespace py = pybind11;

PYBIND11_MODULE(_native_cuda, m) {
    py::class_<ldm_fast::BuildInfo>(m, "BuildInfo")
        .def_readonly("runtime_version", &ldm_fast::BuildInfo::runtime_version)
        .def_readonly("driver_version", &ldm_fast::BuildInfo::driver_version)
        .def_readonly("architectures", &ldm_fast::BuildInfo::architectures);
    m.def("build_info", &ldm_fast::build_info);
    m.def("nearest_codebook", &ldm_fast::nearest_codebook, py::call_guard<py::gil_scoped_release>(), py::arg("z"),
          py::arg("z_row_stride"), py::arg("z_column_stride"), py::arg("codebook"), py::arg("codebook_row_stride"),
          py::arg("codebook_column_stride"), py::arg("out"), py::arg("half_norms"), py::arg("n"), py::arg("k"),
          py::arg("d"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
}
