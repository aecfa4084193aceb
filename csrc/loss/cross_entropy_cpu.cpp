#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/math.h"
#include "core/threads.h"
#include "loss/cross_entropy.h"
#include "quant/span_cpu.h"

namespace eightfold {
namespace {

// Sums run in 16 lanes and end in order: the order depends on the length alone, not on the instruction set.
constexpr int64_t kLanes = 16;

EF_CPU_CLONES float largest(const float* x, int64_t n) {
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, std::numeric_limits<float>::lowest());
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] = x[i] > lanes[i - whole] ? x[i] : lanes[i - whole];
  return *std::max_element(lanes, lanes + kLanes);
}

// out_i = exp(x_i - max); returns their sum.
EF_CPU_CLONES float exponentials(const float* x, int64_t n, float max, float* out) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) out[i] = exp_nonpositive(x[i] - max);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += out[i + j];
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += out[i];
  float sum = 0.0f;
  for (float lane : lanes) sum += lane;
  return sum;
}

EF_CPU_CLONES void scale(const float* x, int64_t n, float factor, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

}  // namespace

void cross_entropy_cpu(const CrossEntropy& op) {
  parallel_for(op.rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(op.cols, 1)), [&](int64_t begin, int64_t end) {
    std::vector<float> row(op.cols), tempered;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t label = op.labels[r];
      const bool ignored = label == kIgnoredLabel, known = label >= 0 && label < op.cols;
      const float upstream = op.grad_output != nullptr ? op.grad_output[r] : 1.0f;
      if (ignored) {
        op.loss[r] = 0.0f;
        std::fill(row.begin(), row.end(), 0.0f * upstream);
      } else {
        const float* x = op.logits + r * op.ld;
        const float cold = op.temperatures != nullptr && op.temperatures[r] > 0.0f ? 1.0f / op.temperatures[r] : 1.0f;
        if (cold != 1.0f) {
          tempered.resize(op.cols);
          scale(x, op.cols, cold, tempered.data());
          x = tempered.data();
        }
        const float max = largest(x, op.cols), sum = exponentials(x, op.cols, max, row.data());
        const float nan = std::numeric_limits<float>::quiet_NaN();
        op.loss[r] = known ? std::log(sum) + (max - x[label]) : nan;
        scale(row.data(), op.cols, known ? 1.0f / sum : nan, row.data());
        if (known) row[label] -= 1.0f;
        if (cold != 1.0f) scale(row.data(), op.cols, cold, row.data());
        if (upstream != 1.0f) scale(row.data(), op.cols, upstream, row.data());
      }
      if (op.grad != nullptr) quant::narrow(row.data(), op.cols, op.grad, op.grad_type, r * op.cols);
    }
  });
}

}  // namespace eightfold
