// What a tile of logits leaves (lm_head_confidence.h): the epilogue of both products' loops.
//
// A row's columns lie with four lanes. Each takes the best of its own, then the four agree on the maximum and add up exponentials relative
// to it; the lane that has the tile's best token writes. Warps without a row that is asked for do nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "confidence/lm_head_confidence.h"
#include "core/approx.cuh"
#include "core/quad.cuh"

namespace eightfold {

constexpr int64_t kConfidenceRows = 256;  // of a launch
constexpr int kConfidencePlainTile = 128, kConfidenceCodesTile = 64;
constexpr float kLog2E = 1.44269504f;

struct alignas(16) ConfidencePartial {
  float max, sum;  // sum of exp(x - max), NaN if a logit is NaN or +inf
  float logit;     // of the best token
  uint32_t id;
};

struct ConfidenceRows {
  ConfidencePartial* partials;  // [rows, tiles]
  float* scores;                // [rows, tiles], by which best tokens are compared; null without temperatures
  const uint8_t* active;
  const int64_t* forbidden;
  const float* temperatures;
  const int64_t *seeds, *positions;
  int64_t forbidden_count;
  int32_t rows, tiles;
};

template <bool kDrawn>
struct ConfidenceEpilogue {
  ConfidenceRows o;

  __device__ __forceinline__ bool asked(int32_t row) const { return row < o.rows && (o.active == nullptr || o.active[row] != 0); }

  __device__ __forceinline__ void prefetch(int32_t, int32_t, uint32_t) const {}

  __device__ __forceinline__ bool wanted(int32_t row, int32_t rows, uint32_t lane) const {
    if (o.active == nullptr) return true;
    bool any = false;
    for (int32_t r = row + static_cast<int32_t>(lane); r < row + rows; r += 32) any |= asked(r);
    return __any_sync(0xFFFFFFFFu, any);
  }

  // Logits of forbidden columns, and of those past the end, become -inf.
  template <int kCount>
  __device__ __forceinline__ void forbid(float (&x)[kCount], int32_t column, int32_t end, uint32_t lane) const {
    constexpr int kWidth = 2 * kCount, kWords = (kWidth + 31) / 32;
    if (o.forbidden_count == 0 && column + kWidth <= end) return;
    uint32_t words[kWords] = {};
    for (int64_t i = lane; i < o.forbidden_count; i += 32) {
      const int64_t at = o.forbidden[i] - column;
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        if (at >= 32 * w && at < 32 * w + 32) words[w] |= 1u << (at - 32 * w);
    }
    uint32_t any = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int32_t left = end - column - 32 * w;
      words[w] = __reduce_or_sync(0xFFFFFFFFu, words[w]);
      if (left < 32) words[w] |= left <= 0 ? 0xFFFFFFFFu : 0xFFFFFFFFu << left;
      any |= words[w];
    }
    if (any == 0) return;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const uint32_t pair = words[i / 4] >> (8 * (i % 4) + 2 * (lane % 4));
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (pair >> c & 1) x[4 * i + c] = x[4 * i + 2 + c] = -INFINITY;
    }
  }

  struct Best {
    float score, logit;
    uint32_t column;
  };

  template <int kCount>
  __device__ __forceinline__ void take(float (&x)[kCount], int32_t row, int32_t column, int32_t end, uint32_t lane) const {
    const bool own[2] = {asked(row), asked(row + 8)};
    if (!__any_sync(0xFFFFFFFFu, own[0] || own[1])) return;
    forbid(x, column, end, lane);
    const uint32_t first = static_cast<uint32_t>(column) + 2 * (lane % 4);
    Best best[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) best[h] = {-INFINITY, -INFINITY, first};
    if constexpr (kDrawn) {
      draw(x, best, row, first, own, lane);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        Best& b = best[i / 2 % 2];
        if (x[i] > b.score) b = {x[i], x[i], first + 8 * (i / 4) + i % 2};
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float max = best[h].score;
      if constexpr (kDrawn) {
        max = -INFINITY;
#pragma unroll
        for (int i = 0; i < kCount / 4; ++i) max = fmaxf(max, fmaxf(x[4 * i + 2 * h], x[4 * i + 2 * h + 1]));
      }
      max = largest_of_quad(max);
      const float from = max == -INFINITY ? 0.0f : max;  // -inf - -inf is no number
      float sums[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) sums[c] = __fadd_rn(sums[c], ex2_approx(__fmul_rn(__fsub_rn(x[4 * i + 2 * h + c], from), kLog2E)));
      }
      const float sum = sum_of_quad(__fadd_rn(sums[0], sums[1]));
      const unsigned long long key = ranked(best[h].score, best[h].column);
      unsigned long long top = key;
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        const unsigned long long other = __shfl_xor_sync(0xFFFFFFFFu, top, mask);
        top = other > top ? other : top;
      }
      if (!own[h] || key != top) continue;
      const int64_t at = static_cast<int64_t>(row + 8 * h) * o.tiles + column / (2 * kCount);
      o.partials[at] = {max, sum, best[h].logit, best[h].column};
      if (kDrawn) o.scores[at] = best[h].score;
    }
    __syncwarp();  // matrix instructions come next, and want whole warps
  }

  // Of a block of four random words two lanes need two each, for two rows: each makes one row's, and they trade.
  template <int kCount>
  __device__ __forceinline__ void draw(const float (&x)[kCount], Best (&best)[2], int32_t row, uint32_t first, const bool (&own)[2],
                                       uint32_t lane) const {
    const bool odd = lane & 1;
    float temperatures[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      temperatures[h] = own[h] ? o.temperatures[row + 8 * h] : 0.0f;
      if (!confidence_is_drawn(temperatures[h])) temperatures[h] = 0.0f;
    }
    const bool drawn = __any_sync(0xFFFFFFFFu, temperatures[0] > 0.0f || temperatures[1] > 0.0f);
    const int32_t made = odd ? row + 8 : row;
    const bool exists = made < o.rows;
    const uint64_t position = exists ? static_cast<uint64_t>(o.positions[made]) : 0;
    const PhiloxKeys keys(exists ? static_cast<uint64_t>(o.seeds[made]) : 0);
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      uint32_t words[2][2] = {};
      if (drawn) {
        const uint32_t block = (first + 8 * i) / 4;
        const PhiloxWords made_words = philox4x32(block, 0, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), keys);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, odd ? made_words.w[c] : made_words.w[2 + c], 1);
          words[0][c] = odd ? got : made_words.w[c];
          words[1][c] = odd ? made_words.w[2 + c] : got;
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float logit = x[4 * i + 2 * h + c];
          const float score = temperatures[h] > 0.0f ? confidence_score(logit, temperatures[h], words[h][c]) : logit;
          if (score > best[h].score) best[h] = {score, logit, first + 8 * i + c};
        }
      }
    }
  }
};

// The rows [first, first + count) of the op.
inline ConfidenceRows confidence_rows(const LmHeadConfidence& op, int64_t first, int64_t count, int tile) {
  ConfidenceRows o{};
  o.rows = static_cast<int32_t>(count);
  o.tiles = static_cast<int32_t>((op.vocabulary + tile - 1) / tile);
  o.partials = static_cast<ConfidencePartial*>(op.workspace);
  o.active = op.active == nullptr ? nullptr : op.active + first;
  o.forbidden = op.forbidden;
  o.forbidden_count = op.forbidden_count;
  if (op.temperatures == nullptr) return o;
  o.scores = reinterpret_cast<float*>(o.partials + count * o.tiles);
  o.temperatures = op.temperatures + first;
  o.seeds = op.seeds + first;
  o.positions = op.positions + first;
  return o;
}

void lm_head_confidence_codes_sm90(const Fp8GemmArgs& product, const ConfidenceRows& rows, int device, cudaStream_t stream);

}  // namespace eightfold
