// A row of a head into its page on the device: 16 lanes, eight elements each. Rows have at most 128 elements, a multiple of 8.
#pragma once

#include "attention/attention.h"
#include "core/fp8_vector.cuh"

namespace eightfold::attention {

constexpr int kRowLanes = 16;

// Where the row of a head goes, counted in rows; -1: nowhere. No more than 2^31 - 1 slots exist.
__device__ __forceinline__ int64_t place_of(const PagedStore& op, int64_t slot, uint32_t head) {
  if (slot < 0 || slot >= op.page_count * op.page_size) return -1;
  const uint32_t at = static_cast<uint32_t>(slot), size = static_cast<uint32_t>(op.page_size), page = at / size;
  return (page * op.kv_heads + head) * op.page_size + (at - page * size);
}

// The scale of a row, of which x is the lane's octet, zeros where there is no dimension. All lanes of a warp take part.
__device__ __forceinline__ float scale_of_row(const Octet<__nv_bfloat16>& x) {
  using T = __nv_bfloat16;
  uint32_t maximum = octet_maximum(x);
#pragma unroll
  for (int step = kRowLanes / 2; step > 0; step /= 2) maximum = Octet<T>::larger(maximum, __shfl_xor_sync(0xFFFFFFFFu, maximum, step));
  return group_scale(__uint_as_float(Octet<T>::widest_bits(maximum)), false);
}

// x: the lane's octet of the row, zeros from op.dim on. All lanes of a warp take part, also for a row that goes nowhere.
template <bool kCodes>
__device__ __forceinline__ void store_row(const PagedStore& op, bool values, int64_t place, const Octet<__nv_bfloat16>& x) {
  using T = __nv_bfloat16;
  const int lane = threadIdx.x % kRowLanes;
  void* pages = values ? op.v_pages : op.k_pages;
  const bool mine = place >= 0 && 8 * lane < op.dim;
  const int64_t at = place * op.dim + 8 * lane;
  if constexpr (kCodes) {
    const float scale = scale_of_row(x);
    if (place >= 0 && lane == 0) (values ? op.v_scales : op.k_scales)[place] = scale;
    if (mine) store_codes8(static_cast<uint8_t*>(pages) + at, encode_octet(x, GroupDivider<T>::of(scale)), 8, true);
  } else if (mine) {
    store_octet_whole(static_cast<T*>(pages) + at, x);
  }
}

// The same octet as pages of codes give it back. All lanes of a warp take part.
__device__ __forceinline__ Octet<__nv_bfloat16> through_codes(const Octet<__nv_bfloat16>& x) {
  const float scale = scale_of_row(x);
  const uint2 codes = encode_octet(x, GroupDivider<__nv_bfloat16>::of(scale));
  return widened({{codes.x, codes.y, __float_as_uint(scale)}});
}

}  // namespace eightfold::attention
