// `_C`: what is not a tensor op. The kernels and op registrations are in libeightfold.so, which knows no Python: this module
// finds its C functions by name, so another Python needs only this file compiled.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "core/exports.h"
#include "core/fp8.h"

namespace py = pybind11;

namespace {

py::array_t<uint8_t> encode(py::array_t<float, py::array::c_style | py::array::forcecast> values) {
  py::array_t<uint8_t> codes(std::vector<py::ssize_t>(values.shape(), values.shape() + values.ndim()));
  for (py::ssize_t i = 0; i < values.size(); ++i) codes.mutable_data()[i] = eightfold::float_to_e4m3(values.data()[i]);
  return codes;
}

py::array_t<float> decode(py::array_t<uint8_t, py::array::c_style | py::array::forcecast> codes) {
  py::array_t<float> values(std::vector<py::ssize_t>(codes.shape(), codes.shape() + codes.ndim()));
  for (py::ssize_t i = 0; i < codes.size(); ++i) values.mutable_data()[i] = eightfold::e4m3_to_float(codes.data()[i]);
  return values;
}

template <class Function>
Function library_function(const char* name) {
  Dl_info here;
  dladdr(reinterpret_cast<void*>(&encode), &here);
  std::string path(here.dli_fname);
  path = path.substr(0, path.rfind('/') + 1) + "libeightfold.so";
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, name) : nullptr;
  if (!symbol)
    throw py::import_error(std::string(name) + " not found: " + path + " is not loaded (import eightfold first) or is of another version");
  return reinterpret_cast<Function>(symbol);
}

py::object from_json(const char* text) { return py::module_::import("json").attr("loads")(text); }

py::object build_info() {
  static const auto info = library_function<decltype(&eightfold_build_info)>("eightfold_build_info");
  return from_json(info());
}

py::object gemm_plan(int64_t m, int64_t n, int64_t k, int64_t b_group_rows, int64_t sm_count) {
  static const auto plan = library_function<decltype(&eightfold_gemm_plan)>("eightfold_gemm_plan");
  for (auto [name, value] : {std::pair("m", m), std::pair("n", n), std::pair("k", k), std::pair("sm_count", sm_count)}) {
    if (value <= 0 || value > INT32_MAX) {
      throw py::value_error("gemm_plan: " + std::string(name) + " must be from 1 to " + std::to_string(INT32_MAX) + ", got " +
                            std::to_string(value));
    }
  }
  if (b_group_rows != 1 && b_group_rows != 128) {
    throw py::value_error("gemm_plan: b_group_rows must be 1 or 128, got " + std::to_string(b_group_rows));
  }
  return from_json(plan(m, n, k, static_cast<int>(b_group_rows), static_cast<int>(sm_count)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Helpers of eightfold that are not tensor ops: the FP8 codec on numpy arrays, build information, kernel plans.";
  m.def("e4m3_encode", &encode, py::arg("values"), "float32 array -> uint8 E4M3 codes: nearest even, saturating at +-448, NaN -> 0x7F.");
  m.def("e4m3_decode", &decode, py::arg("codes"), "uint8 E4M3 codes -> float32 array (exact).");
  m.def("build_info", &build_info, "What libeightfold.so was built with and the instruction set its CPU matrix kernel uses, as a dict.");
  m.def("gemm_plan", &gemm_plan, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("b_group_rows") = 128, py::arg("sm_count") = 132,
        "How the Hopper kernel splits a product of these sizes, as a dict: tile_m, tile_n, stages, tiles_m, tiles_n, grid, waves.");
}
