// The norm's backward pass of a row of at most one group of columns, an octet in each of 16 lanes.
#pragma once

#include <cuda_bf16.h>

#include "quant/row_sum.cuh"

namespace eightfold::quant {

constexpr int kShortLanes = kTile / 8;

__device__ __forceinline__ void decode_octet(uint2 codes, float scale, float (&out)[8]) {
  decode4(codes.x, out), decode4(codes.y, out + 4);
#pragma unroll
  for (int j = 0; j < 8; ++j) out[j] = __fmul_rn(out[j], scale);
}

// dx of a row from dy and x, which becomes xhat; adds dy * xhat to dweight, if the row exists. All 32 lanes take part.
__device__ __forceinline__ Octet<__nv_bfloat16> short_row_gradient(const Octet<__nv_bfloat16>& dy, float (&x)[8], float rstd,
                                                                   const float (&weight)[8], float (&dweight)[8], int cols, bool exists) {
  float dot = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    x[j] = __fmul_rn(x[j], rstd);
    if (exists) dweight[j] = fmaf(dy.value(j), x[j], dweight[j]);
    dot = fmaf(__fmul_rn(dy.value(j), weight[j]), x[j], dot);
  }
#pragma unroll
  for (int mask = kShortLanes / 2; mask > 0; mask /= 2) add_across(dot, mask);
  const float mean = __fdiv_rn(dot, static_cast<float>(cols));
  float v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = __fmul_rn(rstd, fmaf(-x[j], mean, __fmul_rn(dy.value(j), weight[j])));
  Octet<__nv_bfloat16> dx;
  dx.set(v);
  return dx;
}

}  // namespace eightfold::quant
