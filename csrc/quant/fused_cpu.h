// What the fused casts add to span_cpu.h on the CPU: rounding through the tensor's dtype, and casts addressed by (row, col).
#pragma once

#include <algorithm>

#include "quant/cast.h"
#include "quant/span_cpu.h"

namespace eightfold::quant {

constexpr int64_t kGroup = kSpanTile;

inline int64_t groups_of(int64_t n) { return (n + kGroup - 1) / kGroup; }

// To `dtype` and back, so that a fused cast sees what an unfused one would read from memory.
void round_span(float* values, DType dtype, int64_t n);

// Columns [col, col + n) of a row of saved codes; col is a multiple of 128.
inline void decode_row(const RowCodes& x, int64_t row, int64_t col, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kGroup)
    decode(x.codes + row * x.ld + col + i, std::min(kGroup, n - i), x.scales[row + (col + i) / kGroup * x.scale_ld], out + i);
}

// Columns [col, col + n) of a row of codes that are `ld` apart; col is a multiple of 128.
inline void cast_row(const float* values, int64_t row, int64_t col, int64_t n, int64_t ld, const Quantized& out) {
  encode_groups(values, n, kGroup, false, out.codes + row * ld + col, out.scales + row + col / kGroup * out.scale_ld, out.scale_ld);
}

// A tile of rows x cols <= 128 x 128 at (row, col), element (r, c) at tile[r * 128 + c]; row is a multiple of 128.
inline void cast_tile_columns(const float* tile, int64_t row, int64_t col, int64_t rows, int64_t cols, const Quantized& out) {
  cast_columns(tile, rows, cols, false, out.codes + col * out.code_ld + row, out.code_ld, out.scales + row / kGroup * out.scale_ld + col);
}

}  // namespace eightfold::quant
