// The kernels behind fp8_gemm_sm90, each for the plans that name it.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm/fp8_gemm.h"
#include "gemm/fp8_gemm_plan.h"

namespace eightfold {

void fp8_gemm_pairs_sm90(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream);
void fp8_gemm_tiles_sm90(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream);
void fp8_gemm_small_sm90(const Fp8GemmArgs& args, int device, cudaStream_t stream);

}  // namespace eightfold
