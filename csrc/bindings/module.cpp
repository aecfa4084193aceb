// `_C`: what is not a tensor op. The op library itself is loaded by eightfold.ops through torch and does not depend on Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Helpers of eightfold that are not tensor ops: the FP8 codec on numpy arrays, build information, kernel plans.";
  m.def("e4m3_encode", &encode, py::arg("values"), "float32 array -> uint8 E4M3 codes: nearest even, saturating at +-448, NaN -> 0x7F.");
  m.def("e4m3_decode", &decode, py::arg("codes"), "uint8 E4M3 codes -> float32 array (exact).");
}
