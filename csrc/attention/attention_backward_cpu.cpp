// With p = exp2(z - lse log2(e)), recomputed, and delta = sum(dout * out) of a row:
//   dv = p^T dout     ds = p (dout v^T - delta) * scale     dq = ds k     dk = ds^T q
// A task is a sequence and a KV head with its query heads. It walks the tiles of keys in order and, for each, the rows that see it, so that
// every sum has one order whatever the threads. Everything is fp32 until results are rounded once.
#include <algorithm>
#include <atomic>
#include <vector>

#include "attention/attention.h"
#include "attention/tile_cpu.h"
#include "core/threads.h"
#include "quant/span_cpu.h"

namespace eightfold {
namespace {

using attention::kPanel;
using attention::power;
using attention::Source;

constexpr int64_t kTile = kAttentionTile;
constexpr int64_t kRows = 64;  // rows of a group, about: their p and ds are written once and read twice

// Sums run in 16 lanes and end in order.
EF_CPU_CLONES float dot(const float* x, const float* y, int64_t n) {
  float lanes[kPanel] = {}, sum = 0.0f;
  for (int64_t i = 0; i < n; i += kPanel)
    for (int64_t j = 0; j < kPanel; ++j) lanes[j] += x[i + j] * y[i + j];
  for (float lane : lanes) sum += lane;
  return sum;
}

// Scores s[0, n) of a row become p, dp becomes ds; what the row does not see, up to `whole`, becomes 0.
EF_CPU_CLONES void gradients(float* s, float* dp, int64_t n, int64_t whole, float factor, float lse, float delta, float scale) {
  for (int64_t i = 0; i < whole; ++i) {
    const float p = power(s[i] * factor - lse), ds = p * (dp[i] - delta) * scale;
    s[i] = i < n ? p : 0.0f;
    dp[i] = i < n ? ds : 0.0f;
  }
}

struct Scratch {
  std::vector<float> rows, k, k_across, v_across, dk, dv, p, ds;  // of a tile
  std::vector<float> q, dout, dq, row, delta, lse;                // of a sequence

  Scratch(int64_t most_rows, int64_t group_rows, int64_t width)
      : rows(kTile * width),
        k(kTile * width),
        k_across(kTile * width),
        v_across(kTile * width),
        dk(kTile * width),
        dv(kTile * width),
        p(group_rows * kTile),
        ds(group_rows * kTile),
        q(most_rows * width),
        dout(most_rows * width),
        dq(most_rows * width),
        row(width),
        delta(most_rows),
        lse(most_rows) {}
};

struct Task {
  const AttentionBackward& op;
  int64_t first, length, kv_head;  // rows first to first + length of every tensor

  const Attention& forward() const { return op.forward; }
  int64_t group() const { return forward().heads / forward().kv_heads; }
  int64_t width() const { return attention::padded(forward().dim); }
  int64_t tokens_at_once() const { return std::max<int64_t>(1, kRows / group()); }

  // Element of a tensor of queries, row by row: token by token, head by head.
  int64_t at(const AttentionRows& x, int64_t row) const {
    return (first + row / group()) * x.token_stride + (kv_head * group() + row % group()) * x.head_stride;
  }
  Source source(const AttentionRows& x) const {
    const int64_t bytes = forward().dtype == DType::f32 ? 4 : 2;
    const auto* data = static_cast<const char*>(x.data) + (first * x.token_stride + kv_head * x.head_stride) * bytes;
    return {data, forward().dtype, forward().dim, x.token_stride, nullptr, 0, 0, nullptr};
  }
};

void load_queries(const Task& task, Scratch& s) {
  const Attention& forward = task.forward();
  const int64_t width = task.width(), group = task.group();
  for (int64_t row = 0; row < task.length * group; ++row) {
    quant::widen(forward.q.data, forward.dtype, task.at(forward.q, row), forward.dim, &s.q[row * width]);
    quant::widen(task.op.dout.data, forward.dtype, task.at(task.op.dout, row), forward.dim, &s.dout[row * width]);
    quant::widen(forward.out.data, forward.dtype, task.at(forward.out, row), forward.dim, s.row.data());
    s.delta[row] = dot(&s.dout[row * width], s.row.data(), width);
    const int64_t head = task.kv_head * group + row % group;
    s.lse[row] = forward.lse[head * forward.tokens + task.first + row / group] * attention::kLog2E;
  }
  std::fill_n(s.dq.begin(), task.length * group * width, 0.0f);
}

void load_tile(const Task& task, int64_t tile, int64_t whole, Scratch& s) {
  const int64_t width = task.width(), count = std::min(kTile, task.length - tile);
  attention::load_rows(task.source(task.forward().v), tile, count, s.rows.data());
  std::fill(s.rows.begin() + count * width, s.rows.begin() + whole * width, 0.0f);
  attention::panels_across(s.rows.data(), whole, width, s.v_across.data());
  attention::load_rows(task.source(task.forward().k), tile, count, s.rows.data());
  attention::panels_across(s.rows.data(), whole, width, s.k_across.data());
  attention::panels_of(s.rows.data(), kTile, width, s.k.data());
}

// Rows of tokens begin to end against the loaded tile of `keys` keys.
void add_group(const Task& task, int64_t begin, int64_t end, int64_t tile, int64_t keys, Scratch& s) {
  const Attention& forward = task.forward();
  const int64_t width = task.width(), group = task.group(), row = begin * group, count = (end - begin) * group;
  const int64_t whole = attention::padded(keys);
  const float *q = &s.q[row * width], *dout = &s.dout[row * width];
  float *p = s.p.data(), *ds = s.ds.data();
  attention::multiply({q, width, 1}, {s.k_across.data(), kPanel, kPanel * width}, count, whole, width, p, kTile, false);
  attention::multiply({dout, width, 1}, {s.v_across.data(), kPanel, kPanel * width}, count, whole, width, ds, kTile, false);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t sees = std::min(keys, keys_seen(begin + r / group, task.length, forward.block) - tile);
    gradients(p + r * kTile, ds + r * kTile, sees, whole, forward.scale * attention::kLog2E, s.lse[row + r], s.delta[row + r],
              forward.scale);
  }
  attention::multiply({p, 1, kTile}, {dout, width, kPanel}, keys, width, count, s.dv.data(), width, true);
  attention::multiply({ds, 1, kTile}, {q, width, kPanel}, keys, width, count, s.dk.data(), width, true);
  attention::multiply({ds, kTile, 1}, {s.k.data(), kPanel, kPanel * kTile}, count, width, keys, &s.dq[row * width], width, true);
}

void run(const Task& task, Scratch& s) {
  const Attention& forward = task.forward();
  const int64_t width = task.width();
  load_queries(task, s);
  for (int64_t tile = 0; tile < task.length; tile += kTile) {
    const int64_t keys = std::min(kTile, task.length - tile);
    load_tile(task, tile, attention::padded(keys), s);
    std::fill(s.dk.begin(), s.dk.end(), 0.0f);
    std::fill(s.dv.begin(), s.dv.end(), 0.0f);
    const int64_t first = forward.block == kNoMask ? 0 : tile / forward.block * forward.block;
    for (int64_t t = first; t < task.length; t += task.tokens_at_once())
      add_group(task, t, std::min(task.length, t + task.tokens_at_once()), tile, keys, s);
    for (const auto& [sums, to] : {std::pair{&s.dk, &task.op.dk}, {&s.dv, &task.op.dv}})
      for (int64_t i = 0; i < keys; ++i)
        quant::narrow(&(*sums)[i * width], forward.dim, to->data, forward.dtype,
                      (task.first + tile + i) * to->token_stride + task.kv_head * to->head_stride);
  }
  for (int64_t row = 0; row < task.length * task.group(); ++row)
    quant::narrow(&s.dq[row * width], forward.dim, task.op.dq.data, forward.dtype, task.at(task.op.dq, row));
}

}  // namespace

void attention_backward_cpu(const AttentionBackward& op) {
  const Attention& forward = op.forward;
  if (forward.tokens == 0 || forward.heads == 0) return;
  auto task = [&](int64_t i) {
    const int64_t sequence = i / forward.kv_heads, first = forward.starts[sequence];
    return Task{op, first, forward.starts[sequence + 1] - first, i % forward.kv_heads};
  };
  const int64_t tasks = forward.sequences * forward.kv_heads;
  int64_t longest = 0;
  for (int64_t s = 0; s < forward.sequences; ++s) longest = std::max<int64_t>(longest, forward.starts[s + 1] - forward.starts[s]);
  std::atomic<int64_t> next{0};
  parallel_for(tasks, 1, [&](int64_t, int64_t) {
    if (next >= tasks) return;
    const Task any = task(0);
    Scratch scratch(longest * any.group(), any.tokens_at_once() * any.group(), any.width());
    for (int64_t i; (i = next++) < tasks;) run(task(i), scratch);
  });
}

}  // namespace eightfold
