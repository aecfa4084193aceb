// Tensors and raw views of casts, for the bindings of the ops that write codes.
#pragma once

#include "bindings/common.h"
#include "quant/cast.h"

namespace eightfold::bindings {

using quant::Quantized;
using quant::RowCodes;

constexpr int64_t kGroup = 128;

struct RowCast {
  Tensor codes, scales;
  Quantized view;
};

struct ColCast {
  Tensor codes, scales;
  Quantized view;
};

// An argument that an op was not asked for comes back with size 0.
inline Tensor nothing(int64_t dims, ScalarType type, const Tensor& like) {
  return dims == 1 ? empty({0}, type, like) : empty({0, 0}, type, like);
}

inline RowCast empty_row_cast(int64_t rows, int64_t cols, const Tensor& like, bool wanted = true) {
  if (!wanted) return {nothing(2, ScalarType::Float8_e4m3fn, like), nothing(2, ScalarType::Float, like), {}};
  Tensor codes = empty({rows, cols}, ScalarType::Float8_e4m3fn, like), scales = empty_row_scales(rows, cols, kGroup, like);
  Quantized view{static_cast<uint8_t*>(codes.data_ptr()), static_cast<float*>(scales.data_ptr()), cols, scales.stride(1)};
  return {std::move(codes), std::move(scales), view};
}

inline ColCast empty_col_cast(int64_t rows, int64_t cols, const Tensor& like, bool wanted = true) {
  if (!wanted) return {nothing(2, ScalarType::Float8_e4m3fn, like), nothing(2, ScalarType::Float, like), {}};
  Tensor codes = empty_col_codes(rows, cols, like), scales = empty_col_scales(rows, cols, like);
  Quantized view{static_cast<uint8_t*>(codes.data_ptr()), static_cast<float*>(scales.data_ptr()), codes.stride(1), scales.stride(0)};
  return {std::move(codes), std::move(scales), view};
}

// Codes [rows, cols] in groups (1, 128), row-major, with the scale layout that row casts write.
inline RowCodes row_codes_in(const Tensor& codes, const Tensor& scales, int64_t rows, int64_t cols, const Tensor& like, const char* op,
                             const char* codes_name, const char* scales_name) {
  check_same_device(codes, like, op, codes_name);
  check_same_device(scales, like, op, scales_name);
  check_dtype(codes, {ScalarType::Float8_e4m3fn}, op, codes_name);
  check_dtype(scales, {ScalarType::Float}, op, scales_name);
  check_shape(codes, {rows, cols}, op, codes_name);
  check_shape(scales, {rows, ceil_div(cols, kGroup)}, op, scales_name);
  check_contiguous(codes, op, codes_name);
  EF_CHECK(scales.stride(0) == 1 || rows <= 1, op, ": ", scales_name,
           " must have stride 1 along the rows, as quantize writes it, got shape ", shape_of(scales), " with strides ", strides_of(scales));
  return {static_cast<const uint8_t*>(codes.data_ptr()), static_cast<const float*>(scales.data_ptr()), rows, cols, cols, scales.stride(1)};
}

}  // namespace eightfold::bindings
