// Rows of tokens in registers and states in shared memory, as operands of each other (linear_attention.h says for what).
//
// A lane holds 16 bytes of each block of 32 columns of two tokens, l / 4 and l / 4 + 8 of 16: columns 8 * (l % 4) and the seven that
// follow. Word w of these is the lane's part of the left operand's columns 8 * w to 8 * w + 7 (core/mma.cuh) if column 8 * a + 2 * w + b of
// the block is taken for the operand's 8 * w + 2 * a + b. So that is where states have their rows and columns. A product's columns come out
// in the same order: the lane's results are the same 16 bytes.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/approx.cuh"
#include "core/barrier.cuh"
#include "core/memory.cuh"
#include "core/mma.cuh"
#include "core/quad.cuh"
#include "linear_attention/linear_attention.h"

namespace eightfold::linear {

constexpr int kColumns = 128;  // of a group of heads: a block's share
constexpr int kWide = 32;      // columns of a block of them

template <int kDim>
constexpr int kBlocksOf = kDim / kWide;  // of a head
template <int kDim>
constexpr int kHeadsOf = kColumns / kDim;  // of a group

template <int kBlocks>
using Words = uint32_t[kBlocks][2][4];  // [block][token][word]
using BlockWords = const uint32_t (*)[2][4];

__device__ __forceinline__ float low_float(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// ReLU of a bf16 pair; a NaN stays.
__device__ __forceinline__ uint32_t rectified(uint32_t pair) {
  const __nv_bfloat162 x = __hmax2_nan(*reinterpret_cast<const __nv_bfloat162*>(&pair), __floats2bfloat162_rn(0.0f, 0.0f));
  return *reinterpret_cast<const uint32_t*>(&x);
}
template <int kBlocks>
__device__ __forceinline__ void rectify(Words<kBlocks>& words) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int i = 0; i < 8; ++i) words[b][i / 4][i % 4] = rectified(words[b][i / 4][i % 4]);
}

// A pair of gradients where ReLU's output is not 0.
__device__ __forceinline__ uint32_t pack_where(uint32_t output, float low, float high) {
  return pack_bf16(output & 0x7FFFu ? low : 0.0f, output & 0x7FFF0000u ? high : 0.0f);
}

__device__ __forceinline__ uint4 four(const uint32_t (&words)[4]) { return make_uint4(words[0], words[1], words[2], words[3]); }
__device__ __forceinline__ void set(uint32_t (&words)[4], uint4 v) { words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w; }

// What a lane reads and writes of the heads of a group. Reads pass the first-level cache: they may come before the kernels ahead have
// ended.
template <int kDim>
struct LaneRows {
  __nv_bfloat16* at;  // the lane's first column, of `head` and its first token of 16 from `token` on
  int64_t token_stride, head_stride;

  __device__ __forceinline__ LaneRows(const HeadRows& rows, int64_t sample, int64_t head, int64_t token)
      : token_stride(rows.token_stride), head_stride(rows.head_stride) {
    const int32_t lane = threadIdx.x % 32;
    at = static_cast<__nv_bfloat16*>(rows.data) + sample * rows.batch_stride + head * rows.head_stride +
         (token + lane / 4) * rows.token_stride + lane % 4 * 8;
  }
  __device__ __forceinline__ uint4* place(int32_t token, int block, int half) const {
    return reinterpret_cast<uint4*>(at + (token + 8 * half) * token_stride + block / kBlocksOf<kDim> * head_stride +
                                    block % kBlocksOf<kDim> * kWide);
  }
  // Blocks of 16 tokens from `token` on; zeros where exists(block, half) is false.
  template <int kBlocks, class Exists>
  __device__ __forceinline__ void load(Words<kBlocks>& words, int32_t token, const Exists& exists) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        set(words[b][h], exists(b, h) ? __ldcg(place(token, b, h)) : make_uint4(0, 0, 0, 0));
      }
  }
};

// In shared memory: of each head the upper and the lower bf16 part of its state, a row of 16 bytes more, where the normalizer's element of
// the row stands eight times. Eight rows from a multiple of eight on, 16 bytes of each, lie in different banks.
template <int kDim>
struct States {
  static constexpr int kPitch = 2 * kDim + 16, kPartBytes = kDim * kPitch, kHeadBytes = 2 * kPartBytes;
  static constexpr int kNormalizers = kHeadsOf<kDim> * kHeadBytes;  // also in fp32, [head][dim]
  static constexpr int kBytes = kNormalizers + 4 * kColumns;

  static constexpr __device__ __forceinline__ int32_t place(int32_t column) {  // of a row or column of a state
    return column / kWide * kWide + column % 8 / 2 * 8 + column % kWide / 8 * 2 + column % 2;
  }

  static __device__ __forceinline__ void store_parts(uint32_t at, float a, float b) {
    const uint32_t upper = pack_bf16(a, b);
    store_shared(at, __uint_as_float(upper));
    store_shared(at + kPartBytes, __uint_as_float(pack_bf16(a - low_float(upper), b - high_float(upper))));
  }

  // States of `heads` heads, by a block of kThreads; a __syncthreads() away from their use.
  template <int kThreads>
  static __device__ __forceinline__ void place_all(uint32_t shared, const float* state, const float* normalizer, int32_t heads) {
    constexpr int kRows = 4 * kThreads / kDim, kAtOnce = 8, kTurns = kColumns / kRows / kAtOnce;  // of the block; on their way; so often
    static_assert(kRows * kAtOnce * kTurns == kColumns && kThreads >= kColumns);
    const float z = threadIdx.x < heads * kDim ? __ldcg(normalizer + threadIdx.x) : 0.0f;
    const int32_t first = threadIdx.x / (kDim / 4),
                  rows = heads * kDim - first;  // its rows are kRows apart, and places of sums of bits sums
    const uint32_t to = shared + place(first) * kPitch + 2 * place(threadIdx.x * 4 % kDim);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      float4 v[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int row = (turn * kAtOnce + j) * kRows;
        if (row < rows) v[j] = __ldcg(reinterpret_cast<const float4*>(state + row * kDim) + threadIdx.x);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int row = (turn * kAtOnce + j) * kRows;
        const uint32_t at = to + row / kDim * kHeadBytes + place(row % kDim) * kPitch;
        if (row >= rows) break;
        store_parts(at, v[j].x, v[j].y);
        store_parts(at + 16, v[j].z, v[j].w);
      }
    }
    const int32_t row = threadIdx.x;
    if (row >= heads * kDim) return;
    const uint32_t at = shared + row / kDim * kHeadBytes + place(row % kDim) * kPitch + 2 * kDim;
#pragma unroll
    for (int j = 0; j < 4; ++j) store_parts(at + 4 * j, z, z);
    store_shared(shared + kNormalizers + 4 * row, z);
  }

  static __device__ __forceinline__ void left_operand(uint32_t (&a)[4], const uint32_t (&words)[2][4], int step) {
    a[0] = words[0][2 * step], a[1] = words[1][2 * step], a[2] = words[0][2 * step + 1], a[3] = words[1][2 * step + 1];
  }

  // d += words times columns 32 * chunk to 32 * chunk + 31 of a head's state, or of the state turned.
  template <bool kTurned>
  static __device__ __forceinline__ void multiply(float (&d)[4][4], BlockWords words, uint32_t head, int chunk) {
    const uint32_t lane = threadIdx.x % 32, row = lane % 8 + (kTurned ? lane / 16 : lane / 8 % 2) * 8,
                   column = (kTurned ? lane / 8 % 2 : lane / 16) * 8;
    const uint32_t at = head + row * kPitch + column * 2;
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[4];
      left_operand(a, words[step / 2], step % 2);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int along = 16 * step, across = kWide * chunk + 16 * pair;
        const uint32_t from = at + (kTurned ? across * kPitch + along * 2 : along * kPitch + across * 2);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          uint32_t b[4];
          if constexpr (kTurned)
            load_matrices(b, from + part * kPartBytes);
          else
            load_matrices_turned(b, from + part * kPartBytes);
          mma_bf16(d[2 * pair], a, b[0], b[1]);
          mma_bf16(d[2 * pair + 1], a, b[2], b[3]);
        }
      }
    }
  }

  // 1 / (words . normalizer + eps) of the lane's two tokens.
  static __device__ __forceinline__ void divisors(float (&inverse)[2], BlockWords words, uint32_t head, float eps) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t at = head + lane / 16 * kPartBytes + (lane % 8 + lane / 8 % 2 * 8) * kPitch + 2 * kDim;
    float d[4] = {};
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[4], b[4];
      left_operand(a, words[step / 2], step % 2);
      load_matrices_turned(b, at + 16 * step * kPitch);
      mma_bf16(d, a, b[0], b[1]);
      mma_bf16(d, a, b[2], b[3]);
    }
    inverse[0] = reciprocal(d[0] + eps);
    inverse[1] = reciprocal(d[2] + eps);
  }
};

}  // namespace eightfold::linear
