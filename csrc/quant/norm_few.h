// The norm of few rows on Hopper (norm_few_sm90.cu), for which the kernels of many rows take too long over each.
#pragma once

#include <cuda_runtime.h>

#include "quant/norm.h"

namespace eightfold::quant {

constexpr int64_t kFewNormRows = 128, kFewNormCols = 8192;

// Of rows that begin at multiples of 16 bytes; without what training wants.
inline bool is_of_few_rows(const RmsNorm& op) {
  const bool inference = !op.rstd && !op.x_rows.codes && !op.y_cols.codes;
  return inference && op.dtype == DType::bf16 && op.rows <= kFewNormRows && op.cols <= kFewNormCols && op.cols % 8 == 0;
}

void norm_few_rows_sm90(const RmsNorm& op, cudaStream_t stream);

}  // namespace eightfold::quant
