// From a warpgroup's accumulators (core/wgmma.cuh says who holds what) to the output in device memory.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/dtype.h"

namespace eightfold {

struct GemmOutput {
  void* out;
  const void* bias;  // null: none
  int64_t ld;        // elements
  int32_t m, n;
  DType type, bias_type;
  bool accumulate;  // f32 only
  bool wide;        // addresses and n allow whole vectors: 8 bf16, 2 floats
};

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

// Columns past the end read the last one's bias; they are not stored.
template <class T, int kCount>
__device__ __forceinline__ void add_bias(const T* bias, float (&acc)[kCount], int32_t n, int64_t column, uint32_t lane) {
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float value = static_cast<float>(bias[min(column + 8 * i + 2 * (lane % 4) + c, static_cast<int64_t>(n - 1))]);
      acc[4 * i + c] += value;
      acc[4 * i + 2 + c] += value;
    }
  }
}

// Four lanes hold 32 columns of a row as words of two; traded among them, each writes 16 bytes and the row 64 in a piece.
template <int kCount>
__device__ __forceinline__ void store_bf16(const GemmOutput& o, float (&acc)[kCount], int64_t row, int64_t column, uint32_t lane) {
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(o.out);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + 8 * half;
#pragma unroll
    for (int i = 0; i < kCount / 16; ++i) {
      const float* block = acc + 16 * i + 2 * half;
      if (o.wide) {
        uint32_t w[4] = {pack_bf16(block[0], block[1]), pack_bf16(block[4], block[5]), pack_bf16(block[8], block[9]),
                         pack_bf16(block[12], block[13])};
        transpose_quad(w, lane);
        const int64_t at = column + 32 * i + 8 * (lane % 4);
        if (r < o.m && at < o.n) *reinterpret_cast<uint4*>(out + r * o.ld + at) = make_uint4(w[0], w[1], w[2], w[3]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t at = column + 32 * i + 8 * j + 2 * (lane % 4);
          if (r < o.m && at < o.n) out[r * o.ld + at] = __float2bfloat16_rn(block[4 * j]);
          if (r < o.m && at + 1 < o.n) out[r * o.ld + at + 1] = __float2bfloat16_rn(block[4 * j + 1]);
        }
      }
    }
  }
}

template <int kCount>
__device__ __forceinline__ void store_f32(const GemmOutput& o, float (&acc)[kCount], int64_t row, int64_t column, uint32_t lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + 8 * half;
    if (r >= o.m) continue;
    float* out = static_cast<float*>(o.out) + r * o.ld;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const int64_t at = column + 8 * i + 2 * (lane % 4);
      const float x = acc[4 * i + 2 * half], y = acc[4 * i + 2 * half + 1];
      if (o.wide) {
        if (at >= o.n) continue;
        float2* pair = reinterpret_cast<float2*>(out + at);
        const float2 old = o.accumulate ? *pair : make_float2(0.0f, 0.0f);
        *pair = o.accumulate ? make_float2(old.x + x, old.y + y) : make_float2(x, y);
      } else {
        if (at < o.n) out[at] = o.accumulate ? out[at] + x : x;
        if (at + 1 < o.n) out[at + 1] = o.accumulate ? out[at + 1] + y : y;
      }
    }
  }
}

// Writes 64 rows of the tile; `row` is the lane's upper row, `column` the tile's first. All lanes of a warp call it.
template <int kCount>
__device__ __forceinline__ void store_tile(const GemmOutput& o, float (&acc)[kCount], int64_t row, int64_t column, uint32_t lane) {
  if (o.bias != nullptr) {
    if (o.bias_type == DType::f32) {
      add_bias(static_cast<const float*>(o.bias), acc, o.n, column, lane);
    } else {
      add_bias(static_cast<const __nv_bfloat16*>(o.bias), acc, o.n, column, lane);
    }
  }
  if (o.type == DType::bf16) {
    store_bf16(o, acc, row, column, lane);
  } else {
    store_f32(o, acc, row, column, lane);
  }
}

}  // namespace eightfold
