// One DRE group on the CPU. Inlined into functions compiled for several instruction sets, hence loops without branches.
#pragma once

#include "core/exp2log2.h"
#include "optim/dre.h"

namespace eightfold {

struct DreScale {
  float maximum;
  uint8_t exponent;
};

// sign(code) M (code / 448)^(1/k). The power is squared in two steps so that it cannot underflow before M scales it back.
EF_HD float decode_one(uint8_t code, DreScale scale, float half_inverse_k, float log2_top) {
  uint32_t mag = code & 0x7Fu;
  float root = exp2_poly((log2_poly(e4m3_to_float(static_cast<uint8_t>(mag))) - log2_top) * half_inverse_k);
  float value = (scale.maximum * root) * root;
  value = value < kSmallestFloat ? kSmallestFloat : value;
  value = mag == 0 ? 0.0f : value;
  return bits_float(float_bits(value) | static_cast<uint32_t>(code & 0x80u) << 24);
}

EF_HD void decode_group(const uint8_t* codes, int count, DreScale scale, float* x) {
  if (scale.maximum != scale.maximum) {
    for (int i = 0; i < count; ++i) x[i] = bits_float(kQuietNaN);
    return;
  }
  const float half_inverse_k = half_inverse(scale.exponent), log2_top = log2_poly(kE4M3Max);
  for (int i = 0; i < count; ++i) x[i] = decode_one(codes[i], scale, half_inverse_k, log2_top);
}

EF_HD DreScale group_range(const float* x, int count) {
  uint32_t max_bits = 0, min_less_one = 0xFFFFFFFFu;
  for (int i = 0; i < count; ++i) {
    max_bits = fold_amax(max_bits, x[i]);
    min_less_one = fold_min_nonzero(min_less_one, x[i]);
  }
  if (max_bits >= 0x7F800000u) return {bits_float(kQuietNaN), kDreTopExponent};
  if (max_bits == 0) return {0.0f, kDreTopExponent};
  return {bits_float(max_bits), range_exponent(bits_float(max_bits), bits_float(min_less_one + 1u))};
}

// 448 (|x| / M)^k, at least the value of code 1 unless x is 0.
EF_HD float expand_one(float x, float k, float log2_maximum) {
  float mag = bits_float(float_bits(x) & 0x7FFFFFFFu);
  float y = kE4M3Max * exp2_poly((log2_poly(mag) - log2_maximum) * k);
  y = y > kE4M3Tiny ? y : kE4M3Tiny;
  y = y < kE4M3Max ? y : kE4M3Max;
  return mag == 0.0f ? 0.0f : y;
}

// Rounds x to one of the two values its code may have, up with the probability that makes the mean x. random: 16 bits.
EF_HD uint8_t round_stochastically(float x, float y, uint32_t random, DreScale scale, float half_inverse_k, float log2_top) {
  uint8_t low = e4m3_floor(y);
  uint8_t high = static_cast<uint8_t>(low + (low < kE4M3Top));
  float a = decode_one(low, scale, half_inverse_k, log2_top), b = decode_one(high, scale, half_inverse_k, log2_top);
  float mag = bits_float(float_bits(x) & 0x7FFFFFFFu);
  float threshold = (static_cast<float>(random) + 0.5f) * (1.0f / 65536.0f);
  return mag - a > threshold * (b - a) ? high : low;
}

// Writes the codes of x and returns the group's scale. random (one word an element, bits [shift, shift + 16) used) may be null.
template <bool kStochastic>
EF_HD DreScale encode_group(const float* x, int count, uint8_t* codes, const uint32_t* random, int shift) {
  const DreScale scale = group_range(x, count);
  if (!(scale.maximum > 0.0f)) {
    uint8_t code = scale.maximum == 0.0f ? 0 : kE4M3NaN;
    for (int i = 0; i < count; ++i) codes[i] = code;
    return scale;
  }
  const float k = expansion(scale.exponent), log2_maximum = log2_poly(scale.maximum);
  const float half_inverse_k = half_inverse(scale.exponent), log2_top = log2_poly(kE4M3Max);
  for (int i = 0; i < count; ++i) {
    float y = expand_one(x[i], k, log2_maximum);
    uint8_t code;
    if constexpr (kStochastic) {
      code = round_stochastically(x[i], y, (random[i] >> shift) & 0xFFFFu, scale, half_inverse_k, log2_top);
      code = y == 0.0f ? 0 : code;
    } else {
      code = float_to_e4m3(y);
    }
    codes[i] = static_cast<uint8_t>(code | (float_bits(x[i]) >> 24 & 0x80u));
  }
  return scale;
}

}  // namespace eightfold
