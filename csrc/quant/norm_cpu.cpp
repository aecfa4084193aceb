#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/fp8.h"
#include "core/threads.h"
#include "quant/fused_cpu.h"
#include "quant/lanes_cpu.h"
#include "quant/norm.h"

namespace eightfold::quant {
namespace {

EF_CPU_CLONES float sum_of_squares(const float* x, int64_t n) {
  float lanes[kLanes] = {};
  int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += x[i] * x[i];
  return fold_lanes(lanes);
}

EF_CPU_CLONES void normalise(const float* x, float rstd, const float* weight, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * rstd * weight[i];
}

EF_CPU_CLONES void add(const float* x, int64_t n, float* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] = x[i] + sum[i];
}

// xhat = x * rstd in place of x, g = dy * weight in place of dy; returns sum(g * xhat) and adds dy * xhat to dweight.
EF_CPU_CLONES float backward_products(float* x, float rstd, float* dy, const float* weight, int64_t n, float* dweight) {
  float lanes[kLanes] = {};
  int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = x[i] * rstd;
    dweight[i] += dy[i] * x[i];
    dy[i] = dy[i] * weight[i];
  }
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += dy[i + j] * x[i + j];
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += dy[i] * x[i];
  return fold_lanes(lanes);
}

EF_CPU_CLONES void backward_row(const float* xhat, float rstd, const float* g, float mean, int64_t n, float* dx) {
  for (int64_t i = 0; i < n; ++i) dx[i] = rstd * (g[i] - xhat[i] * mean);
}

std::vector<float> load_weight(const void* weight, DType dtype, int64_t n) {
  std::vector<float> out(n);
  widen(weight, dtype, 0, n, out.data());
  return out;
}

// Everything that is row-wise; row_grain rows at least to a thread.
void row_pass(const RmsNorm& op, const std::vector<float>& weight, int64_t row_grain) {
  int64_t cols = op.cols;
  parallel_for(op.rows, row_grain, [&](int64_t begin, int64_t end) {
    std::vector<float> s(cols), y(cols);
    for (int64_t row = begin; row < end; ++row) {
      int64_t offset = row * cols;
      if (op.residual) {
        widen(op.residual, op.dtype, offset, cols, s.data());
        widen(op.x, op.dtype, offset, cols, y.data());
        add(y.data(), cols, s.data());
        round_span(s.data(), op.dtype, cols);
        narrow(s.data(), cols, op.sum, op.dtype, offset);
      } else {
        widen(op.x, op.dtype, offset, cols, s.data());
      }
      if (op.x_rows.codes) cast_row(s.data(), row, 0, cols, cols, op.x_rows);
      float rstd = rms_norm_row(s.data(), weight.data(), cols, op.eps, y.data());
      if (op.rstd) op.rstd[row] = rstd;
      if (op.y) narrow(y.data(), cols, op.y, op.dtype, offset);
      if (op.y_rows.codes) {
        round_span(y.data(), op.dtype, cols);
        cast_row(y.data(), row, 0, cols, cols, op.y_rows);
      }
    }
  });
}

// y again, tile by tile, for the groups that span 128 rows.
void column_pass(const RmsNorm& op, const std::vector<float>& weight) {
  const void* s = op.residual ? op.sum : op.x;
  int64_t strips = groups_of(op.cols);
  parallel_for(groups_of(op.rows) * strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(kGroup * kGroup);
    for (int64_t t = begin; t < end; ++t) {
      int64_t row = t / strips * kGroup, col = t % strips * kGroup;
      int64_t rows = std::min(kGroup, op.rows - row), cols = std::min(kGroup, op.cols - col);
      for (int64_t r = 0; r < rows; ++r) {
        float* y = tile.data() + r * kGroup;
        widen(s, op.dtype, (row + r) * op.cols + col, cols, y);
        normalise(y, op.rstd[row + r], weight.data() + col, cols, y);
        round_span(y, op.dtype, cols);
      }
      cast_tile_columns(tile.data(), row, col, rows, cols, op.y_cols);
    }
  });
}

}  // namespace

float rms_norm_row(const float* x, const float* weight, int64_t cols, float eps, float* y) {
  float mean = sum_of_squares(x, cols) / static_cast<float>(std::max<int64_t>(cols, 1));
  float rstd = 1.0f / std::sqrt(mean + eps);
  normalise(x, rstd, weight, cols, y);
  return rstd;
}

void rms_norm_cpu(const RmsNorm& op) {
  std::vector<float> weight = load_weight(op.weight, op.weight_dtype, op.cols);
  row_pass(op, weight, std::max<int64_t>(1, 16384 / std::max<int64_t>(op.cols, 1)));
  if (op.y_cols.codes) column_pass(op, weight);
}

void rms_norm_columns_cpu(const RmsNormColumns& op) {
  std::vector<float> weight = load_weight(op.weight, op.weight_dtype, op.x.cols);
  int64_t strips = groups_of(op.x.cols);
  parallel_for(groups_of(op.x.rows) * strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(kGroup * kGroup);
    for (int64_t t = begin; t < end; ++t) {
      int64_t row = t / strips * kGroup, col = t % strips * kGroup;
      int64_t rows = std::min(kGroup, op.x.rows - row), cols = std::min(kGroup, op.x.cols - col);
      for (int64_t r = 0; r < rows; ++r) {
        float* y = tile.data() + r * kGroup;
        decode_row(op.x, row + r, col, cols, y);
        normalise(y, op.rstd[row + r], weight.data() + col, cols, y);
        round_span(y, op.dtype, cols);
      }
      cast_tile_columns(tile.data(), row, col, rows, cols, op.y_cols);
    }
  });
}

void rms_norm_backward_cpu(const RmsNormBackward& op) {
  int64_t cols = op.cols, runs = backward_runs(op.rows, op.cols);
  std::vector<float> weight = load_weight(op.weight, op.weight_dtype, cols);
  parallel_for(runs, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> x(cols), g(cols), dx(cols);
    for (int64_t run = begin; run < end; ++run) {
      float* partial = op.partials + run * cols;
      std::fill(partial, partial + cols, 0.0f);
      for (int64_t row = op.rows * run / runs; row < op.rows * (run + 1) / runs; ++row) {
        int64_t offset = row * cols;
        float rstd = op.rstd[row];
        if (op.x)
          widen(op.x, op.dtype, offset, cols, x.data());
        else
          decode_row(op.x_codes, row, 0, cols, x.data());
        widen(op.dy, op.dtype, offset, cols, g.data());
        float dot = backward_products(x.data(), rstd, g.data(), weight.data(), cols, partial);
        backward_row(x.data(), rstd, g.data(), dot / static_cast<float>(std::max<int64_t>(cols, 1)), cols, dx.data());
        if (op.residual_grad) {
          widen(op.residual_grad, op.dtype, offset, cols, x.data());
          add(x.data(), cols, dx.data());
        }
        narrow(dx.data(), cols, op.dx, op.dtype, offset);
      }
    }
  });
  parallel_for(cols, 1024, [&](int64_t begin, int64_t end) {
    std::fill(op.dweight + begin, op.dweight + end, 0.0f);
    for (int64_t run = 0; run < runs; ++run) add(op.partials + run * cols + begin, end - begin, op.dweight + begin);
  });
}

}  // namespace eightfold::quant
