#include <algorithm>
#include <cmath>
#include <vector>

#include "core/threads.h"
#include "quant/fused_cpu.h"
#include "quant/lanes_cpu.h"
#include "quant/layer_norm_modulate.h"

namespace eightfold::quant {
namespace {

EF_CPU_CLONES float sum(const float* x, int64_t n) {
  float lanes[kLanes] = {};
  int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += x[i];
  return fold_lanes(lanes);
}

EF_CPU_CLONES float dot(const float* x, const float* y, int64_t n) {
  float lanes[kLanes] = {};
  int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * y[i + j];
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += x[i] * y[i];
  return fold_lanes(lanes);
}

EF_CPU_CLONES void add(const float* x, int64_t n, float* total) {
  for (int64_t i = 0; i < n; ++i) total[i] += x[i];
}

EF_CPU_CLONES void add_product(const float* a, const float* b, int64_t n, float* total) {
  for (int64_t i = 0; i < n; ++i) total[i] += a[i] * b[i];
}

EF_CPU_CLONES void multiply(const float* a, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = a[i] * x[i];
}

EF_CPU_CLONES void subtract(float value, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] -= value;
}

// (x - mean) * rstd
EF_CPU_CLONES void normalise(float mean, float rstd, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - mean) * rstd;
}

EF_CPU_CLONES void modulate(const float* one_scale, const float* shift, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * one_scale[i] + shift[i];
}

EF_CPU_CLONES void backward_row(const float* xhat, float rstd, float mean, float along, int64_t n, float* g) {
  for (int64_t i = 0; i < n; ++i) g[i] = rstd * ((g[i] - mean) - xhat[i] * along);
}

// A sample's vector; `offset` is added to each element.
std::vector<float> vector_of(const SampleVectors& v, DType dtype, int64_t sample, int64_t cols, float offset = 0.0f) {
  std::vector<float> out(cols);
  widen(v.data, dtype, sample * v.ld, cols, out.data());
  for (float& x : out) x = offset + x;
  return out;
}

// Vectors of the sample that rows lie in, read again where a row lies in another.
struct Vectors {
  int64_t sample = -1;
  std::vector<float> gate, one_scale, shift;

  template <class Op>
  void move_to(const Op& op, int64_t row) {
    if (row / op.tokens == sample) return;
    sample = row / op.tokens;
    one_scale = vector_of(op.scale, op.vector_dtype, sample, op.cols, 1.0f);
    if (op.gate.data) gate = vector_of(op.gate, op.vector_dtype, sample, op.cols);
  }
};

void row_pass(const LayerNormModulate& op) {
  int64_t cols = op.cols;
  const auto count = static_cast<float>(std::max<int64_t>(cols, 1));
  parallel_for(op.rows(), std::max<int64_t>(1, 16384 / std::max<int64_t>(cols, 1)), [&](int64_t begin, int64_t end) {
    std::vector<float> x(cols), other(cols);
    Vectors vectors;
    for (int64_t row = begin; row < end; ++row) {
      if (row == begin || row % op.tokens == 0) {
        vectors.move_to(op, row);
        vectors.shift = vector_of(op.shift, op.vector_dtype, vectors.sample, cols);
      }
      int64_t offset = row * cols;
      widen(op.x, op.dtype, offset, cols, x.data());
      if (op.branch) {
        widen(op.branch, op.dtype, offset, cols, other.data());
        if (op.gate.data) multiply(vectors.gate.data(), cols, other.data());
        add(other.data(), cols, x.data());
        round_span(x.data(), op.dtype, cols);
        narrow(x.data(), cols, op.r, op.dtype, offset);
      }
      float mean = sum(x.data(), cols) / count;
      other = x;
      subtract(mean, cols, other.data());
      float rstd = 1.0f / std::sqrt(dot(other.data(), other.data(), cols) / count + op.eps);
      if (op.mean) op.mean[row] = mean, op.rstd[row] = rstd;
      normalise(mean, rstd, cols, x.data());
      modulate(vectors.one_scale.data(), vectors.shift.data(), cols, x.data());
      if (op.y) narrow(x.data(), cols, op.y, op.dtype, offset);
      if (op.y_rows.codes) {
        round_span(x.data(), op.dtype, cols);
        cast_row(x.data(), row, 0, cols, cols, op.y_rows);
      }
    }
  });
}

// y again, tile by tile, for the groups that span 128 rows.
void column_pass(const LayerNormModulate& op) {
  const void* r = op.branch ? op.r : op.x;
  int64_t strips = groups_of(op.cols);
  parallel_for(groups_of(op.rows()) * strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(kGroup * kGroup), one_scale(kGroup), shift(kGroup);
    for (int64_t t = begin; t < end; ++t) {
      int64_t row = t / strips * kGroup, col = t % strips * kGroup;
      int64_t rows = std::min(kGroup, op.rows() - row), cols = std::min(kGroup, op.cols - col);
      for (int64_t i = 0; i < rows; ++i) {
        float* y = tile.data() + i * kGroup;
        if (i == 0 || (row + i) % op.tokens == 0) {
          int64_t sample = (row + i) / op.tokens;
          widen(op.scale.data, op.vector_dtype, sample * op.scale.ld + col, cols, one_scale.data());
          widen(op.shift.data, op.vector_dtype, sample * op.shift.ld + col, cols, shift.data());
          for (float& s : one_scale) s = 1.0f + s;
        }
        widen(r, op.dtype, (row + i) * op.cols + col, cols, y);
        normalise(op.mean[row + i], op.rstd[row + i], cols, y);
        modulate(one_scale.data(), shift.data(), cols, y);
        round_span(y, op.dtype, cols);
      }
      cast_tile_columns(tile.data(), row, col, rows, cols, op.y_cols);
    }
  });
}

}  // namespace

void layer_norm_modulate_cpu(const LayerNormModulate& op) {
  row_pass(op);
  if (op.y_cols.codes) column_pass(op);
}

void layer_norm_modulate_backward_cpu(const LayerNormModulateBackward& op) {
  int64_t cols = op.cols, runs = modulate_runs(op.tokens), sums = op.sums();
  const auto count = static_cast<float>(std::max<int64_t>(cols, 1));
  parallel_for(op.samples * runs, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> x(cols), g(cols), other(cols);
    Vectors vectors;
    for (int64_t run = begin; run < end; ++run) {
      int64_t sample = run / runs, first = sample * op.tokens;
      vectors.move_to(op, first);
      float* partial = op.partials + run * sums * cols;
      std::fill(partial, partial + sums * cols, 0.0f);
      for (int64_t row = first + op.tokens * (run % runs) / runs; row < first + op.tokens * (run % runs + 1) / runs; ++row) {
        int64_t offset = row * cols;
        float rstd = op.rstd[row];
        widen(op.x, op.dtype, offset, cols, x.data());
        widen(op.dy, op.dtype, offset, cols, g.data());
        normalise(op.mean[row], rstd, cols, x.data());
        add(g.data(), cols, partial);
        add_product(g.data(), x.data(), cols, partial + cols);
        multiply(vectors.one_scale.data(), cols, g.data());
        float mean = sum(g.data(), cols) / count, along = dot(g.data(), x.data(), cols) / count;
        backward_row(x.data(), rstd, mean, along, cols, g.data());
        if (op.residual_grad) {
          widen(op.residual_grad, op.dtype, offset, cols, other.data());
          add(other.data(), cols, g.data());
        }
        narrow(g.data(), cols, op.dx, op.dtype, offset);
        if (op.gate.data) {
          widen(op.branch, op.dtype, offset, cols, other.data());
          add_product(g.data(), other.data(), cols, partial + 2 * cols);
          multiply(vectors.gate.data(), cols, g.data());
          narrow(g.data(), cols, op.dbranch, op.dtype, offset);
        }
      }
    }
  });
  parallel_for(op.samples * sums, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t sample = i / sums;
      float* to = (i % sums == 0 ? op.dshift : i % sums == 1 ? op.dscale : op.dgate) + sample * cols;
      std::fill(to, to + cols, 0.0f);
      for (int64_t run = 0; run < runs; ++run) add(op.partials + ((sample * runs + run) * sums + i % sums) * cols, cols, to);
    }
  });
}

}  // namespace eightfold::quant
