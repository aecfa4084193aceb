// The norm of rows of at most one group of columns on Hopper (norm_short_sm90.cu), for which the kernels of longer rows are wide.
#pragma once

#include <cuda_runtime.h>

#include "quant/norm.h"

namespace eightfold::quant {

// Of rows that begin at multiples of 16 bytes, without a residual or its gradient; of the norm all but y_cols can be asked.
template <class Op>
bool is_short(const Op& op) {
  return op.dtype == DType::bf16 && op.cols <= 128 && op.cols % 8 == 0;
}

void norm_short_rows_sm90(const RmsNorm& op, cudaStream_t stream);
void norm_short_backward_sm90(const RmsNormBackward& op, cudaStream_t stream);  // dx and partials

}  // namespace eightfold::quant
