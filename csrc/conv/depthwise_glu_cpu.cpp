// A thread takes a part of an image: some rows, and 128 channels of the value half with the same of the gate half, side by side.
#include <algorithm>
#include <vector>

#include "conv/depthwise_glu.h"
#include "core/math.h"
#include "core/threads.h"
#include "quant/fused_cpu.h"

namespace eightfold::conv {
namespace {

using quant::kGroup;

constexpr int64_t kRows = 8, kTaps = 9;

EF_CPU_CLONES void silu(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * sigmoid(x[i]);
}

EF_CPU_CLONES void times_silu_slope(const float* x, int64_t n, float* grad) {
  for (int64_t i = 0; i < n; ++i) {
    float s = sigmoid(x[i]);
    grad[i] *= s * (1.0f + x[i] * (1.0f - s));
  }
}

EF_CPU_CLONES void add_product(const float* __restrict tap, const float* __restrict under, int64_t n, float* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += tap[i] * under[i];
}

EF_CPU_CLONES void add(const float* __restrict x, int64_t n, float* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}

EF_CPU_CLONES void glu(const float* value, const float* gate, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = value[i] * (gate[i] * sigmoid(gate[i]));
}

// dd in place of d = (value, gate).
EF_CPU_CLONES void glu_backward(const float* dy, float* value, float* gate, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float v = value[i], g = gate[i], s = sigmoid(g);
    value[i] = dy[i] * (g * s);
    gate[i] = dy[i] * v * (s * (1.0f + g * (1.0f - s)));
  }
}

// A part of one image: rows [row, row + rows) of image `image`, channels [channel, channel + count) of both halves.
struct Part {
  int64_t image, row, rows, channel, count;
};

// The parts of a batch, numbered so that those of one span of pixels follow each other.
struct Parts {
  const Images& images;
  int64_t bands = (images.height + kRows - 1) / kRows, chunks = quant::groups_of(images.channels);

  int64_t spans() const { return images.batch * bands; }
  int64_t count() const { return images.width > 0 ? spans() * chunks : 0; }
  Part at(int64_t i) const {
    int64_t span = i / chunks, row = span % bands * kRows, channel = i % chunks * kGroup;
    return {span / bands, row, std::min(kRows, images.height - row), channel, std::min(kGroup, images.channels - channel)};
  }
};

// Rows of pixels of a part with a pixel of zeros at either end; row 0 is the image's row `first`. 2 * count floats a pixel.
struct Rows {
  int64_t first, width, depth;
  std::vector<float> values;

  Rows(int64_t first, int64_t rows, const Images& images, const Part& part)
      : first(first), width(images.width), depth(2 * part.count), values(rows * (images.width + 2) * depth) {}
  float* at(int64_t row, int64_t col) { return values.data() + ((row - first) * (width + 2) + col + 1) * depth; }
  float* under(int64_t row, int64_t col, int64_t tap) { return at(row + tap / 3 - 1, col + tap % 3 - 1); }
};

struct Weights {
  std::vector<float> taps[kTaps], bias;

  Weights(const DepthwiseWeights& w, int64_t channels, const Part& part) : bias(2 * part.count) {
    std::vector<float> of_half(part.count * kTaps);
    for (auto& tap : taps) tap.resize(2 * part.count);
    for (int64_t half = 0; half < 2; ++half) {
      int64_t first = half * channels + part.channel;
      quant::widen(w.weight, w.weight_dtype, first * kTaps, part.count * kTaps, of_half.data());
      for (int64_t c = 0; c < part.count; ++c)
        for (int64_t t = 0; t < kTaps; ++t) taps[t][half * part.count + c] = of_half[c * kTaps + t];
      quant::widen(w.bias, w.bias_dtype, first, part.count, bias.data() + half * part.count);
    }
  }
};

int64_t pixel_of(const Images& images, const Part& part, int64_t row, int64_t col) {
  return (part.image * images.height + row) * images.width + col;
}

void load_pixel(const Images& images, const Part& part, const void* x, DType dtype, int64_t pixel, float* to) {
  for (int64_t half = 0; half < 2; ++half)
    quant::widen(x, dtype, (2 * pixel + half) * images.channels + part.channel, part.count, to + half * part.count);
}

// silu(x) of `rows` rows from `first` on; rows outside the image stay zeros.
Rows silu_rows(const Images& images, const Part& part, const void* x, DType dtype, int64_t first, int64_t rows) {
  Rows s(first, rows, images, part);
  for (int64_t row = std::max<int64_t>(first, 0); row < std::min(first + rows, images.height); ++row)
    for (int64_t col = 0; col < images.width; ++col) {
      load_pixel(images, part, x, dtype, pixel_of(images, part, row, col), s.at(row, col));
      silu(s.at(row, col), s.depth);
    }
  return s;
}

void convolve(const Weights& weights, Rows& s, int64_t row, int64_t col, float* d) {
  std::copy(weights.bias.begin(), weights.bias.end(), d);
  for (int64_t t = 0; t < kTaps; ++t) add_product(weights.taps[t].data(), s.under(row, col, t), s.depth, d);
}

void forward_part(const DepthwiseGlu& op, const Part& part) {
  const int64_t n = part.count;
  Weights weights(op.weights, op.images.channels, part);
  Rows s = silu_rows(op.images, part, op.x, op.dtype, part.row - 1, part.rows + 2);
  std::vector<float> d(2 * n), y(n);
  for (int64_t row = part.row; row < part.row + part.rows; ++row)
    for (int64_t col = 0; col < op.images.width; ++col) {
      int64_t pixel = pixel_of(op.images, part, row, col);
      convolve(weights, s, row, col, d.data());
      glu(d.data(), d.data() + n, n, y.data());
      if (op.y) quant::narrow(y.data(), n, op.y, op.dtype, pixel * op.images.channels + part.channel);
      if (op.codes.codes) {
        quant::round_span(y.data(), op.dtype, n);
        quant::cast_row(y.data(), pixel, part.channel, n, op.images.channels, op.codes);
      }
    }
}

void backward_part(const DepthwiseGluBackward& op, const Part& part, float* partial) {
  const int64_t n = part.count, width = op.images.width, end = part.row + part.rows;
  Weights weights(op.weights, op.images.channels, part);
  Rows s = silu_rows(op.images, part, op.x, op.dtype, part.row - 2, part.rows + 4);
  Rows dd(part.row - 1, part.rows + 2, op.images, part);
  std::vector<float> x(2 * n), dx(2 * n), sums((kTaps + 1) * 2 * n);
  for (int64_t row = std::max<int64_t>(part.row - 1, 0); row < std::min(end + 1, op.images.height); ++row)
    for (int64_t col = 0; col < width; ++col) {
      float* d = dd.at(row, col);
      convolve(weights, s, row, col, d);
      quant::widen(op.dy, op.dtype, pixel_of(op.images, part, row, col) * op.images.channels + part.channel, n, x.data());
      glu_backward(x.data(), d, d + n, n);
    }
  for (int64_t row = part.row; row < end; ++row)
    for (int64_t col = 0; col < width; ++col) {
      int64_t pixel = pixel_of(op.images, part, row, col);
      std::fill(dx.begin(), dx.end(), 0.0f);
      for (int64_t t = 0; t < kTaps; ++t) {
        add_product(weights.taps[kTaps - 1 - t].data(), dd.under(row, col, t), 2 * n, dx.data());
        add_product(dd.at(row, col), s.under(row, col, t), 2 * n, sums.data() + t * 2 * n);
      }
      add(dd.at(row, col), 2 * n, sums.data() + kTaps * 2 * n);
      load_pixel(op.images, part, op.x, op.dtype, pixel, x.data());
      times_silu_slope(x.data(), 2 * n, dx.data());
      for (int64_t half = 0; half < 2; ++half)
        quant::narrow(dx.data() + half * n, n, op.dx, op.dtype, (2 * pixel + half) * op.images.channels + part.channel);
    }
  for (int64_t t = 0; t <= kTaps; ++t)
    for (int64_t half = 0; half < 2; ++half)
      std::copy_n(sums.data() + (2 * t + half) * n, n, partial + (2 * t + half) * op.images.channels + part.channel);
}

}  // namespace

int64_t depthwise_glu_spans_cpu(const Images& images) { return Parts{images}.spans(); }

void depthwise_glu_cpu(const DepthwiseGlu& op) {
  Parts parts{op.images};
  parallel_for(parts.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) forward_part(op, parts.at(i));
  });
}

void depthwise_glu_backward_cpu(const DepthwiseGluBackward& op) {
  Parts parts{op.images};
  const int64_t channels = 2 * op.images.channels, spans = op.images.pixels() > 0 ? parts.spans() : 0;
  parallel_for(parts.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) backward_part(op, parts.at(i), op.partials + i / parts.chunks * (kTaps + 1) * channels);
  });
  parallel_for(channels, 256, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(end - begin);
    for (int64_t t = 0; t <= kTaps; ++t) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t span = 0; span < spans; ++span) add(op.partials + (span * (kTaps + 1) + t) * channels + begin, end - begin, sums.data());
      for (int64_t c = begin; c < end; ++c) (t < kTaps ? op.dweight[c * kTaps + t] : op.dbias[c]) = sums[c - begin];
    }
  });
}

}  // namespace eightfold::conv
