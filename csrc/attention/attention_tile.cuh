// A warpgroup's 64 rows of attention against a tile of 128 keys, and the fold of a chunk: what attention.h says, in the one order that
// every kernel of it takes; block_attention's take tiles of 64. A lane holds two rows, `h` of 0 and 1, in the places of core/wgmma.cuh.
//
// In shared memory q [rows, dim], k and v [keys, dim] lie in blocks of 64 of the dimension, rows of 128 bytes, 128-byte swizzle.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "core/approx.cuh"
#include "core/barrier.cuh"
#include "core/memory.cuh"
#include "core/quad.cuh"
#include "core/wgmma.cuh"

namespace eightfold::attention {

constexpr int kRows = 64, kTile = kAttentionTile, kTilesOfChunk = kAttentionChunk / kTile;
constexpr float kNothing = -__builtin_inff();

template <int kDim, int kKeys = kTile>
struct Shape {
  static constexpr int kBlocks = (kDim + 63) / 64;                                     // of 64 of the dimension
  static constexpr int kBlockBytes = kKeys * 128, kTileBytes = kBlocks * kBlockBytes;  // of k or v
};

// What rows have seen: of a chunk, or of all chunks.
template <int kDim>
struct Rows {
  float out[kDim / 2];
  float top[2], sum[2];  // m and l; of a chunk under way, sum is of the lane's own columns

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] = 0.0f;
    top[0] = top[1] = kNothing;
    sum[0] = sum[1] = 0.0f;
  }
};

template <int kKeys>
using ScoresOf = float[kKeys / 2];
template <int kKeys>
using WeightsOf = uint32_t[kKeys / 4];  // bf16 pairs, as the tensor core wants its left operand
using Scores = ScoresOf<kTile>;
using Weights = WeightsOf<kTile>;

// Rows of queries as the tensor core wants them; from(row): where its elements lie, or null for one that does not exist, which is zeros.
// By all threads of a warpgroup, `meeting` its named barrier.
template <int kDim, class From>
__device__ __forceinline__ void place_queries(uint32_t shared, int meeting, const From& from) {
  constexpr int kPieces = kDim / 8;                                            // of 16 bytes
  for (int32_t i = in_register(threadIdx.x); i < kRows * kPieces; i += 128) {  // addresses are not kept from one use to the next
    const int32_t row = i / kPieces, piece = i % kPieces;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (const __nv_bfloat16* at = from(row)) v = __ldcg(reinterpret_cast<const uint4*>(at + 8 * piece));  // core/dependent_launch.cuh
    store_shared(shared + piece / 8 * (kRows * 128) + row * 128 + (piece % 8 ^ row % 8) * 16, v);
  }
  async_fence();
  warpgroup_meet(meeting);
}

// Under way until wgmma_wait_all(): scores = q k^T. q_block_bytes: from 64 of q's dimension to the next.
template <int kDim, int kCount>
__device__ __forceinline__ void start_scores(float (&scores)[kCount], uint32_t q, uint32_t q_block_bytes, uint32_t k) {
  constexpr int kKeys = 2 * kCount;
  pin_registers(scores);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    const uint64_t a = wgmma_operand(q + i / 4 * q_block_bytes + i % 4 * 32);
    const uint64_t b = wgmma_operand(k + i / 4 * Shape<kDim, kKeys>::kBlockBytes + i % 4 * 32);
    WgmmaBf16<kKeys>::multiply(scores, a, b, i > 0);
  }
  wgmma_commit();
}

// Under way until wgmma_wait_all(): out += weights v.
template <int kDim, int kWords>
__device__ __forceinline__ void start_mix(float (&out)[kDim / 2], const uint32_t (&weights)[kWords], uint32_t v) {
  constexpr int kKeys = 4 * kWords;
  pin_registers(out);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i)
    WgmmaBf16OfRegisters<kDim>::multiply(out, weights + 4 * i, wgmma_columns_operand(v + i * 2048, Shape<kDim, kKeys>::kBlockBytes));
  wgmma_commit();
}

// Scores of keys from seen[h] of the tile on, which row h does not see.
template <int kCount>
__device__ __forceinline__ void hide(float (&scores)[kCount], const int32_t (&seen)[2], uint32_t lane) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (8 * j + 2 * static_cast<int32_t>(lane % 4) + i % 2 >= seen[i / 2]) scores[4 * j + i] = kNothing;
  }
}

// The softmax's part of a tile: scores become weights, what the chunk holds is scaled to the new maximum. `factor`: scale * log2(e),
// positive. Of the lane's rows the first kExist exist; the others' weights are 0.
template <int kDim, int kExist = 2, int kCount>
__device__ __forceinline__ void absorb(Rows<kDim>& rows, const float (&scores)[kCount], float factor, uint32_t (&weights)[kCount / 2]) {
  float shift[2];
#pragma unroll
  for (int h = 0; h < kExist; ++h) {
    float tops[4] = {kNothing, kNothing, kNothing, kNothing};  // a maximum knows no order: four short chains
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) tops[j % 4] = fmaxf(tops[j % 4], fmaxf(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
    const float top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
    const float now = fmaxf(rows.top[h], __fmul_rn(largest_of_quad(top), factor));
    shift[h] = now == kNothing ? 0.0f : now;  // a row that has seen no key yet
    const float less = ex2_approx(rows.top[h] - shift[h]);
    rows.top[h] = now;
    rows.sum[h] = __fmul_rn(rows.sum[h], less);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      rows.out[4 * i + 2 * h] = __fmul_rn(rows.out[4 * i + 2 * h], less);
      rows.out[4 * i + 2 * h + 1] = __fmul_rn(rows.out[4 * i + 2 * h + 1], less);
    }
  }
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
    for (int h = kExist; h < 2; ++h) weights[2 * j + h] = 0;
#pragma unroll
    for (int h = 0; h < kExist; ++h) {
      const float first = ex2_approx(__fmaf_rn(scores[4 * j + 2 * h], factor, -shift[h]));
      const float second = ex2_approx(__fmaf_rn(scores[4 * j + 2 * h + 1], factor, -shift[h]));
      rows.sum[h] = __fadd_rn(rows.sum[h], __fadd_rn(first, second));
      weights[2 * j + h] = pack_bf16(first, second);
    }
  }
}

template <int kDim>
__device__ __forceinline__ void end_chunk(Rows<kDim>& chunk) {
  chunk.sum[0] = sum_of_quad(chunk.sum[0]);
  chunk.sum[1] = sum_of_quad(chunk.sum[1]);
}

// What two parts are multiplied by when they come together, and their maximum.
struct Fold {
  float top, all, part;
  __device__ __forceinline__ float operator()(float x, float of_part) const { return __fmaf_rn(x, all, __fmul_rn(of_part, part)); }
};
__device__ __forceinline__ Fold fold_of(float all_top, float part_top) {
  const float top = fmaxf(all_top, part_top);
  return {top, ex2_approx(all_top - top), ex2_approx(part_top - top)};
}

// An ended chunk into all that came before it; `all` clear before the first.
template <int kDim>
__device__ __forceinline__ void fold_chunk(Rows<kDim>& all, const Rows<kDim>& chunk) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Fold fold = fold_of(all.top[h], chunk.top[h]);
    all.top[h] = fold.top;
    all.sum[h] = fold(all.sum[h], chunk.sum[h]);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      all.out[4 * i + 2 * h] = fold(all.out[4 * i + 2 * h], chunk.out[4 * i + 2 * h]);
      all.out[4 * i + 2 * h + 1] = fold(all.out[4 * i + 2 * h + 1], chunk.out[4 * i + 2 * h + 1]);
    }
  }
}

// Of the lane's row h, times `factor` and rounded, the eight elements from 8 * (i + lane % 4) on; i is a multiple of 4.
template <int kDim>
__device__ __forceinline__ void octet_of_row(uint32_t (&words)[4], const float (&out)[kDim / 2], int h, float factor, int i) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    words[j] = pack_bf16(__fmul_rn(out[4 * (i + j) + 2 * h], factor), __fmul_rn(out[4 * (i + j) + 2 * h + 1], factor));
  transpose_quad(words, threadIdx.x % 4);
}

// The lane's row h times `factor`; `exists` may differ between rows.
template <int kDim>
__device__ __forceinline__ void store_row(__nv_bfloat16* to, const float (&out)[kDim / 2], float factor, int h, bool exists) {
#pragma unroll
  for (int i = 0; i < kDim / 8; i += 4) {
    uint32_t words[4];
    octet_of_row<kDim>(words, out, h, factor, i);
    if (exists) *reinterpret_cast<uint4*>(to + 8 * i + 8 * (threadIdx.x % 4)) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}
// The same, divided by its sum.
template <int kDim>
__device__ __forceinline__ void store_row(__nv_bfloat16* to, const Rows<kDim>& rows, int h, bool exists) {
  store_row<kDim>(to, rows.out, reciprocal(rows.sum[h]), h, exists);
}

// Rows of v from `kept` on: what lies beyond a sequence may be anything, and 0 * NaN is NaN. By all threads of a warpgroup, `meeting` its
// named barrier.
template <int kDim, int kKeys = kTile>
__device__ __forceinline__ void clear_rows(uint32_t v, int32_t kept, int meeting) {
  const int32_t thread = threadIdx.x % 128;
  for (int32_t i = kept * 8 + thread; i < kKeys * 8; i += 128) {
#pragma unroll
    for (int block = 0; block < Shape<kDim, kKeys>::kBlocks; ++block)
      store_shared(v + block * Shape<kDim, kKeys>::kBlockBytes + i * 16, make_uint4(0, 0, 0, 0));
  }
  async_fence();
  warpgroup_meet(meeting);
}

}  // namespace eightfold::attention
