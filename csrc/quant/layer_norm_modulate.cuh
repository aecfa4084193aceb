// What the forward and the backward kernels of layer_norm_modulate.h share.
#pragma once

#include "quant/layer_norm_modulate.h"
#include "quant/row_cast.cuh"

namespace eightfold::quant {

// Eight elements of a sample's vector.
template <bool kVector>
__device__ __forceinline__ void load_vector(const SampleVectors& v, DType dtype, int64_t sample, int64_t col, float (&out)[8]) {
  load_weights<kVector>(v.data, dtype == DType::bf16, sample * v.ld + col, 8, out);
}

template <bool kVector>
__device__ __forceinline__ void load_one_plus(const SampleVectors& v, DType dtype, int64_t sample, int64_t col, float (&out)[8]) {
  load_vector<kVector>(v, dtype, sample, col, out);
#pragma unroll
  for (int j = 0; j < 8; ++j) out[j] = __fadd_rn(1.0f, out[j]);
}

// (x - mean) * rstd * one_scale + shift, rounded
template <class T>
__device__ __forceinline__ Octet<T> modulate_octet(const Octet<T>& x, float mean, float rstd, const float (&one_scale)[8],
                                                   const float (&shift)[8]) {
  float v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = __fadd_rn(__fmul_rn(__fmul_rn(__fsub_rn(x.value(j), mean), rstd), one_scale[j]), shift[j]);
  Octet<T> y;
  y.set(v);
  return y;
}

// Rows of every sample's vector start at multiples of 16 bytes.
inline bool vectors_aligned(const SampleVectors& v, DType dtype) { return aligned16(v.data) && v.ld % (dtype == DType::bf16 ? 8 : 4) == 0; }

}  // namespace eightfold::quant
