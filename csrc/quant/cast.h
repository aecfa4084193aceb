// Casts between bf16 or fp32 and E4M3 with a scale a group, alone (fused with a norm or an activation: norm.h, swiglu.h).
//
// Maths (core/fp8.h, DESIGN "Numbers"): scale = max(amax, 1e-10) / 448, code = RNE(saturate(x / scale)), the same bytes on the
// CPU, on CUDA and in reference/quant.py. A tail group is a group of the elements that exist.
//
// Data movement: every cast reads its input once and writes codes and scales once. Bytes an element, from bf16:
//
//   quantize 1x128, 128x1   2 + 1 + 4/128      quantize 1x16   2 + 1 + 4/16      quantize 128x128   2 + 1
//   quantize_both           2 + 1 + 1 + 8/128  (two casts would move 6 + 8/128)
//   requantize, transpose   1 + 1              dequantize      1 + 2
//   quantize_stacked (weights, square groups, also transposed: a square's scale is that of its transpose) 2 + 1
//   quantize_beside (gradients) as quantize_both, or as 1x128 where columns are not wanted
//
// At the 3.0 TB/s an H100 copies with, [16384, 8192] takes 134 us (1x128), 179 us (both). Arithmetic comes close behind: a
// quotient, a maximum and a conversion an element and output, so the GPU divides through a reciprocal a group that is proven
// to give the bytes of IEEE division (core/fp8_vector.cuh).
//
// GPU: one kernel shape, 128 x 128 tiles held in registers (tile_cast.cuh). CPU: rows, or bands of 128 rows, over the threads.
//
// Limits: last dimension contiguous, any row stride; 16-byte accesses where address, stride and width allow them, else scalar
// ones with the same bytes. Column codes: ld a multiple of 16, base 16-byte aligned. Row scales: ld a multiple of 4. Sizes may
// be 0. Offsets are 64-bit; a tensor may have 2^31 - 1 tiles.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace eightfold::quant {

enum class Group { row128, row16, col128, square };

struct Input {  // element (r, c) at data[r * ld + c]; bf16 or f32
  const void* data;
  DType dtype;
  int64_t rows, cols, ld;
};

// Where a quantised tensor goes. Rows and square: codes dense row-major (code_ld unused). Columns: code (r, c) at c * code_ld + r.
// Scale of group g: rows (r, g) at g * scale_ld + r, columns (g, c) at g * scale_ld + c, square row-major dense.
struct Quantized {
  uint8_t* codes;
  float* scales;
  int64_t code_ld, scale_ld;
};

// Several matrices of one dtype as one: stacked (one below the other, equally wide) or beside each other (equally high). All but the
// last are a multiple of 128 high (stacked) or wide (beside), so that no group and no tile spans two. Part i begins at row or column
// first[i].
constexpr int kMostParts = 8;
struct Parts {
  const void* data[kMostParts];
  int64_t ld[kMostParts], first[kMostParts];
  int count;
  DType dtype;
  int64_t rows, cols;  // of the whole
};

struct RowCodes {  // codes (1, 128): code (r, c) at r * ld + c, scale (r, g) at g * scale_ld + r
  const uint8_t* codes;
  const float* scales;
  int64_t rows, cols, ld, scale_ld;
};

struct AnyCodes {  // codes of any group and layout, for dequantize
  const uint8_t* codes;
  int64_t rows, cols, row_stride, col_stride;  // one of the strides is 1
  const float* scales;
  int64_t group_rows, group_cols, scale_row_stride, scale_col_stride;
};

void quantize_cpu(const Input& x, Group group, const Quantized& out, bool power_of_two);
void quantize_both_cpu(const Input& x, const Quantized& rows, const Quantized& cols, bool power_of_two);
void quantize_stacked_cpu(const Parts& x, const Quantized& out, bool transposed);
void quantize_beside_cpu(const Parts& x, const Quantized& rows, const Quantized& cols);  // cols.codes null: not wanted
void requantize_cpu(const RowCodes& x, const Quantized& cols, bool power_of_two);
void transpose_codes_cpu(const uint8_t* codes, int64_t rows, int64_t cols, int64_t ld, uint8_t* out);  // out [cols, rows] dense
void dequantize_cpu(const AnyCodes& x, void* out, DType dtype);                                        // out dense, f32 or bf16

void quantize_sm90(const Input& x, Group group, const Quantized& out, bool power_of_two, void* stream);
void quantize_both_sm90(const Input& x, const Quantized& rows, const Quantized& cols, bool power_of_two, void* stream);
void quantize_stacked_sm90(const Parts& x, const Quantized& out, bool transposed, void* stream);
void quantize_beside_sm90(const Parts& x, const Quantized& rows, const Quantized& cols, void* stream);
void requantize_sm90(const RowCodes& x, const Quantized& cols, bool power_of_two, void* stream);
void transpose_codes_sm90(const uint8_t* codes, int64_t rows, int64_t cols, int64_t ld, uint8_t* out, void* stream);
void dequantize_sm90(const AnyCodes& x, void* out, DType dtype, void* stream);

}  // namespace eightfold::quant
