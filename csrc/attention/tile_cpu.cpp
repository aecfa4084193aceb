#include "attention/tile_cpu.h"

#include <algorithm>
#include <cmath>

#include "core/threads.h"
#include "quant/fused_cpu.h"
#include "quant/span_cpu.h"

namespace eightfold::attention {
namespace {

constexpr int64_t kRows = 6;

template <int R>
EF_HD void multiply_block(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t k, float* c, int64_t ldc,
                          bool add) {
  float sum[R][kPanel];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kPanel; ++j) sum[r][j] = add ? c[r * ldc + j] : 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    const float* row = b + i * b_step;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float x = a[r * a_row + i * a_step];
      for (int j = 0; j < kPanel; ++j) sum[r][j] = std::fma(x, row[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < kPanel; ++j) c[r * ldc + j] = sum[r][j];
}

EF_CPU_CLONES void multiply_panel(const float* a, int64_t row, int64_t step, const float* b, int64_t b_step, int64_t m, int64_t k, float* c,
                                  int64_t ldc, bool add) {
  for (; m >= kRows; m -= kRows, a += kRows * row, c += kRows * ldc) multiply_block<kRows>(a, row, step, b, b_step, k, c, ldc, add);
  switch (m) {
    case 5: return multiply_block<5>(a, row, step, b, b_step, k, c, ldc, add);
    case 4: return multiply_block<4>(a, row, step, b, b_step, k, c, ldc, add);
    case 3: return multiply_block<3>(a, row, step, b, b_step, k, c, ldc, add);
    case 2: return multiply_block<2>(a, row, step, b, b_step, k, c, ldc, add);
    case 1: return multiply_block<1>(a, row, step, b, b_step, k, c, ldc, add);
  }
}

}  // namespace

void multiply(const Left& a, const Right& b, int64_t m, int64_t n, int64_t k, float* c, int64_t ldc, bool add) {
  for (int64_t at = 0; at < n; at += kPanel)
    multiply_panel(a.x, a.row, a.step, b.x + at / kPanel * b.panel, b.step, m, k, c + at, ldc, add);
}

void load_rows(const Source& source, int64_t first, int64_t count, float* out) {
  const int64_t width = padded(source.dim), run = source.pages ? source.page_size : first + count;
  for (int64_t i = first; i < first + count;) {
    const int64_t page = source.pages ? source.pages[i / run] : 0, end = std::min(first + count, (i / run + 1) * run);
    for (; i < end; ++i, out += width) {
      const int64_t at = page * source.page_stride + (source.pages ? i % run : i) * source.row_stride;
      if (source.dtype == DType::e4m3) {
        quant::decode(static_cast<const uint8_t*>(source.data) + at, source.dim, source.scales[at / source.dim], out);
        quant::round_span(out, DType::bf16, source.dim);
      } else {
        quant::widen(source.data, source.dtype, at, source.dim, out);
      }
    }
  }
}

void panels_of(const float* rows, int64_t count, int64_t width, float* out) {
  for (int64_t c = 0; c < width; c += kPanel)
    for (int64_t r = 0; r < count; ++r, out += kPanel) std::copy_n(rows + r * width + c, kPanel, out);
}

// In blocks of 4 x 4, which compilers turn in registers.
EF_CPU_CLONES void panels_across(const float* rows, int64_t count, int64_t width, float* out) {
  for (int64_t r = 0; r < count; r += kPanel)
    for (int64_t c = 0; c < width; c += 4, out += 4 * kPanel)
      for (int64_t j = 0; j < kPanel; j += 4) {
        float turned[4][4];
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b) turned[b][a] = rows[(r + j + a) * width + c + b];
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b)
#pragma GCC unroll 4
          for (int a = 0; a < 4; ++a) out[b * kPanel + j + a] = turned[b][a];
      }
}

}  // namespace eightfold::attention
