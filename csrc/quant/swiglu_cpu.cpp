#include <algorithm>
#include <vector>

#include "core/math.h"
#include "core/threads.h"
#include "quant/fused_cpu.h"
#include "quant/swiglu.h"

namespace eightfold::quant {
namespace {

EF_CPU_CLONES void swiglu(const float* gate, const float* up, int64_t n, float* h) {
  for (int64_t i = 0; i < n; ++i) h[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// dgate in place of dh, dup in place of gate, h in place of up.
EF_CPU_CLONES void swiglu_backward(float* dh, float* gate, float* up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float d = dh[i], g = gate[i], u = up[i];
    float s = sigmoid(g);
    float silu = g * s;
    dh[i] = (d * u) * (s * (1.0f + g * (1.0f - s)));
    gate[i] = d * silu;
    up[i] = silu * u;
  }
}

}  // namespace

void swiglu_cpu(const SwigluForward& op) {
  int64_t cols = op.cols;
  parallel_for(op.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(cols, 1)), [&](int64_t begin, int64_t end) {
    std::vector<float> gate(cols), up(cols), h(cols);
    for (int64_t row = begin; row < end; ++row) {
      widen(op.gate, op.dtype, row * op.gate_ld, cols, gate.data());
      widen(op.up, op.dtype, row * op.up_ld, cols, up.data());
      swiglu(gate.data(), up.data(), cols, h.data());
      if (op.y) narrow(h.data(), cols, op.y, op.dtype, row * cols);
      if (op.h.codes) {
        round_span(h.data(), op.dtype, cols);
        cast_row(h.data(), row, 0, cols, cols, op.h);
      }
      if (op.gate_out.codes) cast_row(gate.data(), row, 0, cols, cols, op.gate_out);
      if (op.up_out.codes) cast_row(up.data(), row, 0, cols, cols, op.up_out);
    }
  });
}

void swiglu_backward_quantize_cpu(const SwigluBackward& op) {
  int64_t strips = groups_of(op.cols), ld = op.beside ? 2 * op.cols : op.cols;
  parallel_for(groups_of(op.rows) * strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tiles(3 * kGroup * kGroup);
    float *dgate = tiles.data(), *dup = dgate + kGroup * kGroup, *h = dup + kGroup * kGroup;
    for (int64_t t = begin; t < end; ++t) {
      int64_t row = t / strips * kGroup, col = t % strips * kGroup;
      int64_t rows = std::min(kGroup, op.rows - row), cols = std::min(kGroup, op.cols - col);
      for (int64_t r = 0; r < rows; ++r) {
        int64_t at = r * kGroup;
        widen(op.dh, op.dtype, (row + r) * op.dh_ld + col, cols, dgate + at);
        decode_row(op.gate, row + r, col, cols, dup + at);
        decode_row(op.up, row + r, col, cols, h + at);
        swiglu_backward(dgate + at, dup + at, h + at, cols);
        for (float* values : {dgate + at, dup + at, h + at}) round_span(values, op.dtype, cols);
        cast_row(dgate + at, row + r, col, cols, ld, op.dgate_rows);
        cast_row(dup + at, row + r, col, cols, ld, op.dup_rows);
      }
      cast_tile_columns(dgate, row, col, rows, cols, op.dgate_cols);
      cast_tile_columns(dup, row, col, rows, cols, op.dup_cols);
      cast_tile_columns(h, row, col, rows, cols, op.h_cols);
    }
  });
}

}  // namespace eightfold::quant
