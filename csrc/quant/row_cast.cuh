// Row casts where a half-warp holds one group (1, 128), an octet a lane: for kernels that walk rows instead of tiles.
#pragma once

#include "core/fp8_vector.cuh"
#include "quant/cast.h"
#include "quant/tile_cast.cuh"

namespace eightfold::quant {

// Casts one octet of `row` at column `col`; `count` elements of it exist (none beyond the tensor; `vector`: none or all). All 32 lanes
// take part.
template <class T>
__device__ __forceinline__ void cast_row_octet(const Octet<T>& x, const Quantized& out, int64_t row, int64_t col, int64_t cols, int count,
                                               bool vector) {
  uint32_t maximum = octet_maximum(x);
#pragma unroll
  for (int mask = 8; mask > 0; mask /= 2) fold_maxima<T>(maximum, mask);
  const float scale = group_scale(__uint_as_float(Octet<T>::widest_bits(maximum)), false);
  if (count <= 0) return;
  const GroupDivider<T> by = GroupDivider<T>::of(scale);
  if (col % kTile == 0) out.scales[row + col / kTile * out.scale_ld] = scale;
  store_codes8(out.codes + row * cols + col, encode_octet(x, by), vector ? 8 : count, vector);
}

// The same for four octets of a row, 256 columns apart, the first at `col`; of columns from `cols` on nothing is written. Four lanes
// share the scale of a group.
template <class T>
__device__ __forceinline__ void cast_row_octets(const Octet<T>* x, const Quantized& out, int64_t row, int col, int cols, bool vector) {
  const int lane = threadIdx.x & 31;
  uint32_t maxima[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) maxima[k] = octet_maximum(x[k]);
  split_maxima<T, 8, 2>(maxima, lane);
  split_maxima<T, 4, 1>(maxima, lane);
  fold_maxima<T>(maxima[0], 2);
  fold_maxima<T>(maxima[0], 1);
  const float scale = group_scale(__uint_as_float(Octet<T>::widest_bits(maxima[0])), false);
  const GroupDivider<T> own = GroupDivider<T>::of(scale);
  const int own_col = (col & ~(kTile - 1)) + lane / 4 % 4 * 256;
  if (lane % 4 == 0 && own_col < cols) out.scales[row + own_col / kTile * out.scale_ld] = scale;
  uint8_t* codes = out.codes + row * cols + col;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int owner = (lane & 16) | (k * 4);
    const GroupDivider<T> by = {__shfl_sync(kWholeWarp, own.inverse, owner), __shfl_sync(kWholeWarp, own.aid, owner)};
    const uint2 eight = encode_octet(unpacked_anew(x[k]), by);
    if (col + k * 256 < cols) store_codes8(codes + k * 256, eight, vector ? 8 : cols - col - k * 256, vector);
  }
}

// Eight weights as fp32, zeros beyond `count`; bf16 or fp32 in memory.
template <bool kVector>
__device__ __forceinline__ void load_weights(const void* weight, bool bf16, int64_t col, int count, float (&out)[8]) {
  if (bf16) {
    Octet<__nv_bfloat16> w = load_octet<kVector>(static_cast<const __nv_bfloat16*>(weight) + col, count);
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = w.value(j);
  } else {
    Octet<float> w = load_octet<kVector>(static_cast<const float*>(weight) + col, count);
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = w.value(j);
  }
}

}  // namespace eightfold::quant
