// A task is some rows.
#include <algorithm>
#include <cmath>
#include <vector>

#include "conv/pixels.h"
#include "core/math.h"
#include "core/threads.h"
#include "quant/span_cpu.h"

namespace eightfold::conv {
namespace {

constexpr int64_t kElements = 16384;  // of a task, at least

int64_t grain(int64_t cols) { return std::max<int64_t>(1, kElements / std::max<int64_t>(cols, 1)); }

std::vector<float> widened(const PixelVector& vector, int64_t cols) {
  std::vector<float> values(cols);
  quant::widen(vector.data, vector.dtype, 0, cols, values.data());
  return values;
}

EF_CPU_CLONES void silu_of_sum(float* __restrict x, const float* __restrict bias, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float s = x[i] + bias[i];
    x[i] = s * sigmoid(s);
  }
}

EF_CPU_CLONES float sum_of_squares(const float* x, int64_t n) {
  float lanes[8] = {};
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8)
    for (int64_t j = 0; j < 8; ++j) lanes[j] += x[i + j] * x[i + j];
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += x[i] * x[i];
  float sum = 0.0f;
  for (float lane : lanes) sum += lane;
  return sum;
}

EF_CPU_CLONES void scale_and_add(float* __restrict x, float rstd, const float* __restrict weight, const float* __restrict bias,
                                 const float* __restrict residual, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * rstd * weight[i] + bias[i] + residual[i];
}

}  // namespace

void bias_silu_cpu(const BiasSilu& op) {
  const std::vector<float> bias = widened(op.bias, op.cols);
  parallel_for(op.rows, grain(op.cols), [&](int64_t begin, int64_t end) {
    std::vector<float> row(op.cols);
    for (int64_t r = begin; r < end; ++r) {
      quant::widen(op.x, op.dtype, r * op.cols, op.cols, row.data());
      silu_of_sum(row.data(), bias.data(), op.cols);
      quant::narrow(row.data(), op.cols, op.y, op.dtype, r * op.cols);
    }
  });
}

void rms_norm_add_cpu(const RmsNormAdd& op) {
  const std::vector<float> weight = widened(op.weight, op.cols), bias = widened(op.bias, op.cols);
  parallel_for(op.rows, grain(op.cols), [&](int64_t begin, int64_t end) {
    std::vector<float> row(op.cols), residual(op.cols);
    for (int64_t r = begin; r < end; ++r) {
      quant::widen(op.x, op.dtype, r * op.cols, op.cols, row.data());
      quant::widen(op.residual, op.dtype, r * op.cols, op.cols, residual.data());
      const float rstd = 1.0f / std::sqrt(sum_of_squares(row.data(), op.cols) / static_cast<float>(op.cols) + op.eps);
      scale_and_add(row.data(), rstd, weight.data(), bias.data(), residual.data(), op.cols);
      quant::narrow(row.data(), op.cols, op.y, op.dtype, r * op.cols);
    }
  });
}

}  // namespace eightfold::conv
