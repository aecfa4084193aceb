// The training norm (norm_training_sm90.cu); see norm.h.
#pragma once

#include <cuda_runtime_api.h>

#include "quant/norm.h"

namespace eightfold::quant {

// op.y_cols, y_rows, x_rows and rstd are wanted, y is not. `vector`: every row of every tensor starts at a multiple of 16 bytes.
void launch_norm_training(const RmsNorm& op, bool vector, cudaStream_t stream);

}  // namespace eightfold::quant
