// Row casts where a half-warp holds one group (1, 128), an octet a lane: for kernels that walk rows instead of tiles.
#pragma once

#include "core/fp8_vector.cuh"
#include "quant/cast.h"
#include "quant/tile_cast.cuh"

namespace eightfold::quant {

// Casts one octet of `row` at column `col`; `count` elements of it exist (none beyond the tensor). All 32 lanes take part.
template <class T>
__device__ __forceinline__ void cast_row_octet(const Octet<T>& x, const Quantized& out, int64_t row, int64_t col, int64_t cols, int count,
                                               bool vector) {
  uint32_t amax = octet_amax(x);
#pragma unroll
  for (int mask = 8; mask > 0; mask /= 2) amax = max(amax, __shfl_xor_sync(kWholeWarp, amax, mask));
  GroupDivider by = GroupDivider::of(group_scale(__uint_as_float(amax), false));
  if (count <= 0) return;
  if (col % kTile == 0) out.scales[row + col / kTile * out.scale_ld] = by.scale;
  store_codes8(out.codes + row * cols + col, encode_octet(x, by), count, vector);
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

inline TileOutput tile_output(const Quantized& rows, const Quantized& cols) {
  return {rows.codes, rows.scales, rows.scale_ld, cols.codes, cols.code_ld, cols.scales, cols.scale_ld};
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace eightfold::quant
