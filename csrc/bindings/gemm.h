// The operands of a product: their checks, and what a kernel has to know of them.
#pragma once

#include "bindings/common.h"
#include "gemm/fp8_gemm.h"
#include "gemm/gemm.h"

namespace eightfold::bindings {

// What an op calls them.
struct OperandNames {
  const char *a = "a", *a_scales = "a_scales", *b = "b", *b_scales = "b_scales";
};

// Everything but bias and out.
Fp8GemmArgs fp8_gemm_operands(const Tensor& a, const Tensor& a_scales, const Tensor& b, const Tensor& b_scales, int64_t b_group_rows,
                              const char* op, const OperandNames& names = {});

// Everything but out.
GemmArgs gemm_operands(const Tensor& a, const Tensor& b, const char* op, const OperandNames& names = {});

}  // namespace eightfold::bindings
