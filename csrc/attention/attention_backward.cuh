// What the kernels of attention's backward pass share (attention_backward_sm90.cu says how they go together).
#pragma once

#include "attention/attention_tile.cuh"

namespace eightfold::attention {

constexpr int kSumsTile = 64;  // a sequence's sums begin at a multiple of so many places, and end at one

// Of every row of queries: log2 of the sum of its exp2(z), and delta = sum(dout * out). [heads, places], each sequence padded to whole
// tiles with rows that weigh nothing: infinite, 0.
struct RowSums {
  float *lse, *delta;
  int64_t places;  // of a head

  static int64_t places_of(const Attention& op) { return padded(op.tokens, op.sequences); }
  static __host__ __device__ __forceinline__ int64_t padded(int64_t begin, int64_t sequence) {
    return (begin + kSumsTile * sequence) / kSumsTile * kSumsTile;
  }
};

// What a kernel is given; q, k, v and dout come as tensor maps.
void keys_gradients_sm90(const AttentionBackward& op, const RowSums& sums, void* stream);     // dk and dv
void queries_gradients_sm90(const AttentionBackward& op, const RowSums& sums, void* stream);  // dq

// Of a sequence, the first query that sees the key.
__device__ __forceinline__ int32_t first_query(int32_t key, int32_t block) {
  if (block == kNoMask) return 0;
  return block == kCausal ? key : key / block * block;
}

// bf16 pairs of a tile's numbers, as the tensor core wants its left operand.
template <int kCount>
__device__ __forceinline__ void pack_tile(const float (&x)[kCount], uint32_t (&words)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) words[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}

template <int kCount>
__device__ __forceinline__ void clear(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = 0.0f;
}

}  // namespace eightfold::attention
