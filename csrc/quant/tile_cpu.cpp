#include "quant/tile_cpu.h"

#include <algorithm>
#include <cstring>

#include "core/fp8.h"
#include "core/threads.h"

namespace eightfold {
namespace {

EF_CPU_CLONES void widen(const uint16_t* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(x[i]);
}

EF_CPU_CLONES void narrow(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(x[i]);
}

EF_CPU_CLONES void round_to_bf16(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = bf16_to_float(float_to_bf16(x[i]));
}

EF_CPU_CLONES void scale_codes(const uint8_t* codes, float scale, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = e4m3_to_float(codes[i]) * scale;
}

EF_CPU_CLONES float quantize_group(const float* x, int64_t n, uint8_t* codes) {
  uint32_t amax = 0;
  for (int64_t i = 0; i < n; ++i) amax = fold_amax(amax, x[i]);
  float scale = group_scale(bits_float(amax), false);
  for (int64_t i = 0; i < n; ++i) codes[i] = quantize_one(x[i], scale);
  return scale;
}

EF_CPU_CLONES void column_scales(const float* tile, int64_t rows, float* scales) {
  uint32_t amax[kGroup] = {};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < kGroup; ++c) amax[c] = fold_amax(amax[c], tile[r * kGroup + c]);
  for (int64_t c = 0; c < kGroup; ++c) scales[c] = group_scale(bits_float(amax[c]), false);
}

EF_CPU_CLONES void column_codes(const float* tile, int64_t rows, const float* scales, uint8_t* codes) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < kGroup; ++c) codes[r * kGroup + c] = quantize_one(tile[r * kGroup + c], scales[c]);
}

}  // namespace

void load_row(const void* x, DType dtype, int64_t offset, int64_t n, float* out) {
  if (dtype == DType::bf16)
    widen(static_cast<const uint16_t*>(x) + offset, n, out);
  else
    std::memcpy(out, static_cast<const float*>(x) + offset, n * sizeof(float));
}

void load_codes(const uint8_t* codes, const float* scales, int64_t scale_ld, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kGroup) scale_codes(codes + i, scales[i / kGroup * scale_ld], std::min(kGroup, n - i), out + i);
}

void store_row(const float* values, DType dtype, int64_t offset, int64_t n, void* y) {
  if (dtype == DType::bf16)
    narrow(values, n, static_cast<uint16_t*>(y) + offset);
  else
    std::memcpy(static_cast<float*>(y) + offset, values, n * sizeof(float));
}

void round_row(float* values, DType dtype, int64_t n) {
  if (dtype == DType::bf16) round_to_bf16(values, n);
}

void quantize_row(const float* values, int64_t row, int64_t col, int64_t n, int64_t cols, const RowCodes& out) {
  for (int64_t i = 0; i < n; i += kGroup)
    out.scales[row + (col + i) / kGroup * out.scale_ld] =
        quantize_group(values + i, std::min(kGroup, n - i), out.codes + row * cols + col + i);
}

void quantize_columns(const float* tile, int64_t row, int64_t col, int64_t rows, int64_t cols, const ColCodes& out) {
  float scales[kGroup];
  uint8_t codes[kGroup * kGroup];
  column_scales(tile, rows, scales);
  column_codes(tile, rows, scales, codes);
  std::memcpy(out.scales + row / kGroup * out.scale_ld + col, scales, cols * sizeof(float));
  for (int64_t c = 0; c < cols; ++c) {
    uint8_t* to = out.codes + (col + c) * out.code_ld + row;
    for (int64_t r = 0; r < rows; ++r) to[r] = codes[r * kGroup + c];
  }
}

}  // namespace eightfold
