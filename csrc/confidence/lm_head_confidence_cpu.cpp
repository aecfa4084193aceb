// Tiles of the vocabulary over threads: a thread multiplies all rows by a tile, then takes from the logits what the tile leaves. Rows that
// are not asked for are left out of the product.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "confidence/lm_head_confidence.h"
#include "core/threads.h"

namespace eightfold {
namespace {

constexpr int64_t kTile = 1024;     // columns; a multiple of 128
constexpr int64_t kMostRows = 256;  // in a pass: their logits of a tile are 1 MiB
constexpr int kSums = 16;           // that a tile's exponentials go to in turn
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLog2E = 1.44269504f;

struct Partial {
  float max, sum, score, logit;
  int64_t id;
};

EF_CPU_CLONES bool holds_nan(const float* x, int64_t n) {
  int32_t nan = 0;
  for (int64_t v = 0; v < n; ++v) nan |= x[v] != x[v];
  return nan != 0;
}

EF_CPU_CLONES float largest(const float* x, int64_t n) {
  float max = -kInfinity;
  for (int64_t v = 0; v < n; ++v) max = x[v] > max ? x[v] : max;
  return max;
}

EF_CPU_CLONES float sum_of_exponentials(const float* x, int64_t n, float max) {
  float sums[kSums] = {};
  int64_t v = 0;
  for (; v + kSums <= n; v += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += exp2_poly((x[v + i] - max) * kLog2E);
  for (; v < n; ++v) sums[v % kSums] += exp2_poly((x[v] - max) * kLog2E);
  float sum = 0.0f;
  for (int i = 0; i < kSums; ++i) sum += sums[i];
  return sum;
}

// By which the tokens [begin, begin + n) are ranked; begin is a multiple of 4, n at most kTile.
EF_CPU_CLONES void make_scores(const float* x, int64_t begin, int64_t n, float temperature, int64_t seed, int64_t position, float* scores) {
  uint32_t words[kTile];
  const PhiloxKeys keys(static_cast<uint64_t>(seed));
  const uint32_t low = static_cast<uint32_t>(position), high = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
  const uint32_t block = static_cast<uint32_t>(begin / 4), blocks = static_cast<uint32_t>((n + 3) / 4);
  for (uint32_t i = 0; i < blocks; ++i) {
    const PhiloxWords drawn = philox4x32(block + i, 0, low, high, keys);
    for (int j = 0; j < 4; ++j) words[4 * i + j] = drawn.w[j];
  }
  for (int64_t i = 0; i < n; ++i) scores[i] = confidence_score(x[i], temperature, words[i]);
}

// What a tile leaves of the op's row `row`.
Partial partial_of(const LmHeadConfidence& op, int64_t row, const float* x, int64_t begin, int64_t n) {
  Partial p{largest(x, n), 0.0f, 0.0f, 0.0f, 0};
  if (p.max == kInfinity || holds_nan(x, n)) {
    p.sum = kNan;
  } else if (p.max > -kInfinity) {
    p.sum = sum_of_exponentials(x, n, p.max);
  }
  const float temperature = op.temperatures == nullptr ? 0.0f : op.temperatures[row];
  int64_t best;
  if (confidence_is_drawn(temperature)) {
    float scores[kTile];
    make_scores(x, begin, n, temperature, op.seeds[row], op.positions[row], scores);
    best = std::max_element(scores, scores + n) - scores;
    p.score = scores[best];
  } else {
    best = std::find(x, x + n, p.max) - x;
    best = best < n ? best : 0;  // all are NaN
    p.score = p.max;
  }
  p.logit = x[best];
  p.id = begin + best;
  return p;
}

// The rows of the product that are asked for, one below the other: its operand's rows are copied unless all are.
struct Gathered {
  std::vector<int64_t> rows;
  std::vector<uint8_t> elements;
  std::vector<float> scales;
  LmHeadConfidence op;  // with m and a of those rows

  explicit Gathered(const LmHeadConfidence& whole) : op(whole) {
    for (int64_t r = 0; r < whole.rows; ++r)
      if (whole.active == nullptr || whole.active[r] != 0) rows.push_back(r);
    const int64_t count = static_cast<int64_t>(rows.size());
    op.plain.m = op.quantized.m = count;
    if (count == whole.rows) return;
    const int64_t size = whole.codes ? 1 : whole.plain.type == DType::f32 ? 4 : 2, k = whole.codes ? whole.quantized.k : whole.plain.k;
    const void* from = whole.codes ? whole.quantized.a : whole.plain.a;
    const int64_t ld = whole.codes ? whole.quantized.lda : whole.plain.lda, groups = (k + 127) / 128, ld_scales = (count + 3) / 4 * 4;
    elements.resize(count * k * size);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(elements.data() + i * k * size, static_cast<const uint8_t*>(from) + rows[i] * ld * size, k * size);
    op.plain.a = op.quantized.a = elements.data();
    op.plain.lda = op.quantized.lda = k;
    if (!whole.codes) return;
    scales.resize(ld_scales * groups);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < count; ++i) scales[g * ld_scales + i] = whole.quantized.a_scales[g * whole.quantized.ld_a_scales + rows[i]];
    op.quantized.a_scales = scales.data();
    op.quantized.ld_a_scales = ld_scales;
  }
};

// Logits of `rows` gathered rows from `first` on, columns [begin, begin + n), to out [rows, kTile].
void multiply(const LmHeadConfidence& op, int64_t first, int64_t rows, int64_t begin, int64_t n, float* out) {
  if (op.codes) {
    Fp8GemmArgs args = op.quantized;
    args.a += first * args.lda;
    args.a_scales += first;
    args.b += begin * args.ldb;
    args.b_scales += begin / 128 * args.ld_b_scales;
    args.m = rows, args.n = n;
    args.out = out, args.out_type = DType::f32, args.ldo = kTile;
    return fp8_gemm_cpu(args);
  }
  GemmArgs args = op.plain;
  const int64_t size = args.type == DType::f32 ? 4 : 2;
  args.a = static_cast<const uint8_t*>(args.a) + first * args.lda * size;
  args.b = static_cast<const uint8_t*>(args.b) + begin * args.ldb * size;
  args.m = rows, args.n = n;
  args.out = out, args.out_type = DType::f32, args.ldo = kTile;
  gemm_cpu(args);
}

void fold(const LmHeadConfidence& op, int64_t row, const Partial* partials, int64_t tiles) {
  Partial best = partials[0];
  float max = -kInfinity;
  for (int64_t t = 0; t < tiles; ++t) {
    max = std::max(max, partials[t].max);
    if (partials[t].score > best.score) best = partials[t];
  }
  double sum = 0.0;
  for (int64_t t = 0; t < tiles; ++t)
    sum += partials[t].max == max ? partials[t].sum : partials[t].sum * std::exp(double{partials[t].max} - max);
  const bool exists = sum > 0.0 && (op.temperatures == nullptr || confidence_temperature_valid(op.temperatures[row]));
  op.ids[row] = exists ? best.id : -1;
  op.confidence[row] = exists ? static_cast<float>(std::exp(double{best.logit} - max) / sum) : kNan;
}

}  // namespace

void lm_head_confidence_cpu(const LmHeadConfidence& whole) {
  const Gathered gathered(whole);
  const LmHeadConfidence& op = gathered.op;
  const int64_t count = static_cast<int64_t>(gathered.rows.size()), tiles = (op.vocabulary + kTile - 1) / kTile;
  std::fill(op.ids, op.ids + op.rows, -1);
  std::fill(op.confidence, op.confidence + op.rows, -kInfinity);
  std::vector<int64_t> forbidden(op.forbidden, op.forbidden + op.forbidden_count);
  std::sort(forbidden.begin(), forbidden.end());
  std::vector<Partial> partials(std::min(count, kMostRows) * tiles);
  for (int64_t first = 0; first < count; first += kMostRows) {
    const int64_t rows = std::min(kMostRows, count - first);
    parallel_for(tiles, 1, [&](int64_t tile, int64_t end) {
      std::vector<float> logits(rows * kTile);
      for (; tile < end; ++tile) {
        const int64_t begin = tile * kTile, n = std::min(kTile, op.vocabulary - begin);
        multiply(op, first, rows, begin, n, logits.data());
        for (auto at = std::lower_bound(forbidden.begin(), forbidden.end(), begin); at != forbidden.end() && *at < begin + n; ++at)
          for (int64_t i = 0; i < rows; ++i) logits[i * kTile + *at - begin] = -kInfinity;
        for (int64_t i = 0; i < rows; ++i)
          partials[i * tiles + tile] = partial_of(op, gathered.rows[first + i], logits.data() + i * kTile, begin, n);
      }
    });
    for (int64_t i = 0; i < rows; ++i) fold(op, gathered.rows[first + i], partials.data() + i * tiles, tiles);
  }
}

}  // namespace eightfold
