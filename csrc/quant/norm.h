// RMS normalisation, alone or with the casts that the next GEMM and the backward pass need.
//
//   s    = x + residual, rounded to x's dtype          (s = x without a residual)
//   rstd = 1 / sqrt(mean(s^2) + eps)                   fp32, one per row
//   y    = s * rstd * weight, rounded to x's dtype     y and its codes are written from registers
//
// Every cast reads the rounded value, so a fused op has the bytes of its parts. A row's result depends on that row alone: the sum of
// squares runs in an order fixed by the number of columns (row_sum.cuh).
//
// Bytes per element in bf16: inference reads 2 and writes 1 (codes) or 2 (y); with a residual 4 + 3. Training writes 3 (row and column
// codes of y, row codes of s): 5, with a residual 9. Column groups span 128 rows, so 128 rows' statistics must be known before the first
// column code (norm_training_sm90.cu).
//
// Backward, with xhat = s * rstd and g = dy * weight:
//   dx = rstd * (g - xhat * mean(g * xhat)) + residual_grad, rounded once        dweight = sum over rows of dy * xhat
// dweight is a sum of sums: one for each of backward_runs() runs of rows, in row order, then folded in the order of the runs, whatever
// the machine. Bytes per element: 2 (dy) + 1 (codes of s; 2 for bf16 s) + 2 (dx) [+ 2 residual_grad] + 8 * runs / rows.
#pragma once

#include "core/dtype.h"
#include "quant/cast.h"

namespace eightfold::quant {

// Runs of consecutive rows, run r from rows * r / runs on: one for each SM of an H100, more where rows are short, none below 4 rows.
constexpr int64_t kBackwardRuns = 132;
inline int64_t backward_runs(int64_t rows, int64_t cols) {
  const int64_t sharing = cols <= 128 ? 32 : cols <= 512 ? 8 : cols <= 1024 ? 4 : cols <= 2048 ? 2 : 1;
  const int64_t fewest = (rows + 3) / 4;
  return fewest < kBackwardRuns * sharing ? fewest : kBackwardRuns * sharing;
}

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
  Quantized y_cols;  // of y; wanted together with y_rows, x_rows and rstd, and without y
  Quantized x_rows;  // of s
  float* rstd;       // [rows], null: not wanted
  float* workspace;  // with y_cols on a GPU: training_workspace(rows, cols) floats
};

// Counts of the bands of 128 rows, then a sum for each row and 128 columns.
inline int64_t training_counts(int64_t rows) { return ((rows + 127) / 128 + 31) / 32 * 32; }
inline int64_t training_workspace(int64_t rows, int64_t cols) {
  return training_counts(rows) + (rows + 127) / 128 * 128 * ((cols + 127) / 128);
}

// dy, residual_grad and dx are [rows, cols] contiguous in `dtype`; s comes as x in `dtype` or, when x is null, as codes. On the CPU dx may
// be dy.
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
  float* partials;  // workspace [backward_runs(rows, cols), cols]
};

// Column codes of y again, from the row codes of s: y is made of the decoded s, so that it is rounded to E4M3 twice. Bytes per
// element: 1 read, 1 written.
struct RmsNormColumns {
  RowCodes x;  // of s
  const float* rstd;
  const void* weight;
  DType dtype, weight_dtype;  // dtype: to which y is rounded
  Quantized y_cols;
};

void rms_norm_cpu(const RmsNorm& op);
float rms_norm_row(const float* x, const float* weight, int64_t cols, float eps, float* y);  // on the CPU; y may be x; returns rstd
void rms_norm_columns_cpu(const RmsNormColumns& op);
void rms_norm_columns_sm90(const RmsNormColumns& op, void* stream);
void rms_norm_backward_cpu(const RmsNormBackward& op);

// Any number of rows; up to kMaxNormCols columns, of which a block's registers hold a row of x and of the residual in fp32.
constexpr int64_t kMaxNormCols = 16384;
void rms_norm_sm90(const RmsNorm& op, void* stream);
void rms_norm_backward_sm90(const RmsNormBackward& op, void* stream);
void fold_dweight_sm90(const float* partials, int64_t rows, int64_t cols, float* dweight, void* stream);

}  // namespace eightfold::quant
