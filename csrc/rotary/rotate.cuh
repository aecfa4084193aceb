// Rotation on the device, where the pair of an element is at hand, or in another lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "core/fp8_vector.cuh"

namespace eightfold {

// Each product and the sum are rounded on their own, as on the CPU and in the reference. Of a pair (a, b) the first becomes
// rotated(a, -b), the second rotated(b, a); backwards rotated(a, b) and rotated(b, -a).
__device__ __forceinline__ float rotated(float mine, float other, float cos, float sin) {
  return __fadd_rn(__fmul_rn(mine, cos), __fmul_rn(other, sin));
}

// A head in 16 lanes, an octet each: `half` lanes hold the first of each pair, the next `half` the second. All 32 lanes take part.
template <bool kBack = false>
__device__ __forceinline__ Octet<__nv_bfloat16> rotate_octet(const Octet<__nv_bfloat16>& x, const Octet<float>& cos,
                                                             const Octet<float>& sin, int half) {
  constexpr int kLanes = 16;
  const int lane = threadIdx.x % kLanes;
  const bool first = lane < half;
  const uint32_t flip = first != kBack ? 0x80008000u : 0;
  Octet<__nv_bfloat16> other, turned;
#pragma unroll
  for (int w = 0; w < 4; ++w) other.words[w] = __shfl_sync(~0u, x.words[w], first ? lane + half : lane - half, kLanes) ^ flip;
  float v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = rotated(x.value(j), other.value(j), cos.value(j), sin.value(j));
  turned.set(v);
  return turned;
}

}  // namespace eightfold
