// Sums along a row in an order that its length alone decides, so that every kernel that walks rows, alone, with others, or spread
// over a cluster, finds the same bits: eight values a lane in turn, 32 lanes as a tree (a slice of 256 columns), four slices as a tree
// (a quad), quads in turn. What a row lacks at its end counts as zeros.
#pragma once

#include "quant/tile_cast.cuh"

namespace eightfold::quant {

constexpr int kSliceCols = 256;
constexpr int kQuadCols = 4 * kSliceCols;

// Lanes that differ in bit kMask split the 2 * kKeep sums that both have a share of.
template <int kMask, int kKeep, int kCount>
__device__ __forceinline__ void split_sums(float (&v)[kCount], int lane) {
  const bool upper = lane & kMask;
#pragma unroll
  for (int i = 0; i < kKeep; ++i) {
    const float mine = upper ? v[i + kKeep] : v[i], theirs = upper ? v[i] : v[i + kKeep];
    v[i] = __fadd_rn(mine, __shfl_xor_sync(kWholeWarp, theirs, kMask));
  }
}

__device__ __forceinline__ void add_across(float& v, int mask) { v = __fadd_rn(v, __shfl_xor_sync(kWholeWarp, v, mask)); }

// Adds each v[i] up over the warp; lane l ends with the sum of v[l * count / 32].
__device__ __forceinline__ float fold_lanes(float (&v)[16], int lane) {
  split_sums<16, 8>(v, lane);
  split_sums<8, 4>(v, lane);
  split_sums<4, 2>(v, lane);
  split_sums<2, 1>(v, lane);
  add_across(v[0], 1);
  return v[0];
}

__device__ __forceinline__ float fold_lanes(float (&v)[8], int lane) {
  split_sums<16, 4>(v, lane);
  split_sums<8, 2>(v, lane);
  split_sums<4, 1>(v, lane);
  add_across(v[0], 2);
  add_across(v[0], 1);
  return v[0];
}

__device__ __forceinline__ float fold_lanes(float (&v)[4], int lane) {
  split_sums<16, 2>(v, lane);
  split_sums<8, 1>(v, lane);
  add_across(v[0], 4);
  add_across(v[0], 2);
  add_across(v[0], 1);
  return v[0];
}

// The quad whose slices' parts these are, in every lane.
__device__ __forceinline__ float fold_quad(float (&parts)[4], int lane) {
  float sum = fold_lanes(parts, lane);
  add_across(sum, 8);
  add_across(sum, 16);
  return sum;
}

template <class T>
__device__ __forceinline__ float sum_of_squares(const Octet<T>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum = fmaf(x.value(j), x.value(j), sum);
  return sum;
}

__device__ __forceinline__ float rstd_of(float squares, int64_t cols, float eps) {
  const float mean = __fdiv_rn(squares, static_cast<float>(cols > 0 ? cols : 1));
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
}

// x + residual, rounded
template <class T>
__device__ __forceinline__ Octet<T> add_octets(const Octet<T>& x, const Octet<T>& residual) {
  float v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = __fadd_rn(x.value(j), residual.value(j));
  Octet<T> sum;
  sum.set(v);
  return sum;
}

// s * rstd * weight, rounded
template <class T>
__device__ __forceinline__ Octet<T> normalise_octet(const Octet<T>& s, float rstd, const float (&weight)[8]) {
  float v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = __fmul_rn(__fmul_rn(s.value(j), rstd), weight[j]);
  Octet<T> y;
  y.set(v);
  return y;
}

}  // namespace eightfold::quant
