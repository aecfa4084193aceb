// From a warpgroup's accumulators (core/wgmma.cuh says who holds what) to the output in device memory.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/memory.cuh"
#include "core/wgmma.cuh"
#include "gemm/fp8_gemm.h"

namespace eightfold {

struct GemmOutput {
  void* out;
  const void* bias;  // null: none
  int64_t ld;        // elements
  int32_t m, n;
  DType type, bias_type;
  bool accumulate;  // f32 only
  bool wide;        // addresses and n allow whole vectors of 16 bytes
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
  f32_sums,  // accumulates in whole vectors; then there is no bias
};

inline OutputKind output_kind(const GemmOutput& o) {
  if (o.wide && o.type == DType::bf16) return OutputKind::bf16_vectors;
  return o.wide && o.accumulate ? OutputKind::f32_sums : OutputKind::any;
}

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

// Columns past the end get none; they are not stored.
template <int kCount>
__device__ __forceinline__ void add_tile_bias(const GemmOutput& o, float (&acc)[kCount], int32_t column, uint32_t lane) {
  if (o.bias == nullptr) return;
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int32_t at = column + 8 * i + 2 * static_cast<int32_t>(lane % 4) + c;
      if (at >= o.n) continue;
      const float value = o.bias_type == DType::f32 ? static_cast<const float*>(o.bias)[at]
                                                    : __bfloat162float(static_cast<const __nv_bfloat16*>(o.bias)[at]);
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
  add_tile_bias(o, acc, column, lane);
  if (o.type == DType::bf16) {
    store_bf16(o, acc, row, column, lane);
  } else {
    store_f32(o, acc, row, column, lane);
  }
}

// 16 bytes of a row, of which `left` elements lie before the output's end.
template <OutputKind kKind, class T>
__device__ __forceinline__ void store_vector(const GemmOutput& o, T* at, const uint4& values, int32_t left) {
  if (kKind == OutputKind::f32_sums || (kKind == OutputKind::any && sizeof(T) == 4 && o.wide && o.accumulate)) {
    add_global(reinterpret_cast<float*>(at), values);
  } else if (kKind == OutputKind::bf16_vectors || o.wide) {
    __stcs(reinterpret_cast<uint4*>(at), values);  // first to leave the L2 cache, which the operands want
  } else {
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int j = 0; j < 16 / static_cast<int>(sizeof(T)); ++j) {
      if (j >= left) continue;
      if constexpr (sizeof(T) == 4) {
        const float value = __uint_as_float(words[j]);
        at[j] = o.accumulate ? at[j] + value : value;
      } else {
        at[j] = static_cast<T>(words[j / 2] >> (16 * (j % 2)));
      }
    }
  }
}

// 16 rows of the tile from `row` on, by one warp: its wgmma registers through kBytes of its own shared memory, as many columns at a
// time as fit, so that each row leaves in whole vectors. Nobody waits for it but the warp's own lanes.
template <OutputKind kKind, int kBytes, int kCount>
__device__ __forceinline__ void store_rows(const GemmOutput& o, float (&acc)[kCount], uint32_t staging, int32_t row, int32_t column,
                                           uint32_t lane) {
  constexpr uint32_t kRowBytes = kBytes / 16, kChunks = kRowBytes / 16;  // chunks of 16 bytes, at most 8 a row
  // Chunk c of row r lies where neither writing columns nor reading rows meets in a bank.
  auto chunk_at = [&](uint32_t r, uint32_t c)
                      __attribute__((always_inline)) { return staging + r * kRowBytes + ((c ^ (r / (8 / kChunks)) % kChunks) * 16); };
  auto write_out = [&](int32_t first, auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    constexpr int kLoads = kChunks / 2, kRows = 32 / kChunks;  // of a lane; rows that the warp reads at once
    const int32_t r = static_cast<int32_t>(lane / kChunks), c = static_cast<int32_t>(lane % kChunks);
    const int32_t left = o.n - (column + first + c * 16 / static_cast<int>(sizeof(T)));
    T* at = static_cast<T*>(o.out) + static_cast<int64_t>(row + r) * o.ld + (o.n - left);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLoads; i += 2) {
      const uint4 upper = load_shared(chunk_at(r + i * kRows, c)), lower = load_shared(chunk_at(r + (i + 1) * kRows, c));
      if (row + r + i * kRows < o.m && left > 0) store_vector<kKind>(o, at + i * kRows * o.ld, upper, left);
      if (row + r + (i + 1) * kRows < o.m && left > 0) store_vector<kKind>(o, at + (i + 1) * kRows * o.ld, lower, left);
    }
    __syncwarp();
  };

  if constexpr (kKind != OutputKind::f32_sums) add_tile_bias(o, acc, column, lane);
  if (kKind == OutputKind::bf16_vectors || (kKind == OutputKind::any && o.type == DType::bf16)) {
    constexpr int kColumns = kRowBytes / 2;
#pragma unroll
    for (int first = 0; first < 2 * kCount; first += kColumns) {
#pragma unroll
      for (int j = 0; j < kColumns / 8; j += 2) {
        const float* pair = acc + first / 2 + 4 * j;
        store_matrices(chunk_at(lane % 16, j + lane / 16), pack_bf16(pair[0], pair[1]), pack_bf16(pair[2], pair[3]),
                       pack_bf16(pair[4], pair[5]), pack_bf16(pair[6], pair[7]));
      }
      write_out(first, uint16_t{});
    }
  } else {
    // Word by word, odd rows the other word first to meet in no bank. A store of two words would have the compiler put them into an
    // even and an odd register, where the product of the same index is: each step of promotion would read one register bank twice.
    constexpr int kColumns = kRowBytes / 4;
    const bool odd = lane / 4 / (8 / kChunks) % 2;
#pragma unroll
    for (int first = 0; first < 2 * kCount; first += kColumns) {
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const float* block = acc + first / 2 + 4 * j;
        const uint32_t upper = chunk_at(lane / 4, 2 * j + lane % 4 / 2) + lane % 2 * 8;
        const uint32_t lower = chunk_at(lane / 4 + 8, 2 * j + lane % 4 / 2) + lane % 2 * 8;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const uint32_t word = (odd ? 1 - c : c) * 4;
          store_shared(upper + word, odd ? block[1 - c] : block[c]);
          store_shared(lower + word, odd ? block[3 - c] : block[2 + c]);
        }
      }
      write_out(first, float{});
    }
  }
}

}  // namespace eightfold
