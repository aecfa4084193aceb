// exp2 and log2 for CPU loops that must vectorise and must give the same bits on every instruction set, and on the device: no branches, no
// libm, every fused multiply-add spelled out. Polynomials are minimax fits over one octave; log2(1) = 0 and exp2(0) = 1
// exactly, so equal arguments cancel exactly in exp2(k * (log2 a - log2 b)).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/fp8.h"

namespace eightfold {

// 2^x, relative error below 2e-7. x is clamped to [-126, 127.5]: results are normal numbers.
EF_HD float exp2_poly(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  x = x > -126.0f ? x : -126.0f;
  x = x < 127.0f ? x : 127.0f;
  float shifted = x + kRound;
  float r = x - (shifted - kRound);  // [-0.5, 0.5]
  float q = 0.00015353360504377633f;
  q = std::fma(q, r, 0.0013398875016719103f);
  q = std::fma(q, r, 0.00961843691766262f);
  q = std::fma(q, r, 0.055503323674201965f);
  q = std::fma(q, r, 0.24022647738456726f);
  q = std::fma(q, r, 0.6931471824645996f);
  q = std::fma(q, r, 1.0f);
  return bits_float(float_bits(q) + (float_bits(shifted) << 23));
}

// log2(1 + f) / f, for 1 + f in [sqrt(1/2), sqrt(2)).
EF_HD float log2_slope(float f) {
  float q = 0.12541121244430542f;
  q = std::fma(q, f, -0.21030293405056f);
  q = std::fma(q, f, 0.21737965941429138f);
  q = std::fma(q, f, -0.23851950466632843f);
  q = std::fma(q, f, 0.28765666484832764f);
  q = std::fma(q, f, -0.3607212007045746f);
  q = std::fma(q, f, 0.48092252016067505f);
  q = std::fma(q, f, -0.7213471531867981f);
  return std::fma(q, f, 1.442694902420044f);
}

// log2 of the normal number with these bits, less `bias`.
EF_HD float log2_of_bits(uint32_t bits, float bias) {
  int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  float f = bits_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  return std::fma(log2_slope(f), f, static_cast<float>(exponent) - bias);
}

// log2(x) for x > 0, subnormals included; absolute error below 1e-7 near 1, half an ulp of the result's exponent elsewhere.
// Zero, NaN and negative x give an unspecified finite number: callers select them away.
EF_HD float log2_poly(float x) {
  bool tiny = x < 1.17549435e-38f;
  return log2_of_bits(float_bits(tiny ? x * 16777216.0f : x), tiny ? 24.0f : 0.0f);
}

// The same where x is no subnormal.
EF_HD float log2_poly_normal(float x) { return log2_of_bits(float_bits(x), 0.0f); }

// log2(1 - u) for 0 < u < 1 with all the bits of a small u.
EF_HD float log2_one_minus(float u) {
  const uint32_t bits = float_bits(1.0f - u);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const bool small = u < 0.25f;  // the exponent is 0 there too
  const float f = small ? -u : bits_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  return std::fma(log2_slope(f), f, static_cast<float>(exponent));
}

}  // namespace eightfold
