#include <algorithm>
#include <vector>

#include "core/threads.h"
#include "optim/came8bit.h"
#include "optim/elements_cpu.h"

namespace eightfold {
namespace {

constexpr int64_t kChunk = 64;     // rows whose column sums are made together: folded in order, whatever the threads
constexpr int kSpan = 512;         // columns, or elements, at a time
constexpr int kLanes = 16;         // of a row's sum
constexpr int64_t kFoldSpan = 64;  // columns that a thread folds at least
static_assert(kCameBlock % kSpan == 0 && kSpan % kRandomSpan == 0);

struct Scalars {
  CameConstants c;
  PhiloxKeys keys;
  float grad_scale, lr, decay;
};

// One tensor's work. Partial sums of columns are [sum][chunk][padded cols], those of rows [sum][rows].
struct Work {
  const CameTensor& t;
  const Scalars& s;
  int64_t chunks, padded;
  std::vector<float> row_sums, col_sums;
  std::vector<float> row_v, col_v, row_u, col_u;  // what an element is multiplied by
  std::vector<double> block_sums;                 // of a tensor that is not a matrix

  Work(const CameTensor& tensor, const Scalars& scalars)
      : t(tensor), s(scalars), chunks((t.rows + kChunk - 1) / kChunk), padded((t.cols + kLanes - 1) / kLanes * kLanes) {}

  float* row_sum(int which, int64_t row) { return row_sums.data() + which * t.rows + row; }
  float* col_sum(int which, int64_t chunk) { return col_sums.data() + (which * chunks + chunk) * padded; }
};

EF_HD int round_up(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// A row's sum; `count` is a multiple of kLanes.
EF_HD float sum_of(const float* products, int count) {
  float lanes[kLanes] = {}, sum = 0.0f;
  for (int i = 0; i < count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += products[i + lane];
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Adds products to their columns; returns their sum.
EF_HD float add(const float* products, int count, float* cols) {
  for (int i = 0; i < count; ++i) cols[i] += products[i];
  return sum_of(products, count);
}

// m as it was, elements [begin, begin + count).
EF_HD void load_moment(const CameTensor& t, int64_t begin, int count, float* m) {
  if (!t.m_scales) {
    const float* from = static_cast<const float*>(t.m) + begin;
    for (int i = 0; i < count; ++i) m[i] = from[i];
    return;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(t.m) + begin;
  for (int done = 0; done < count;) {
    const int64_t block = (begin + done) / kCameBlock;
    const int last = static_cast<int>(std::min<int64_t>(count, (block + 1) * kCameBlock - begin));
    const float scale = t.m_scales[2 * block], minimum = t.m_scales[2 * block + 1];
    for (; done < last; ++done) m[done] = std::fma(static_cast<float>(codes[done]), scale, minimum);
  }
}

EF_CPU_CLONES void add_squares(Work& work, int64_t chunk) {
  const CameTensor& t = work.t;
  const int64_t first = chunk * kChunk, last = std::min(first + kChunk, t.rows);
  float g[kSpan];
  for (int64_t col = 0; col < t.cols; col += kSpan) {
    const int count = static_cast<int>(std::min<int64_t>(kSpan, t.cols - col)), whole = round_up(count);
    for (int i = count; i < whole; ++i) g[i] = 0.0f;
    for (int64_t row = first; row < last; ++row) {
      load(t.grad, t.grad_type, row * t.cols + col, count, g);
      for (int i = 0; i < count; ++i) g[i] = g[i] * work.s.grad_scale;
      for (int i = 0; i < count; ++i) g[i] = g[i] * g[i];
      *work.row_sum(0, row) += add(g, whole, work.col_sum(0, chunk) + col);
    }
  }
}

EF_CPU_CLONES void add_instabilities(Work& work, int64_t chunk) {
  const CameTensor& t = work.t;
  const int64_t first = chunk * kChunk, last = std::min(first + kChunk, t.rows);
  float g[kSpan], m[kSpan], dd[kSpan], dw[kSpan], ww[kSpan];
  for (int64_t col = 0; col < t.cols; col += kSpan) {
    const int count = static_cast<int>(std::min<int64_t>(kSpan, t.cols - col)), whole = round_up(count);
    for (int i = count; i < whole; ++i) dd[i] = dw[i] = ww[i] = 0.0f;
    for (int64_t row = first; row < last; ++row) {
      load(t.grad, t.grad_type, row * t.cols + col, count, g);
      load_moment(t, row * t.cols + col, count, m);
      const float factor = work.row_v[row];
      const float* factors = work.col_v.data() + col;
      for (int i = 0; i < count; ++i) {
        const float w = (g[i] * work.s.grad_scale) * factors[i] * factor, d = w - m[i];
        dd[i] = d * d, dw[i] = d * w, ww[i] = w * w;
      }
      const float* products[3] = {dd, dw, ww};
      for (int which = 0; which < 3; ++which) *work.row_sum(which, row) += add(products[which], whole, work.col_sum(which, chunk) + col);
    }
  }
}

EF_HD void store_param(const Work& work, int64_t begin, int count, const float* p) {
  const CameTensor& t = work.t;
  if (t.param_type == DType::f32) {
    float* to = static_cast<float*>(t.param) + begin;
    for (int i = 0; i < count; ++i) to[i] = p[i];
    return;
  }
  for (int done = 0; done < count; done += kRandomSpan)
    store_stochastic(static_cast<uint16_t*>(t.param) + begin + done, std::min(kRandomSpan, count - done), p + done,
                     static_cast<uint64_t>(t.offset + begin + done), static_cast<uint32_t>(*t.step), work.s.keys);
}

EF_HD void store_moment(const CameTensor& t, int64_t block, int count, const float* m) {
  if (!t.m_scales) {
    float* to = static_cast<float*>(t.m) + block * kCameBlock;
    for (int i = 0; i < count; ++i) to[i] = m[i];
    return;
  }
  float low = bits_float(0x7F800000u), high = -low;
  int broken = 0;
  for (int i = 0; i < count; ++i) {
    low = m[i] < low ? m[i] : low;
    high = m[i] > high ? m[i] : high;
    broken |= !(std::fabs(m[i]) <= 3.4028234e38f);
  }
  if (broken) low = high = bits_float(0x7FC00000u);
  const CameScale scale(low, high);
  uint8_t* codes = static_cast<uint8_t*>(t.m) + block * kCameBlock;
  uint32_t wide[kCameBlock];
  for (int i = 0; i < count; ++i) wide[i] = broken ? 0 : scale.code(m[i]);
  for (int i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
  t.m_scales[2 * block] = scale.scale, t.m_scales[2 * block + 1] = scale.minimum;
}

// Second moments of a tensor that is no matrix, and a block's sum of squares of its unclipped w.
EF_CPU_CLONES void second_moments(Work& work, int64_t block) {
  const CameTensor& t = work.t;
  const CameConstants c = work.s.c;
  const int64_t begin = block * kCameBlock;
  float g[kSpan];
  double sum = 0.0;
  for (int64_t at = begin; at < std::min(begin + kCameBlock, t.cols); at += kSpan) {
    const int count = static_cast<int>(std::min<int64_t>(kSpan, t.cols - at)), whole = round_up(count);
    for (int i = count; i < whole; ++i) g[i] = 0.0f;
    load(t.grad, t.grad_type, at, count, g);
    float* v = t.v_rows + at;
    for (int i = 0; i < count; ++i) {
      g[i] = g[i] * work.s.grad_scale;
      v[i] = c.beta2 * v[i] + c.one_minus_beta2 * (g[i] * g[i] + c.eps1);
      g[i] = g[i] / std::sqrt(v[i]);
      g[i] = g[i] * g[i];
    }
    sum += sum_of(g, whole);
  }
  work.block_sums[block] = sum;
}

// m, parameters and the stored m of 2,048 elements. `clip`: what the w of a tensor that is no matrix is multiplied by.
EF_CPU_CLONES void step_block(const Work& work, int64_t block, float clip) {
  const CameTensor& t = work.t;
  const Scalars& s = work.s;
  const int64_t begin = block * kCameBlock;
  const int count = static_cast<int>(std::min<int64_t>(kCameBlock, t.numel() - begin));
  float g[kCameBlock], m[kCameBlock], p[kCameBlock], step[kCameBlock];
  load(t.grad, t.grad_type, begin, count, g);
  load(t.param, t.param_type, begin, count, p);
  load_moment(t, begin, count, m);
  for (int i = 0; i < count; ++i) g[i] = g[i] * s.grad_scale;
  if (t.factored()) {
    for (int done = 0; done < count;) {
      const int64_t row = (begin + done) / t.cols, col = begin + done - row * t.cols;
      const int last = static_cast<int>(std::min<int64_t>(count, done + t.cols - col));
      const float row_v = work.row_v[row], row_u = work.row_u[row];
      const float *col_v = work.col_v.data() + col - done, *col_u = work.col_u.data() + col - done;
      for (; done < last; ++done) {
        m[done] = std::fma(s.c.beta1, m[done], s.c.one_minus_beta1 * (g[done] * col_v[done] * row_v));
        step[done] = m[done] * col_u[done] * row_u;
      }
    }
  } else {
    const float* v = t.v_rows + begin;
    for (int i = 0; i < count; ++i) {
      m[i] = std::fma(s.c.beta1, m[i], s.c.one_minus_beta1 * (g[i] / std::sqrt(v[i]) * clip));
      step[i] = m[i];
    }
  }
  for (int i = 0; i < count; ++i) p[i] = std::fma(-s.lr, step[i], p[i] * s.decay);
  store_param(work, begin, count, p);
  store_moment(t, block, count, m);
}

template <class Body>
void each(int64_t n, int64_t grain, const Body& body) {
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

EF_CPU_CLONES void add_chunks(float* parts, int64_t chunks, int64_t stride, int64_t begin, int64_t end) {
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t j = begin; j < end; ++j) parts[j] += parts[chunk * stride + j];
}

// Sums over chunks, left in the first one.
void fold_columns(Work& work, int sums) {
  parallel_for(work.t.cols, kFoldSpan, [&](int64_t begin, int64_t end) {
    for (int which = 0; which < sums; ++which) add_chunks(work.col_sum(which, 0), work.chunks, work.padded, begin, end);
  });
}

double mean(const float* x, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum / static_cast<double>(count);
}

void clear_sums(Work& work, int sums) {
  work.row_sums.assign(sums * work.t.rows, 0.0f);
  work.col_sums.assign(sums * work.chunks * work.padded, 0.0f);
}

// v of rows or columns from sums over `length` elements; leaves rsqrt(v) in `factors`, returns the mean of fresh / v.
float update_v(const CameConstants& c, const float* sums, int64_t count, int64_t length, float* v, std::vector<float>& factors) {
  double ratios = 0.0;
  factors.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const float fresh = sums[i] / static_cast<float>(length) + c.eps1;
    v[i] = c.beta2 * v[i] + c.one_minus_beta2 * fresh;
    ratios += fresh / v[i];
    factors[i] = 1.0f / std::sqrt(v[i]);
  }
  return static_cast<float>(ratios / static_cast<double>(count));
}

void update_u(const CameConstants& c, float e, const float* sums, int64_t stride, int64_t count, int64_t length, float* u,
              std::vector<float>& factors) {
  const float n = static_cast<float>(length);
  factors.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const float fresh = came_instability(c, e, sums[i] / n, sums[stride + i] / n, sums[2 * stride + i] / n);
    u[i] = c.beta3 * u[i] + c.one_minus_beta3 * fresh;
    factors[i] = 1.0f / std::sqrt(u[i]);
  }
}

void factor(Work& work) {
  const CameTensor& t = work.t;
  const CameConstants& c = work.s.c;
  clear_sums(work, 1);
  each(work.chunks, 1, [&](int64_t chunk) { add_squares(work, chunk); });
  fold_columns(work, 1);
  const float mean_fresh = static_cast<float>(mean(work.row_sum(0, 0), t.rows)) / static_cast<float>(t.cols) + c.eps1;
  const float row_ratio = update_v(c, work.row_sum(0, 0), t.rows, t.cols, t.v_rows, work.row_v);
  const float col_ratio = update_v(c, work.col_sum(0, 0), t.cols, t.rows, t.v_cols, work.col_v);
  const float mean_v = static_cast<float>(mean(t.v_rows, t.rows));
  const float guess = came_guess(c, mean_v, mean_fresh, row_ratio, col_ratio), root_mean_v = std::sqrt(mean_v);
  for (float& f : work.row_v) f *= root_mean_v * guess;

  clear_sums(work, 3);
  each(work.chunks, 1, [&](int64_t chunk) { add_instabilities(work, chunk); });
  fold_columns(work, 3);
  const float mean_ww = static_cast<float>(mean(work.row_sum(2, 0), t.rows) / static_cast<double>(t.cols));
  const float e = came_correction(c, guess, mean_ww);
  update_u(c, e, work.row_sum(0, 0), t.rows, t.rows, t.cols, t.u_rows, work.row_u);
  update_u(c, e, work.col_sum(0, 0), work.chunks * work.padded, t.cols, t.rows, t.u_cols, work.col_u);
  const float root_mean_u = std::sqrt(static_cast<float>(mean(t.u_rows, t.rows)));
  for (float& f : work.row_v) f *= 1.0f + e;
  for (float& f : work.row_u) f *= root_mean_u;
}

}  // namespace

void came8bit_cpu(const CameTensor* tensors, int64_t count, const CameOptions& o) {
  const CameConstants c = came_constants(o);
  const Scalars scalars{c, PhiloxKeys(o.seed), o.grad_scale ? *o.grad_scale : 1.0f, *o.lr, 1.0f - *o.lr * c.weight_decay};
  for (int64_t i = 0; i < count; ++i) {
    Work work(tensors[i], scalars);
    const int64_t blocks = (tensors[i].numel() + kCameBlock - 1) / kCameBlock;
    float clip = 1.0f;
    if (tensors[i].factored()) {
      factor(work);
    } else {
      work.block_sums.resize(blocks);
      each(blocks, 4, [&](int64_t block) { second_moments(work, block); });
      double sum = 0.0;
      for (double part : work.block_sums) sum += part;
      clip = came_clip(c, std::sqrt(static_cast<float>(sum / static_cast<double>(tensors[i].numel()))));
    }
    each(blocks, 4, [&](int64_t block) { step_block(work, block, clip); });
  }
}

}  // namespace eightfold
