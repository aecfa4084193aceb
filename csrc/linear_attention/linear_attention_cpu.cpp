// Three passes over the threads: sums of each span of each head, their folds, then what each token makes of the states. Sums are chains of
// fused multiply-adds over the tokens of a span (attention/tile_cpu.h).
#include <algorithm>
#include <vector>

#include "attention/tile_cpu.h"
#include "core/threads.h"
#include "linear_attention/linear_attention.h"
#include "quant/fused_cpu.h"
#include "quant/span_cpu.h"

namespace eightfold {
namespace {

using attention::kPanel;
using attention::multiply;

constexpr int64_t kSpan = 512;  // tokens
constexpr int64_t kRows = 32;   // tokens of which all heads are computed one after the other

int64_t spans_of(const LinearAttention& op) { return (op.tokens + kSpan - 1) / kSpan; }

EF_CPU_CLONES void rectify(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] <= 0.0f ? 0.0f : x[i];  // a NaN stays
}

// Gradients where ReLU's input was 0 or less become 0; `x` is its output.
EF_CPU_CLONES void hide(float* gradient, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gradient[i] = x[i] <= 0.0f ? 0.0f : gradient[i];
}

EF_CPU_CLONES void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

EF_CPU_CLONES void add_scaled(float* x, const float* y, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i] * factor;
}

EF_CPU_CLONES void divide_by(float* x, int64_t n, float divisor) {
  for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
}

// Sums run in 16 lanes and end in order.
EF_CPU_CLONES float dot(const float* x, const float* y, int64_t n) {
  float lanes[kPanel] = {}, sum = 0.0f;
  for (int64_t i = 0; i < n; i += kPanel)
    for (int64_t j = 0; j < kPanel; ++j) lanes[j] += x[i + j] * y[i + j];
  for (float lane : lanes) sum += lane;
  return sum;
}

void transpose(const float* x, int64_t n, float* out) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < n; ++c) out[c * n + r] = x[r * n + c];
}

// Tokens of one head of one sample.
struct Head {
  const LinearAttention& op;
  int64_t sample, head;

  Head(const LinearAttention& all, int64_t index) : op(all), sample(index / all.heads), head(index % all.heads) {}

  int64_t index() const { return sample * op.heads + head; }
  const float* state() const { return op.state + index() * op.dim * op.dim; }
  const float* normalizer() const { return op.normalizer + index() * op.dim; }
  int64_t at(const HeadRows& x, int64_t token) const { return sample * x.batch_stride + token * x.token_stride + head * x.head_stride; }
  bool exists(int64_t key) const { return op.key_mask == nullptr || op.key_mask[sample * op.tokens + key]; }
  void load(const HeadRows& x, int64_t token, float* out) const { quant::widen(x.data, op.dtype, at(x, token), op.dim, out); }
  void store(const float* row, const HeadRows& x, int64_t token) const { quant::narrow(row, op.dim, x.data, op.dtype, at(x, token)); }
};

// left^T right and the sums of factor * left over `count` rows, dim wide; factors null: 1.
void sum_rows(const float* left, const float* right, const float* factors, int64_t count, int64_t dim, float* state, float* normalizer) {
  multiply({left, 1, dim}, {right, dim, kPanel}, dim, dim, count, state, dim, false);
  std::fill_n(normalizer, dim, 0.0f);
  for (int64_t i = 0; i < count; ++i) add_scaled(normalizer, left + i * dim, factors ? factors[i] : 1.0f, dim);
}

// Spans' sums, [head][span][dim * dim + dim], onto what came before (may be null).
void fold(const LinearAttention& op, const std::vector<float>& parts, const float* state_in, const float* normalizer_in, float* state,
          float* normalizer) {
  const int64_t square = op.dim * op.dim, part = square + op.dim, spans = spans_of(op);
  auto one = [&](int64_t head, const float* from, int64_t offset, int64_t n, float* to) {
    if (from)
      std::copy_n(from + head * n, n, to + head * n);
    else
      std::fill_n(to + head * n, n, 0.0f);
    for (int64_t s = 0; s < spans; ++s) add(to + head * n, &parts[(head * spans + s) * part + offset], n);
  };
  parallel_for(op.batch * op.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      one(head, state_in, 0, square, state);
      one(head, normalizer_in, square, op.dim, normalizer);
    }
  });
}

// body(head, first token, its end, part) for every span of every head.
template <class Body>
void for_spans(const LinearAttention& op, std::vector<float>& parts, const Body& body) {
  const int64_t spans = spans_of(op), part = op.dim * op.dim + op.dim;
  parallel_for(op.batch * op.heads * spans, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % spans * kSpan;
      body(Head(op, i / spans), first, std::min(first + kSpan, op.tokens), parts.empty() ? nullptr : &parts[i * part]);
    }
  });
}

std::vector<float> parts_of(const LinearAttention& op) {
  return std::vector<float>(op.batch * op.heads * spans_of(op) * (op.dim * op.dim + op.dim));
}

void sum_keys(const Head& head, int64_t begin, int64_t end, float* part) {
  const int64_t dim = head.op.dim;
  std::vector<float> k((end - begin) * dim), v(k.size());
  int64_t count = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (!head.exists(t)) continue;
    head.load(head.op.k, t, &k[count * dim]);
    head.load(head.op.v, t, &v[count * dim]);
    ++count;
  }
  rectify(k.data(), count * dim);
  sum_rows(k.data(), v.data(), nullptr, count, dim, part, part + dim * dim);
}

// o of some tokens of a sample, all heads.
void apply(const LinearAttention& op, int64_t sample, int64_t begin, int64_t end) {
  const int64_t dim = op.dim, width = op.heads * dim, count = end - begin, row = sample * op.tokens + begin;
  std::vector<float> q(count * dim), out(count * width);
  for (int64_t h = 0; h < op.heads; ++h) {
    const Head head(op, sample * op.heads + h);
    for (int64_t i = 0; i < count; ++i) head.load(op.q, begin + i, &q[i * dim]);
    rectify(q.data(), count * dim);
    multiply({q.data(), dim, 1}, {head.state(), dim, kPanel}, count, dim, dim, &out[h * dim], width, false);
    for (int64_t i = 0; i < count; ++i) divide_by(&out[i * width + h * dim], dim, dot(&q[i * dim], head.normalizer(), dim) + op.eps);
  }
  if (op.out) return quant::narrow(out.data(), count * width, op.out, op.dtype, row * width);
  quant::round_span(out.data(), op.dtype, count * width);
  for (int64_t i = 0; i < count; ++i) quant::cast_row(&out[i * width], row + i, 0, width, width, op.codes);
}

// dq, and the sums of dS and dz.
void backward_queries(const LinearAttentionBackward& op, const Head& head, int64_t begin, int64_t end, float* part) {
  const int64_t dim = head.op.dim, count = end - begin;
  std::vector<float> q(count * dim), dn(q.size()), rows(q.size()), turned(dim * dim), dd(count);
  for (int64_t i = 0; i < count; ++i) {
    head.load(head.op.q, begin + i, &q[i * dim]);
    head.load(op.dout, begin + i, &dn[i * dim]);
  }
  rectify(q.data(), count * dim);
  multiply({q.data(), dim, 1}, {head.state(), dim, kPanel}, count, dim, dim, rows.data(), dim, false);
  for (int64_t i = 0; i < count; ++i) {
    const float d = dot(&q[i * dim], head.normalizer(), dim) + head.op.eps;
    divide_by(&dn[i * dim], dim, d);
    divide_by(&rows[i * dim], dim, d);
    dd[i] = -dot(&rows[i * dim], &dn[i * dim], dim);
  }
  sum_rows(q.data(), dn.data(), dd.data(), count, dim, part, part + dim * dim);
  transpose(head.state(), dim, turned.data());
  multiply({dn.data(), dim, 1}, {turned.data(), dim, kPanel}, count, dim, dim, rows.data(), dim, false);
  for (int64_t i = 0; i < count; ++i) {
    add_scaled(&rows[i * dim], head.normalizer(), dd[i], dim);
    hide(&rows[i * dim], &q[i * dim], dim);
    head.store(&rows[i * dim], op.dq, begin + i);
  }
}

// dk and dv.
void backward_keys(const LinearAttentionBackward& op, const Head& head, int64_t begin, int64_t end) {
  const int64_t dim = head.op.dim, count = end - begin;
  const float *dstate = op.dstate + head.index() * dim * dim, *dnormalizer = op.dnormalizer + head.index() * dim;
  std::vector<float> k(count * dim), v(k.size()), dk(k.size()), dv(k.size()), turned(dim * dim);
  for (int64_t i = 0; i < count; ++i) {
    if (!head.exists(begin + i)) continue;  // stays 0
    head.load(head.op.k, begin + i, &k[i * dim]);
    head.load(head.op.v, begin + i, &v[i * dim]);
  }
  rectify(k.data(), count * dim);
  transpose(dstate, dim, turned.data());
  multiply({v.data(), dim, 1}, {turned.data(), dim, kPanel}, count, dim, dim, dk.data(), dim, false);
  multiply({k.data(), dim, 1}, {dstate, dim, kPanel}, count, dim, dim, dv.data(), dim, false);
  for (int64_t i = 0; i < count; ++i) {
    add(&dk[i * dim], dnormalizer, dim);
    if (!head.exists(begin + i)) std::fill_n(&dv[i * dim], dim, 0.0f);  // a state may hold a NaN
    hide(&dk[i * dim], &k[i * dim], dim);
    head.store(&dk[i * dim], op.dk, begin + i);
    head.store(&dv[i * dim], op.dv, begin + i);
  }
}

}  // namespace

void linear_attention_cpu(const LinearAttention& op) {
  std::vector<float> parts = parts_of(op);
  for_spans(op, parts, sum_keys);
  fold(op, parts, op.state_in, op.normalizer_in, op.state, op.normalizer);
  const int64_t chunks = (op.tokens + kRows - 1) / kRows;
  parallel_for(op.batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * kRows;
      apply(op, i / chunks, first, std::min(first + kRows, op.tokens));
    }
  });
}

void linear_attention_backward_cpu(const LinearAttentionBackward& op) {
  std::vector<float> parts = parts_of(op.forward), none;
  for_spans(op.forward, parts,
            [&](const Head& head, int64_t begin, int64_t end, float* part) { backward_queries(op, head, begin, end, part); });
  fold(op.forward, parts, op.dstate_out, op.dnormalizer_out, op.dstate, op.dnormalizer);
  for_spans(op.forward, none, [&](const Head& head, int64_t begin, int64_t end, float*) { backward_keys(op, head, begin, end); });
}

}  // namespace eightfold
