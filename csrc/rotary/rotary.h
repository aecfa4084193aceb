// Rotary position embedding of queries and keys, halves paired as in Hugging Face models: for each head, with x = (x1, x2),
//   y1 = x1 cos - x2 sin     y2 = x2 cos + x1 sin
// in fp32, each operation rounded, the result rounded once to x's dtype. The inverse rotation (-sin) is the gradient.
//
// Floor: x read once, y written once (the tables are 1/heads of that and stay in the cache). A thread holds eight elements of each
// half of a head, so that both results come from one load; the composition in torch takes eleven passes, seven of them in fp32.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace eightfold {

struct Rotary {
  const void* x;  // [batch, tokens, heads, dim] in `dtype` (bf16 or f32), element strides below, dim contiguous and even
  int64_t x_batch_stride, x_token_stride, x_head_stride;
  void* y;  // dense
  DType dtype;
  int64_t batch, tokens, heads, dim;
  const float *cos, *sin;      // [1 or batch, tokens, dim / 2], dense
  int64_t table_batch_stride;  // 0 where all sequences share one table
  bool inverse;
};

void rotary_cpu(const Rotary& op);
void rotate_head(float* x, const float* cos, const float* sin, int64_t half, float sign);  // on the CPU, in place
void rotary_sm90(const Rotary& op, void* stream);

}  // namespace eightfold
