// Sums along a row in an order that its length alone decides, so that every kernel finds the same bits, whether it walks rows or tiles:
// eight values a lane in turn, 16 lanes as a tree (a group of 128 columns), two groups (a slice), four slices as a tree (a quad), even
// and odd quads in turn, both together. What a row lacks at its end counts as zeros.
#pragma once

#include "quant/tile_cast.cuh"

namespace eightfold::quant {

constexpr int kSliceCols = 256;
constexpr int kQuadCols = 4 * kSliceCols;
constexpr uint32_t kQuadGroups = kQuadCols / kTile;

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

// The quad whose slices' parts these are, in every lane.
__device__ __forceinline__ float fold_quad(float (&parts)[4], int lane) {
  split_sums<8, 2>(parts, lane);
  split_sums<4, 1>(parts, lane);
  float sum = parts[0];
  add_across(sum, 2);
  add_across(sum, 1);
  add_across(sum, 16);
  add_across(sum, 8);
  add_across(sum, 4);
  return sum;
}

// The same from its eight groups.
__device__ __forceinline__ float sum_of_quad(const float (&groups)[kQuadGroups]) {
  float slices[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) slices[k] = __fadd_rn(groups[2 * k], groups[2 * k + 1]);
  return __fadd_rn(__fadd_rn(slices[0], slices[2]), __fadd_rn(slices[1], slices[3]));
}

// Groups of eight rows, each the parts of 16 lanes: lanes 2p and 2p + 1 end with row p.
__device__ __forceinline__ float fold_group_rows(float (&parts)[8], int lane) {
  split_sums<8, 4>(parts, lane);
  split_sums<4, 2>(parts, lane);
  split_sums<2, 1>(parts, lane);
  add_across(parts[0], 1);
  return parts[0];
}

template <class T>
__device__ __forceinline__ float sum_of_squares(const Octet<T>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum = fmaf(x.value(j), x.value(j), sum);
  return sum;
}

// The sum of squares of a row of one group of columns or less, an octet in each of 16 lanes: the rest of a quad would add zeros.
__device__ __forceinline__ float squares_of_group(const Octet<__nv_bfloat16>& x) {
  float sum = sum_of_squares(x);
#pragma unroll
  for (int step = 8; step > 0; step /= 2) add_across(sum, step);
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
