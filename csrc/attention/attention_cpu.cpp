// A task is a KV head of a sequence and a block of its query tokens, with all query heads that share that head's keys. Rows are ordered
// token by token, head by head. Blocks and groups of 16 tokens are counted from the sequence's start, wherever its rows begin.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/attention.h"
#include "attention/tile_cpu.h"
#include "core/fp8.h"
#include "core/threads.h"
#include "quant/span_cpu.h"

namespace eightfold {
namespace {

using attention::kPanel;
using attention::Left;
using attention::power;
using attention::Right;

constexpr int64_t kTile = kAttentionTile, kChunk = kAttentionChunk;
constexpr int64_t kGroup = 16;       // tokens of which each sees its own number of a tile's keys
constexpr int64_t kBlockRows = 192;  // rows that share the loading of a tile
constexpr int64_t kScoreRows = 48;   // rows whose scores stay in the first-level cache

// One tile of a row: scores s[0, n) become p, m and l are brought up to date. Returns the factor of what came before.
EF_CPU_CLONES float soften(float* s, int64_t n, float factor, bool to_bf16, float* m, float* l) {
  const int64_t whole = attention::padded(n);  // whole panels: p of what is added is 0
  for (int64_t i = 0; i < whole; ++i) s[i] = i < n ? s[i] * factor : -std::numeric_limits<float>::infinity();
  float lanes[kPanel], max = *m;
  for (int64_t j = 0; j < kPanel; ++j) lanes[j] = s[j];
  for (int64_t i = kPanel; i < whole; i += kPanel)
    for (int64_t j = 0; j < kPanel; ++j) lanes[j] = s[i + j] > lanes[j] ? s[i + j] : lanes[j];
  for (int64_t j = 0; j < kPanel; ++j) max = lanes[j] > max ? lanes[j] : max;
  for (int64_t i = 0; i < whole; ++i) s[i] = power(s[i] - max);
  for (int64_t j = 0; j < kPanel; ++j) lanes[j] = 0.0f;
  for (int64_t i = 0; i < whole; i += kPanel)
    for (int64_t j = 0; j < kPanel; ++j) lanes[j] += s[i + j];
  float sum = 0.0f;
  for (float lane : lanes) sum += lane;
  if (to_bf16)
    for (int64_t i = 0; i < whole; ++i) s[i] = bf16_to_float(float_to_bf16(s[i]));
  const float before = power(*m - max);
  *l = *l * before + sum;
  *m = max;
  return before;
}

EF_CPU_CLONES void multiply_by(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

EF_CPU_CLONES void divide_by(float* x, int64_t n, float divisor) {
  for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
}

EF_CPU_CLONES void add_scaled(float* x, float a, const float* y, float b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * a + y[i] * b;
}

// The rows of q of one sequence and KV head, and the keys they may see.
struct Queries {
  AttentionRows q, out;
  DType dtype;
  float* lse;                             // of the first head, may be null
  int64_t lse_row;                        // from head to head
  int64_t first, rows, position, length;  // rows of q and out from `first`; the first one's place among the `length` keys
  int64_t head, group, dim;               // query heads head to head + group
  attention::Source k, v;
  float factor;
  int64_t mask;  // its block

  int64_t block() const { return std::clamp(kBlockRows / group / kGroup * kGroup, kGroup, kTile); }
  int64_t sees(int64_t token) const { return keys_seen(token, length, mask); }
  int64_t sees(int64_t token, int64_t tile) const { return std::min(kTile, sees(token) - tile); }
  // The first token that sees a key.
  int64_t first_to_see(int64_t key) const { return mask == kNoMask ? 0 : key / mask * mask; }
};

struct Scratch {
  std::vector<float> q, rows, k, v, scores, o, out, m, l, max, sum;

  Scratch(int64_t block, int64_t group, int64_t width)
      : q(block * group * width),
        rows(kTile * width),
        k(kTile * width),
        v(kTile * width),
        scores(std::max(kScoreRows, kGroup * group) * kTile),
        o(q.size()),
        out(q.size()),
        m(block * group),
        l(m.size()),
        max(m.size()),
        sum(m.size()) {}
};

// Tokens begin to end of a block whose first is `base`, against the loaded tile: all its keys, or, near the diagonal, as many as each sees.
void attend(const Queries& op, int64_t base, int64_t begin, int64_t end, int64_t tile, Scratch& s) {
  const int64_t width = attention::padded(op.dim), row = (begin - base) * op.group, count = (end - begin) * op.group;
  const int64_t most = op.sees(end - 1, tile), columns = attention::padded(most);
  attention::multiply({&s.q[row * width], width, 1}, {s.k.data(), kPanel, kPanel * width}, count, columns, width, s.scores.data(), kTile,
                      false);
  for (int64_t r = 0; r < count; ++r) {
    float* scores = &s.scores[r * kTile];
    const int64_t n = op.sees(begin + r / op.group, tile);
    const float before = soften(scores, n, op.factor, op.dtype == DType::bf16, &s.m[row + r], &s.l[row + r]);
    multiply_by(&s.o[(row + r) * width], width, before);
  }
  // Keys that all see, then each token's own: zeros times what it does not see would let a NaN through.
  const int64_t shared = op.sees(begin, tile);
  const Right v{s.v.data(), kPanel, kPanel * kTile};
  attention::multiply({s.scores.data(), kTile, 1}, v, count, width, shared, &s.o[row * width], width, true);
  for (int64_t t = begin; t < end && shared < most; ++t) {
    const Left p{&s.scores[(t - begin) * op.group * kTile + shared], kTile, 1};
    attention::multiply(p, {v.x + shared * kPanel, v.step, v.panel}, op.group, width, op.sees(t, tile) - shared,
                        &s.o[(t - base) * op.group * width], width, true);
  }
}

void load_tile(const Queries& op, int64_t tile, Scratch& s) {
  const int64_t width = attention::padded(op.dim), count = std::min(kTile, op.length - tile), whole = attention::padded(count);
  attention::load_rows(op.k, tile, count, s.rows.data());
  std::fill(s.rows.begin() + count * width, s.rows.begin() + whole * width, 0.0f);
  attention::panels_across(s.rows.data(), whole, width, s.k.data());
  attention::load_rows(op.v, tile, count, s.rows.data());
  attention::panels_of(s.rows.data(), kTile, width, s.v.data());
}

void fold(Scratch& s, int64_t row, int64_t width, bool first) {
  float *out = &s.out[row * width], *o = &s.o[row * width];
  if (first) {
    std::copy_n(o, width, out);
    s.max[row] = s.m[row], s.sum[row] = s.l[row];
    return;
  }
  const float max = std::max(s.max[row], s.m[row]), a = power(s.max[row] - max), b = power(s.m[row] - max);
  add_scaled(out, a, o, b, width);
  s.sum[row] = s.sum[row] * a + s.l[row] * b;
  s.max[row] = max;
}

void write_row(const Queries& op, Scratch& s, int64_t row, int64_t token) {
  const int64_t width = attention::padded(op.dim), at = op.first + token - op.position, head = row % op.group;
  const float sum = s.sum[row];
  divide_by(&s.out[row * width], op.dim, sum);
  quant::narrow(&s.out[row * width], op.dim, op.out.data, op.dtype, at * op.out.token_stride + (op.head + head) * op.out.head_stride);
  if (op.lse) op.lse[head * op.lse_row + at] = sum == sum ? (s.max[row] + log2_poly(sum)) * attention::kLn2 : sum;
}

// Tokens begin to end, places in the sequence, of one block.
void run_block(const Queries& op, int64_t begin, int64_t end, Scratch& s) {
  const int64_t width = attention::padded(op.dim), sees = op.sees(end - 1);
  for (int64_t t = begin; t < end; ++t)
    for (int64_t h = 0; h < op.group; ++h)
      quant::widen(op.q.data, op.dtype, (op.first + t - op.position) * op.q.token_stride + (op.head + h) * op.q.head_stride, op.dim,
                   &s.q[((t - begin) * op.group + h) * width]);
  for (int64_t chunk = 0; chunk < sees; chunk += kChunk) {
    const int64_t from = std::max(begin, op.first_to_see(chunk));
    std::fill(s.m.begin(), s.m.end(), -std::numeric_limits<float>::infinity());
    std::fill(s.l.begin(), s.l.end(), 0.0f);
    std::fill(s.o.begin(), s.o.end(), 0.0f);
    for (int64_t tile = chunk; tile < std::min(chunk + kChunk, sees); tile += kTile) {
      load_tile(op, tile, s);
      for (int64_t t = std::max(from, op.first_to_see(tile)); t < end;) {
        const bool all = op.sees(t, tile) == op.sees(end - 1, tile);
        const int64_t next = all ? t + std::max(kGroup, kScoreRows / op.group) : (t / kGroup + 1) * kGroup;
        attend(op, begin, t, std::min(end, next), tile, s);
        t = next;
      }
    }
    for (int64_t row = (from - begin) * op.group; row < (end - begin) * op.group; ++row) fold(s, row, width, chunk == 0);
  }
  for (int64_t row = 0; row < (end - begin) * op.group; ++row) write_row(op, s, row, begin + row / op.group);
}

struct Task {
  int64_t sequence, kv_head, block;
};

// of(sequence, kv_head): its Queries. Tasks go to whoever is free, the longest of a sequence first: no result depends on who it is.
template <class Of>
void run_all(int64_t sequences, int64_t kv_heads, int64_t group, int64_t dim, const Of& of) {
  std::vector<Task> tasks;
  for (int64_t s = 0; s < sequences; ++s) {
    const Queries op = of(s, 0);
    if (op.rows == 0) continue;
    for (int64_t block = (op.position + op.rows - 1) / op.block(); block >= op.position / op.block(); --block)
      for (int64_t h = 0; h < kv_heads; ++h) tasks.push_back({s, h, block});
  }
  std::atomic<size_t> next{0};
  parallel_for(static_cast<int64_t>(tasks.size()), 1, [&](int64_t, int64_t) {
    if (next >= tasks.size()) return;
    Queries op = of(tasks[0].sequence, 0);
    Scratch scratch(op.block(), group, attention::padded(dim));
    for (size_t i; (i = next++) < tasks.size();) {
      op = of(tasks[i].sequence, tasks[i].kv_head);
      const int64_t begin = tasks[i].block * op.block();
      run_block(op, std::max(begin, op.position), std::min(begin + op.block(), op.position + op.rows), scratch);
    }
  });
}

}  // namespace

void attention_cpu(const Attention& op) {
  if (op.tokens == 0 || op.heads == 0) return;
  const int64_t group = op.heads / op.kv_heads;
  auto source = [&](const AttentionRows& x, int64_t first, int64_t kv_head) {
    const auto* data = static_cast<const char*>(x.data);
    const int64_t at = first * x.token_stride + kv_head * x.head_stride;
    return attention::Source{data + at * (op.dtype == DType::f32 ? 4 : 2), op.dtype, op.dim, x.token_stride, nullptr, 0, 0, nullptr};
  };
  run_all(op.sequences, op.kv_heads, group, op.dim, [&](int64_t s, int64_t kv_head) {
    const int64_t first = op.starts[s], rows = op.starts[s + 1] - first, head = kv_head * group;
    return Queries{op.q,
                   op.out,
                   op.dtype,
                   op.lse ? op.lse + head * op.tokens : nullptr,
                   op.tokens,
                   first,
                   rows,
                   0,
                   rows,
                   head,
                   group,
                   op.dim,
                   source(op.k, first, kv_head),
                   source(op.v, first, kv_head),
                   op.scale * attention::kLog2E,
                   op.block};
  });
}

void paged_attention_cpu(const PagedAttention& op) {
  if (op.tokens == 0 || op.heads == 0) return;
  const int64_t group = op.heads / op.kv_heads, head_stride = op.page_size * op.dim;
  const int64_t bytes = op.page_dtype == DType::f32 ? 4 : op.page_dtype == DType::bf16 ? 2 : 1;
  auto source = [&](const void* pages, const float* scales, int64_t s, int64_t kv_head) {
    const auto* data = static_cast<const char*>(pages) + kv_head * head_stride * bytes;
    return attention::Source{data,
                             op.page_dtype,
                             op.dim,
                             op.dim,
                             op.pages + s * op.most_pages,
                             op.page_size,
                             op.kv_heads * head_stride,
                             scales ? scales + kv_head * op.page_size : nullptr};
  };
  run_all(op.sequences, op.kv_heads, group, op.dim, [&](int64_t s, int64_t kv_head) {
    const int64_t first = op.starts[s], length = op.lengths[s], rows = length > 0 ? op.starts[s + 1] - first : 0;
    return Queries{op.q,
                   op.out,
                   op.dtype,
                   nullptr,
                   0,
                   first,
                   rows,
                   length - rows,
                   length,
                   kv_head * group,
                   group,
                   op.dim,
                   source(op.k_pages, op.k_scales, s, kv_head),
                   source(op.v_pages, op.v_scales, s, kv_head),
                   op.scale * attention::kLog2E,
                   op.block};
  });
}

}  // namespace eightfold
