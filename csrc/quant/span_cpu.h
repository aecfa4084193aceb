// Spans of fp32 values on the CPU: the loops that casts, alone or fused with a norm or an activation, are made of. Each is
// compiled for several instruction sets with the same results.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace eightfold::quant {

constexpr int64_t kSpanTile = 128;

void widen(const void* x, DType dtype, int64_t offset, int64_t n, float* out);        // bf16 or f32, from element `offset`
void narrow(const float* x, int64_t n, void* out, DType dtype, int64_t offset);       // rounds to nearest even
void decode(const uint8_t* codes, int64_t n, float scale, float* out);                // codes * scale
void decode_each(const uint8_t* codes, int64_t n, const float* scales, float* out);   // a scale an element
uint32_t amax_bits(const float* x, int64_t n);                                        // core/fp8.h fold_amax
void fold_amax_each(const float* x, int64_t n, uint32_t* amax);                       // a maximum an element
void scales_each(const uint32_t* amax, int64_t n, bool power_of_two, float* scales);  // core/fp8.h group_scale
void encode(const float* x, int64_t n, float scale, uint8_t* codes);                  // core/fp8.h quantize_one
void encode_each(const float* x, int64_t n, const float* scales, uint8_t* codes);     // a scale an element

// One row in groups of `group` elements: scale g at scales[g * scale_ld].
void encode_groups(const float* x, int64_t n, int64_t group, bool power_of_two, uint8_t* codes, float* scales, int64_t scale_ld);

// out[c * out_ld + r] = in[r * in_ld + c]
void transpose_bytes(const uint8_t* in, int64_t in_ld, int64_t rows, int64_t cols, uint8_t* out, int64_t out_ld);

// Column cast of a tile of at most 128 x 128 values, x[r * 128 + c]: code (r, c) at codes[c * code_ld + r], scale c at scales[c].
void cast_columns(const float* x, int64_t rows, int64_t cols, bool power_of_two, uint8_t* codes, int64_t code_ld, float* scales);

}  // namespace eightfold::quant
