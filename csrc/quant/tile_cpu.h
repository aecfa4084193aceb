// CPU building blocks of the fused casts: rows in and out of fp32, and the two group directions.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "quant/views.h"

namespace eightfold {

// n elements of `x` (bf16 or f32) from element `offset` on.
void load_row(const void* x, DType dtype, int64_t offset, int64_t n, float* out);
// n codes of one row, dequantised in fp32; `scales` of group i at scales[i * scale_ld].
void load_codes(const uint8_t* codes, const float* scales, int64_t scale_ld, int64_t n, float* out);
void store_row(const float* values, DType dtype, int64_t offset, int64_t n, void* y);
// Rounds through `dtype` and back, so that a fused cast sees what an unfused one would read from memory.
void round_row(float* values, DType dtype, int64_t n);

// Columns [col, col + n) of row `row` of a [*, cols] tensor; col is a multiple of 128.
void quantize_row(const float* values, int64_t row, int64_t col, int64_t n, int64_t cols, const RowCodes& out);
// A tile of rows x cols <= 128 x 128 at (row, col), element (r, c) at tile[r * 128 + c]; row is a multiple of 128.
void quantize_columns(const float* tile, int64_t row, int64_t col, int64_t rows, int64_t cols, const ColCodes& out);

}  // namespace eightfold
