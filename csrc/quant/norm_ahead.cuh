// What a norm of few rows reads that the kernels ahead of it do not make.
#pragma once

#include "core/tma_stream.cuh"
#include "quant/norm.h"

namespace eightfold::quant {

__device__ __forceinline__ void prefetch_bytes(const void* from, int64_t bytes) {
  for (int64_t at = 128 * threadIdx.x; at < bytes; at += 128 * blockDim.x) prefetch_l2(static_cast<const char*>(from) + at);
}

// For a block's rows from `first` on: the weight, read once a step of decoding, and the residual, since which a whole layer's keys and
// values may have gone through the L2 cache.
template <class T>
__device__ __forceinline__ void ask_ahead(const RmsNorm& op, int64_t first, int64_t rows) {
  prefetch_bytes(op.weight, op.cols * (op.weight_dtype == DType::bf16 ? 2 : 4));
  if (!op.residual) return;
  prefetch_bytes(static_cast<const T*>(op.residual) + first * op.cols, min(rows, op.rows - first) * op.cols * sizeof(T));
}

}  // namespace eightfold::quant
