#include "quant/span_cpu.h"

#include <algorithm>
#include <cstring>

#include "core/fp8.h"
#include "core/threads.h"

namespace eightfold::quant {
namespace {

EF_CPU_CLONES void widen_bf16(const uint16_t* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(x[i]);
}

EF_CPU_CLONES void narrow_bf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(x[i]);
}

EF_HD void encode_span(const float* x, int64_t n, float scale, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = quantize_one(x[i], scale);
}

EF_HD uint32_t amax_span(const float* x, int64_t n) {
  uint32_t amax = 0;
  for (int64_t i = 0; i < n; ++i) amax = fold_amax(amax, x[i]);
  return amax;
}

// kWidth > 0: the width as a constant, for groups too short to set up a loop for. Codes go through a local array, since a
// store to bytes may alias anything.
template <int kWidth>
EF_HD float encode_group(const float* x, int64_t n, bool power_of_two, uint8_t* codes) {
  const int64_t width = kWidth > 0 ? kWidth : n;
  const float scale = group_scale(bits_float(amax_span(x, width)), power_of_two);
  if constexpr (kWidth > 0) {
    uint8_t made[kWidth];
    encode_span(x, kWidth, scale, made);
    std::memcpy(codes, made, kWidth);
  } else {
    encode_span(x, width, scale, codes);
  }
  return scale;
}

// Exchanges the off-diagonal blocks of `kBytes` bytes between two rows of an 8 x 8 block of bytes.
template <int kBytes>
EF_HD void exchange(uint64_t& a, uint64_t& b, uint64_t mask) {
  uint64_t t = ((a >> (8 * kBytes)) ^ b) & mask;
  b ^= t;
  a ^= t << (8 * kBytes);
}

EF_HD void transpose_8x8(uint64_t (&r)[8]) {
  for (int i = 0; i < 4; ++i) exchange<4>(r[i], r[i + 4], 0x00000000FFFFFFFFull);
  for (int i : {0, 1, 4, 5}) exchange<2>(r[i], r[i + 2], 0x0000FFFF0000FFFFull);
  for (int i : {0, 2, 4, 6}) exchange<1>(r[i], r[i + 1], 0x00FF00FF00FF00FFull);
}

}  // namespace

void widen(const void* x, DType dtype, int64_t offset, int64_t n, float* out) {
  if (dtype == DType::bf16)
    widen_bf16(static_cast<const uint16_t*>(x) + offset, n, out);
  else
    std::memcpy(out, static_cast<const float*>(x) + offset, n * sizeof(float));
}

void narrow(const float* x, int64_t n, void* out, DType dtype, int64_t offset) {
  if (dtype == DType::bf16)
    narrow_bf16(x, n, static_cast<uint16_t*>(out) + offset);
  else
    std::memcpy(static_cast<float*>(out) + offset, x, n * sizeof(float));
}

EF_CPU_CLONES void decode(const uint8_t* codes, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = e4m3_to_float(codes[i]) * scale;
}

EF_CPU_CLONES void decode_each(const uint8_t* codes, int64_t n, const float* scales, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = e4m3_to_float(codes[i]) * scales[i];
}

EF_CPU_CLONES uint32_t amax_bits(const float* x, int64_t n) { return amax_span(x, n); }

EF_CPU_CLONES void fold_amax_each(const float* x, int64_t n, uint32_t* amax) {
  for (int64_t i = 0; i < n; ++i) amax[i] = fold_amax(amax[i], x[i]);
}

EF_CPU_CLONES void scales_each(const uint32_t* amax, int64_t n, bool power_of_two, float* scales) {
  for (int64_t i = 0; i < n; ++i) scales[i] = group_scale(bits_float(amax[i]), power_of_two);
}

EF_CPU_CLONES void encode(const float* x, int64_t n, float scale, uint8_t* codes) { encode_span(x, n, scale, codes); }

EF_CPU_CLONES void encode_each(const float* x, int64_t n, const float* scales, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = quantize_one(x[i], scales[i]);
}

EF_CPU_CLONES void encode_groups(const float* x, int64_t n, int64_t group, bool power_of_two, uint8_t* codes, float* scales,
                                 int64_t scale_ld) {
  int64_t whole = n / group;
  if (group == 16) {
    for (int64_t g = 0; g < whole; ++g) scales[g * scale_ld] = encode_group<16>(x + g * 16, 16, power_of_two, codes + g * 16);
  } else {
    for (int64_t g = 0; g < whole; ++g) scales[g * scale_ld] = encode_group<0>(x + g * group, group, power_of_two, codes + g * group);
  }
  if (int64_t at = whole * group; at < n) scales[whole * scale_ld] = encode_group<0>(x + at, n - at, power_of_two, codes + at);
}

void transpose_bytes(const uint8_t* in, int64_t in_ld, int64_t rows, int64_t cols, uint8_t* out, int64_t out_ld) {
  int64_t whole_rows = rows & ~int64_t{7}, whole_cols = cols & ~int64_t{7};
  for (int64_t c = 0; c < whole_cols; c += 8) {
    for (int64_t r = 0; r < whole_rows; r += 8) {
      uint64_t block[8];
      for (int i = 0; i < 8; ++i) std::memcpy(&block[i], in + (r + i) * in_ld + c, 8);
      transpose_8x8(block);
      for (int i = 0; i < 8; ++i) std::memcpy(out + (c + i) * out_ld + r, &block[i], 8);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_cols : 0; c < cols; ++c) out[c * out_ld + r] = in[r * in_ld + c];
}

void cast_columns(const float* x, int64_t rows, int64_t cols, bool power_of_two, uint8_t* codes, int64_t code_ld, float* scales) {
  uint32_t amax[kSpanTile] = {};
  uint8_t bytes[kSpanTile * kSpanTile];
  for (int64_t r = 0; r < rows; ++r) fold_amax_each(x + r * kSpanTile, cols, amax);
  scales_each(amax, cols, power_of_two, scales);
  for (int64_t r = 0; r < rows; ++r) encode_each(x + r * kSpanTile, cols, scales, bytes + r * kSpanTile);
  transpose_bytes(bytes, kSpanTile, rows, cols, codes, code_ld);
}

}  // namespace eightfold::quant
