// Dynamic range expansion: E4M3 optimizer states whose groups are stretched over the format's whole range (COAT, section 4),
// in the M-relative form of DESIGN "8-bit states". One group is up to 128 consecutive elements of one row:
//
//   M = max|x|      R = M / (smallest non-zero |x|)      B = 448 / (3 2^-9) = 76,458.7
//   k = log2(B) / log2(R) to the nearest 1/16 with R^k <= 1.5 B, in [1/16, 16]   the smallest element lands near code 3, never below 2
//   code = RNE(448 (|x| / M)^k) with the sign of x                               x' = sign M (code / 448)^(1/k)
//
// Stored per group: M (float32) and 16 k - 1 (uint8): 1 + 5/128 = 1.039 bytes an element. COAT stores scale, exponent and
// sqrt(max min), three floats; that form cancels to this one, which has no large intermediate powers. What follows from it:
// - |x| = M gives the code 448 and decodes to exactly M: constant and single-element groups are exact.
// - k < 1 (contraction, for R > B) is allowed. Without it wide groups flush small second moments to 0 and Adam divides by eps.
// - Zeros stay zeros, are left out of the minimum, and a non-zero element never gets code 0 (at least code 1), in either moment.
// - All powers are exp2(k (log2 a - log2 b)), so M = 1e-38 and subnormal elements are nothing special.
// - Storing what was stored changes nothing when the smallest element has code 3: R gives the same k again. COAT's B = 448^2 / 2 lies
//   between codes and its k is rounded down, so k and the smallest codes wander, and v drifts: 3,000 steps at beta2 = 0.999 of
//   gradients of one scale leave v 44 % off with that rule and 3 % with this one. m / sqrt(v) of one storing is as good either way.
// - A NaN or Inf makes M NaN and every code 0x7F: the group decodes to NaN until someone resets it.
//
// range_exponent uses plain IEEE operations (no fused multiply-add), so that CPU, CUDA and the torch reference choose the same k;
// codes may differ between them where 448 (|x| / M)^k is within 1e-4 (relative) of a rounding boundary.
#pragma once

#include <cstdint>

#include "core/fp8.h"

namespace eightfold {

constexpr int kDreGroup = 128;
constexpr float kDreBoundLog2 = 16.22239242f;  // log2(448 / (3 2^-9))
constexpr float kDreTopLog2 = 16.80735492f;    // log2(448 / (2 2^-9))
constexpr float kE4M3MaxLog2 = 8.80735492f;    // log2(448)
constexpr uint8_t kDreTopExponent = 255;       // k = 16
constexpr uint8_t kE4M3Top = 0x7E;             // 448
constexpr float kE4M3Tiny = 0.001953125f;      // 2^-9, code 1
constexpr float kSmallestFloat = 1.40129846e-45f;

EF_HD float ieee_mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

EF_HD float ieee_add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

EF_HD float ieee_div(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

struct SplitFloat {
  float mantissa;  // [1, 2)
  int32_t exponent;
};

// x > 0, finite.
EF_HD SplitFloat split_float(float x) {
  bool tiny = x < 1.17549435e-38f;
  uint32_t bits = float_bits(tiny ? ieee_mul(x, 16777216.0f) : x);
  return {bits_float((bits & 0x007FFFFFu) | 0x3F800000u), static_cast<int32_t>(bits >> 23) - (tiny ? 151 : 127)};
}

// 16 k - 1 for a group with largest and smallest non-zero magnitudes `maximum` >= `minimum` > 0.
EF_HD uint8_t range_exponent(float maximum, float minimum) {
  SplitFloat a = split_float(maximum), b = split_float(minimum);
  float ratio = ieee_div(a.mantissa, b.mantissa);
  // log2(ratio) = 2/ln2 artanh(s), |s| < 1/3
  float s = ieee_div(ieee_add(ratio, -1.0f), ieee_add(ratio, 1.0f));
  float z = ieee_mul(s, s);
  float series = 1.0f / 11.0f;
  series = ieee_add(ieee_mul(series, z), 1.0f / 9.0f);
  series = ieee_add(ieee_mul(series, z), 1.0f / 7.0f);
  series = ieee_add(ieee_mul(series, z), 1.0f / 5.0f);
  series = ieee_add(ieee_mul(series, z), 1.0f / 3.0f);
  series = ieee_add(ieee_mul(series, z), 1.0f);
  float log2_ratio = ieee_mul(ieee_mul(series, s), 2.885390082f);
  float log2_range = ieee_add(static_cast<float>(a.exponent - b.exponent), log2_ratio);
  log2_range = log2_range > 1.0f ? log2_range : 1.0f;  // R < 2 is beyond k = 16 anyway
  float nearest = ieee_add(ieee_div(16.0f * kDreBoundLog2, log2_range), 0.5f);
  float highest = ieee_div(16.0f * kDreTopLog2, log2_range);
  int32_t k16 = static_cast<int32_t>(nearest < highest ? nearest : highest);
  k16 = k16 < 256 ? k16 : 256;
  return static_cast<uint8_t>((k16 > 1 ? k16 : 1) - 1);
}

EF_HD float expansion(uint8_t exponent) { return static_cast<float>(exponent + 1) * 0.0625f; }           // k
EF_HD float half_inverse(uint8_t exponent) { return ieee_div(8.0f, static_cast<float>(exponent + 1)); }  // 1 / (2 k)

// Minimum over non-zero magnitudes: zero minus one is the largest unsigned number.
EF_HD uint32_t fold_min_nonzero(uint32_t min_less_one, float x) {
  uint32_t mag = (float_bits(x) & 0x7FFFFFFFu) - 1u;
  return mag < min_less_one ? mag : min_less_one;
}

// Largest code whose value is <= y, for 0 <= y <= 448.
EF_HD uint32_t e4m3_floor(float y) {
  uint32_t normal = (float_bits(y) >> 20) - (120u << 3);
  uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(y * 512.0f));
  return y < 0.015625f ? subnormal : normal;
}

}  // namespace eightfold
