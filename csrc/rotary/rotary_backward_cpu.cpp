// A task takes a tile of 128 x 128: its heads are rotated a row at a time, then cast along the rows and the columns.
#include <algorithm>
#include <vector>

#include "core/fp8.h"
#include "core/threads.h"
#include "quant/fused_cpu.h"
#include "rotary/rotary.h"
#include "rotary/rotary_backward.h"

namespace eightfold {
namespace {

constexpr int64_t kTile = quant::kSpanTile, kBand = 8, kBands = kTile / kBand;

// Columns [col, col + n) of a row of one part; `head` is room for a head.
void load_row(const RotaryBackward& op, int part, int64_t row, int64_t col, int64_t n, float* head, float* out) {
  const RotaryBackward::Gradient& g = op.parts[part];
  const int64_t batch = row / op.tokens, token = row % op.tokens, table = batch * op.table_batch_stride + token * (op.dim / 2);
  const int64_t from = batch * g.batch_stride + token * g.token_stride;
  for (int64_t at = col; at < col + n;) {
    const int64_t h = at / op.dim, within = at % op.dim, count = std::min(op.dim - within, col + n - at);
    quant::widen(g.data, op.dtype, from + h * g.head_stride, op.dim, head);
    if (part < 2) {
      rotate_head(head, op.cos + table, op.sin + table, op.dim / 2, -1.0f);
      quant::round_span(head, op.dtype, op.dim);
    }
    std::copy_n(head + within, count, out + at - col);
    at += count;
  }
}

EF_CPU_CLONES void sum_tile(const float* tile, int64_t rows, int64_t cols, float* sums) {
  float bands[kBands][kTile] = {};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) bands[r / kBand][c] = r % kBand ? bands[r / kBand][c] + tile[r * kTile + c] : tile[r * kTile + c];
  for (int64_t c = 0; c < cols; ++c) {
    float sum = bands[0][c] + bands[1][c];
    for (int64_t b = 2; b < kBands; b += 2) sum += bands[b][c] + bands[b + 1][c];
    sums[c] = sum;
  }
}

void fold_sums(const float* partials, int64_t tiles, int64_t cols, float* sums) {
  const int64_t each = (tiles + kSumRuns - 1) / kSumRuns;
  for (int64_t c = 0; c < cols; ++c) {
    float total = 0.0f;
    for (int64_t run = 0; run < kSumRuns; ++run) {
      float sum = 0.0f;
      for (int64_t t = run * each; t < std::min(tiles, (run + 1) * each); ++t) sum += partials[t * cols + c];
      total = run ? total + sum : sum;
    }
    sums[c] = total;
  }
}

}  // namespace

void rotary_backward_quantize_cpu(const RotaryBackward& op) {
  const int64_t rows = op.rows(), cols = op.cols(), across = (cols + kTile - 1) / kTile, down = (rows + kTile - 1) / kTile;
  parallel_for(down * across, 2, [&](int64_t begin, int64_t end) {
    std::vector<float> head(op.dim), tile(kTile * kTile);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * kTile, col = i % across * kTile;
      const int64_t height = std::min(kTile, rows - row), width = std::min(kTile, cols - col);
      const int part = col >= op.first(2) ? 2 : col >= op.first(1);
      for (int64_t r = 0; r < height; ++r) {
        float* values = tile.data() + r * kTile;
        load_row(op, part, row + r, col - op.first(part), width, head.data(), values);
        quant::cast_row(values, row + r, col, width, cols, op.row_codes);
      }
      if (op.col_codes.codes) quant::cast_tile_columns(tile.data(), row, col, height, width, op.col_codes);
      if (op.sums) sum_tile(tile.data(), height, width, op.partials + row / kTile * cols + col);
    }
  });
  if (op.sums) fold_sums(op.partials, down, cols, op.sums);
}

}  // namespace eightfold
