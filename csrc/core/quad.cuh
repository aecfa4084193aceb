// The four lanes that share rows of a warpgroup's accumulators (core/wgmma.cuh), and bf16 pairs.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace eightfold {

// Lane q of each four holds words w[0..3], w[j] being chunk q of block j; after it w[i] is chunk i of block q.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], uint32_t lane) {
  const bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, odd ? w[i] : w[i + 1], 1);
    w[i] = odd ? got : w[i];
    w[i + 1] = odd ? w[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, high ? w[i] : w[i + 2], 2);
    w[i] = high ? got : w[i];
    w[i + 2] = high ? w[i + 2] : got;
  }
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}

__device__ __forceinline__ float largest_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ __forceinline__ float sum_of_quad(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return __fadd_rn(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

}  // namespace eightfold
