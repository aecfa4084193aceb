#include <algorithm>
#include <vector>

#include "core/fp8.h"
#include "core/threads.h"
#include "quant/span_cpu.h"
#include "rotary/rotary.h"

namespace eightfold {

EF_CPU_CLONES void rotate_head(float* x, const float* cos, const float* sin, int64_t half, float sign) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[half + i], s = sign * sin[i];
    x[i] = first * cos[i] - second * s;
    x[half + i] = second * cos[i] + first * s;
  }
}

void rotary_cpu(const Rotary& op) {
  const int64_t half = op.dim / 2;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(op.heads * op.dim, 1));
  parallel_for(op.batch * op.tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> head(op.dim);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t batch = row / op.tokens, token = row % op.tokens, table = batch * op.table_batch_stride + token * half;
      for (int64_t h = 0; h < op.heads; ++h) {
        quant::widen(op.x, op.dtype, batch * op.x_batch_stride + token * op.x_token_stride + h * op.x_head_stride, op.dim, head.data());
        rotate_head(head.data(), op.cos + table, op.sin + table, half, op.inverse ? -1.0f : 1.0f);
        quant::narrow(head.data(), op.dim, op.y, op.dtype, (row * op.heads + h) * op.dim);
      }
    }
  });
}

}  // namespace eightfold
