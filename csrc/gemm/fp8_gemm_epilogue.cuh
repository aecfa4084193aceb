// From a warpgroup's accumulators (core/wgmma.cuh says who holds what) to the output in device memory.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/memory.cuh"
#include "core/quad.cuh"
#include "core/wgmma.cuh"
#include "gemm/fp8_gemm.h"

namespace eightfold {

struct GemmOutput {
  void* out;
  const void* bias;  // null: none
  int64_t ld;        // elements
  int32_t m, n;
  DType type, bias_type;
  bool accumulate;
  bool wide;  // addresses and n allow whole vectors of 16 bytes
};

inline GemmOutput gemm_output(const Fp8GemmArgs& args) {
  const int64_t vector = args.out_type == DType::bf16 ? 8 : 4;
  GemmOutput o{};
  o.out = args.out;
  o.bias = args.bias;
  o.ld = args.ldo;
  o.m = static_cast<int32_t>(args.m);
  o.n = static_cast<int32_t>(args.n);
  o.type = args.out_type;
  o.bias_type = args.bias_type;
  o.accumulate = args.accumulate;
  o.wide = args.n % vector == 0 && args.ldo % vector == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  return o;
}

// What is known of an output when its kernel is compiled: the results then pass through less code, which leaves the instruction cache
// to the loop.
enum class OutputKind {
  any,
  bf16_vectors,
  f32_sums,   // accumulates in whole vectors; then there is no bias
  bf16_sums,  // likewise
};

inline OutputKind output_kind(const GemmOutput& o) {
  if (o.wide && o.type == DType::bf16) return o.accumulate ? OutputKind::bf16_sums : OutputKind::bf16_vectors;
  return o.wide && o.accumulate ? OutputKind::f32_sums : OutputKind::any;
}

// Of a column; past the end of the last one, for results that are not stored.
__device__ __forceinline__ float bias_at(const GemmOutput& o, int32_t column) {
  const int32_t at = min(column, o.n - 1);
  return o.bias_type == DType::f32 ? static_cast<const float*>(o.bias)[at]
                                   : __bfloat162float(static_cast<const __nv_bfloat16*>(o.bias)[at]);
}

template <int kCount>
__device__ __forceinline__ void add_tile_bias(const GemmOutput& o, float (&acc)[kCount], int32_t column, uint32_t lane) {
  if (o.bias == nullptr) return;
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float value = bias_at(o, column + 8 * i + 2 * static_cast<int32_t>(lane % 4) + c);
      acc[4 * i + c] += value;
      acc[4 * i + 2 + c] += value;
    }
  }
}

// Adds what a bf16 output holds already to the results of store_tile's rows, so that one rounding is of both.
template <int kCount>
__device__ __forceinline__ void add_tile_bf16(const GemmOutput& o, float (&acc)[kCount], int64_t row, int64_t column, uint32_t lane) {
  const __nv_bfloat16* out = static_cast<const __nv_bfloat16*>(o.out);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + 8 * half;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t at = column + 8 * i + 2 * (lane % 4) + c;
        if (r < o.m && at < o.n) acc[4 * i + 2 * half + c] += __bfloat162float(out[r * o.ld + at]);
      }
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
  add_tile_bias(o, acc, column, lane);
  if (o.type == DType::bf16) {
    store_bf16(o, acc, row, column, lane);
  } else {
    store_f32(o, acc, row, column, lane);
  }
}

// 16 bytes of a row.
template <OutputKind kKind, class T>
__device__ __forceinline__ void store_vector(const GemmOutput& o, T* at, const uint4& values) {
  if (kKind == OutputKind::f32_sums || (kKind == OutputKind::any && sizeof(T) == 4 && o.wide && o.accumulate)) {
    add_global(reinterpret_cast<float*>(at), values);
  } else if (kKind == OutputKind::bf16_vectors || o.wide) {
    __stcs(reinterpret_cast<uint4*>(at), values);  // first to leave the L2 cache, which the operands want
  } else {
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int j = 0; j < 16 / static_cast<int>(sizeof(T)); ++j) {
      if constexpr (sizeof(T) == 4) {
        const float value = __uint_as_float(words[j]);
        at[j] = o.accumulate ? at[j] + value : value;
      } else {
        at[j] = static_cast<T>(words[j / 2] >> (16 * (j % 2)));
      }
    }
  }
}

// Eight rows of a lane's eight columns, as floats, through 1 KB of the warp's own shared memory, so that each row leaves in whole
// vectors; row r of them is row first + r * stride of the output. Accumulators go one word at a time: a vector would tie them to an even
// and an odd register, where the products of the same index lie, and each step of promotion would read one register bank twice. Lanes of
// four begin with different words of their chunks, so that no two meet in a bank.
template <OutputKind kKind>
__device__ __forceinline__ void store_floats(const GemmOutput& o, const float* octet, uint32_t staging, int32_t first, int32_t stride,
                                             int32_t column, uint32_t lane) {
  const uint32_t r = lane / 4, q = lane % 4;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float v[4] = {octet[8 * c], octet[8 * c + 1], octet[8 * c + 4], octet[8 * c + 5]};
    const uint32_t chunk = staging + r * 128 + ((2 * q + c) ^ r) * 16;
    float turned[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) turned[k] = q & 1 ? v[(k + 1) % 4] : v[k];
#pragma unroll
    for (int k = 0; k < 4; ++k) store_shared(chunk + (k + q) % 4 * 4, q & 2 ? turned[(k + 2) % 4] : turned[k]);
  }
  __syncwarp();
  const uint32_t chunk = lane % 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t from = lane / 8 + 4 * i;
    const uint4 values = load_shared(staging + from * 128 + (chunk ^ from) * 16);
    const int32_t row = first + static_cast<int32_t>(from) * stride;
    if (row >= o.m || column >= o.n) continue;
    store_vector<kKind>(o, static_cast<float*>(o.out) + row * o.ld + column + 4 * static_cast<int32_t>(chunk), values);
  }
  __syncwarp();
}

// Writes a warp's 16 rows of a tile whose operands were arranged (fp8_gemm_maps.h), so that registers 16 * i + 4 * h + 2 * half + e of a
// lane are the eight columns 32 * i + 8 * (lane % 4) + 2 * h + e of row kStride * (lane / 4) + half. `row` is the warp's first row,
// `column` the tile's first; o.n is a multiple of 32.
template <OutputKind kKind, int kStride, int kCount>
__device__ __forceinline__ void store_octets(const GemmOutput& o, float (&acc)[kCount], uint32_t staging, int32_t row, int32_t column,
                                             uint32_t lane) {
  const int32_t own = column + 8 * static_cast<int32_t>(lane % 4);
  if (kKind != OutputKind::f32_sums && o.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount / 16; ++i) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float bias = bias_at(o, own + 32 * i + k);
        float* upper = acc + 16 * i + 4 * (k / 2) + k % 2;
        upper[0] += bias, upper[2] += bias;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t own_row = row + kStride * static_cast<int32_t>(lane / 4) + half;
    uint16_t* at = static_cast<uint16_t*>(o.out) + own_row * o.ld + own;
#pragma unroll
    for (int i = 0; i < kCount / 16; ++i) {
      const float* octet = acc + 16 * i + 2 * half;
      if (kKind == OutputKind::bf16_vectors || (kKind == OutputKind::any && o.type == DType::bf16)) {
        if (own_row < o.m && own + 32 * i < o.n)
          store_vector<kKind>(o, at + 32 * i,
                              make_uint4(pack_bf16(octet[0], octet[1]), pack_bf16(octet[4], octet[5]), pack_bf16(octet[8], octet[9]),
                                         pack_bf16(octet[12], octet[13])));
      } else {
        store_floats<kKind>(o, octet, staging, row + half, kStride, column + 32 * i, lane);
      }
    }
  }
}

// store_octets where results are added to bf16, rounded once. What is there already comes by way of the warp's own kBytes of shared memory,
// so that all of that much is under way at once: registers are short beside the products of the tensor cores. (For the same reason no lane
// leaves early: accumulators that cross such a branch spill.)
template <int kStride, int kBytes, int kCount>
__device__ __forceinline__ void add_octets(const GemmOutput& o, const float (&acc)[kCount], uint32_t staging, int32_t row, int32_t column,
                                           uint32_t lane) {
  constexpr int kOctets = kCount / 16, kSlot = 32 * 16, kSlots = kBytes / kSlot;
  const int32_t own_row = row + kStride * static_cast<int32_t>(lane / 4), own = column + 8 * static_cast<int32_t>(lane % 4);
  uint16_t* first = static_cast<uint16_t*>(o.out) + own_row * o.ld + own;
  const uint32_t slot = staging + lane * 16;
  // Octet i of the lane's: the upper row's, then the lower's.
  const auto there = [&](int i) { return own_row + i / kOctets < o.m && own + i % kOctets * 32 < o.n; };
  const auto at = [&](int i) { return first + i / kOctets * o.ld + i % kOctets * 32; };
  const auto fetch = [&](int i) {
    if (there(i)) copy_async<16>(slot + i % kSlots * kSlot, at(i));
  };
#pragma unroll
  for (int i = 0; i < kSlots; ++i) fetch(i);
#pragma unroll
  for (int i = 0; i < 2 * kOctets; ++i) {
    if (i % kSlots == 0) wait_for_copies();
    if (there(i)) {
      const uint4 old = load_shared(slot + i % kSlots * kSlot);
      const float* octet = acc + i % kOctets * 16 + i / kOctets * 2;
      const auto sum = [&](uint32_t word, const float* x) {
        return pack_bf16(__uint_as_float(word << 16) + x[0], __uint_as_float(word & 0xFFFF0000u) + x[1]);
      };
      __stcs(reinterpret_cast<uint4*>(at(i)),
             make_uint4(sum(old.x, octet), sum(old.y, octet + 4), sum(old.z, octet + 8), sum(old.w, octet + 12)));
    }
    if (i + kSlots < 2 * kOctets) fetch(i + kSlots);
  }
}

}  // namespace eightfold
