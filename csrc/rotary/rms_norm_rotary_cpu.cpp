#include <algorithm>
#include <vector>

#include "core/threads.h"
#include "quant/fused_cpu.h"
#include "rotary/rms_norm_rotary.h"

namespace eightfold {

void rms_norm_rotary_cpu(const RmsNormRotary& op) {
  const Heads& x = op.x;
  const int64_t half = x.dim / 2, grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(x.heads * x.dim, 1));
  std::vector<float> weight(x.dim);
  quant::widen(op.weight, op.weight_dtype, 0, x.dim, weight.data());
  parallel_for(x.batch * x.tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> head(x.dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / x.tokens, token = i % x.tokens, table = batch * op.tables.batch_stride + token * half;
      for (int64_t h = 0; h < x.heads; ++h) {
        const int64_t row = i * x.heads + h;
        quant::widen(x.data, x.dtype, batch * x.batch_stride + token * x.token_stride + h * x.head_stride, x.dim, head.data());
        if (op.x_rows.codes) quant::cast_row(head.data(), row, 0, x.dim, x.dim, op.x_rows);
        const float rstd = quant::rms_norm_row(head.data(), weight.data(), x.dim, op.eps, head.data());
        if (op.rstd) op.rstd[row] = rstd;
        quant::round_span(head.data(), x.dtype, x.dim);
        rotate_head(head.data(), op.tables.cos + table, op.tables.sin + table, half, 1.0f);
        quant::narrow(head.data(), x.dim, op.y, x.dtype, row * x.dim);
      }
    }
  });
}

// Here the cache is large and the arithmetic slow: one pass after the other, through dx.
void rms_norm_rotary_backward_cpu(const RmsNormRotaryBackward& op) {
  rotary_cpu(rotary_of(op.dy, op.tables, op.dx, true));
  quant::rms_norm_backward_cpu(op.norm(op.dx));
}

}  // namespace eightfold
