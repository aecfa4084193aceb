// What attention on the CPU is made of: rows widened to fp32, tiles laid out in panels, and one product whose sums are chains of fused
// multiply-adds in ascending order, so that an element's bits depend on its own row and column alone.
//
// A panel is 16 columns of a right operand, its steps below each other: a kernel of 6 rows by 16 columns then reads one stream and keeps
// 12 (or, with 512-bit registers, 6) accumulators. Measured: 95 of 2 x 8 x 2 x 3.4 = 109 GFLOP/s on a Zen 3 core.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "core/exp2log2.h"

namespace eightfold::attention {

constexpr int64_t kPanel = 16;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

inline int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

struct Left {  // element (m, k) at x[m * row + k * step]
  const float* x;
  int64_t row, step;
};

struct Right {  // element (k, n) at x[n / 16 * panel + k * step + n % 16]
  const float* x;
  int64_t step, panel;
};

// c[m][n] = (add ? c : 0) + sum over ascending k of a[m][k] b[k][n]; n a multiple of 16.
void multiply(const Left& a, const Right& b, int64_t m, int64_t n, int64_t k, float* c, int64_t ldc, bool add);

// 2^x for x <= 0 and somewhat above: 0 below -126, NaN for NaN.
EF_HD float power(float x) {
  const float p = exp2_poly(x), kept = x < -126.0f ? 0.0f : p;
  return x == x ? kept : x;
}

// Keys or values of a sequence and head: row i lies i * row_stride from data or, where there are pages, in the page of its number.
struct Source {
  const void* data;
  DType dtype;
  int64_t dim, row_stride;
  const int32_t* pages;  // null: packed
  int64_t page_size, page_stride;
  const float* scales;  // of E4M3 codes, one a row; a page's are page_stride / dim from the last one's
};

// Rows first to first + count to out[row * padded(dim) + i]; what is past dim stays as it is.
void load_rows(const Source& source, int64_t first, int64_t count, float* out);

// rows[row * width + i] into panels of 16 columns i, row by row (Right: step 16, panel 16 * count), ...
void panels_of(const float* rows, int64_t count, int64_t width, float* out);
// ... or into panels of 16 rows, column by column (Right: step 16, panel 16 * width); count a multiple of 16.
void panels_across(const float* rows, int64_t count, int64_t width, float* out);

}  // namespace eightfold::attention
