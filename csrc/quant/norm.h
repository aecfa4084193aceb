// RMS normalisation, alone or with the casts that the next GEMM and the backward pass need.
//
//   s    = x + residual, rounded to x's dtype          (s = x without a residual)
//   rstd = 1 / sqrt(mean(s^2) + eps)                   fp32, one per row
//   y    = s * rstd * weight, rounded to x's dtype     y and its codes are written from registers
//
// Every cast reads the rounded value, so a fused op has the bytes of its parts. A row's result depends on that row alone: the sum of
// squares runs in an order fixed by the number of columns.
//
// Bytes per element in bf16: inference reads 2 and writes 1 (codes) or 2 (y). Training writes 3 (row and column codes of y, row codes of
// s), a floor of 5. Column groups span 128 rows, so 128 rows' statistics must be known before the first column code: the row kernel reads
// s once, keeps the row in registers and writes all that is row-wise (2 + 2); the column kernel makes y again from s and rstd in tiles of
// 128 x 128 (2 + 1). That is 7; a row kernel that runs from the last row to the first leaves in L2 what the column kernel reads first.
//
// Backward, with xhat = s * rstd and g = dy * weight:
//   dx = rstd * (g - xhat * mean(g * xhat)) + residual_grad, rounded once        dweight = sum over rows of dy * xhat
// dweight is a sum of sums: one for each kBackwardRows rows, in row order, then folded in block order, whatever the machine.
// Bytes per element: 2 (dy) + 1 (codes of s; 2 for bf16 s) + 2 (dx) [+ 2 residual_grad] + 2 * 4 / kBackwardRows (partials of dweight).
#pragma once

#include "core/dtype.h"
#include "quant/cast.h"

namespace eightfold::quant {

constexpr int64_t kBackwardRows = 16;

// x, residual, sum and y are [rows, cols] contiguous in `dtype` (bf16 or f32); weight [cols] in `weight_dtype`.
struct RmsNorm {
  const void* x;
  const void* residual;  // null: none
  const void* weight;
  DType dtype, weight_dtype;
  int64_t rows, cols;
  float eps;
  void* sum;         // written when residual is given
  void* y;           // null: not wanted
  Quantized y_rows;  // of y
  Quantized y_cols;  // of y; needs rstd
  Quantized x_rows;  // of s
  float* rstd;       // [rows], null: not wanted
};

// dy, residual_grad and dx are [rows, cols] contiguous in `dtype`; s comes as x in `dtype` or, when x is null, as codes.
struct RmsNormBackward {
  const void* dy;
  const void* x;
  RowCodes x_codes;
  const float* rstd;
  const void* weight;
  const void* residual_grad;  // null: none
  DType dtype, weight_dtype;
  int64_t rows, cols;
  void* dx;
  float* dweight;   // [cols]
  float* partials;  // workspace [ceil(rows / kBackwardRows), cols]
};

void rms_norm_cpu(const RmsNorm& op);
void rms_norm_backward_cpu(const RmsNormBackward& op);

// Any number of rows; up to kMaxNormCols columns, which a block of 512 threads keeps in registers.
constexpr int64_t kMaxNormCols = 16384;
void rms_norm_sm90(const RmsNorm& op, void* stream);
void rms_norm_backward_sm90(const RmsNormBackward& op, void* stream);

}  // namespace eightfold::quant
