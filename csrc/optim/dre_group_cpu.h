// One DRE group on the CPU. Inlined into functions compiled for several instruction sets, hence loops without branches, over 32-bit
// words only: bytes are widened before them and narrowed after, because a loop of both widths spends its time on shuffling them; and short,
// so that the processor has many turns under way.
#pragma once

#include "core/exp2log2.h"
#include "optim/dre.h"

namespace eightfold {

struct DreScale {
  float maximum;
  uint8_t exponent;
};

// A code's value is sign(code) M (code / 448)^(1/k). The power is squared in two steps so that it cannot underflow before M scales it
// back: the exponent of its root, then the value.
EF_HD float root_exponent(uint32_t code, float half_inverse_k, float log2_top) {
  return (log2_poly_normal(e4m3_magnitude(code & 0x7Fu)) - log2_top) * half_inverse_k;
}

EF_HD float from_root(uint32_t code, float root, DreScale scale) {
  float value = (scale.maximum * root) * root;
  value = value < kSmallestFloat ? kSmallestFloat : value;
  value = (code & 0x7Fu) == 0 ? 0.0f : value;
  return bits_float(float_bits(value) | (code & 0x80u) << 24);
}

EF_HD float decode_one(uint32_t code, DreScale scale, float half_inverse_k, float log2_top) {
  return from_root(code, exp2_poly(root_exponent(code, half_inverse_k, log2_top)), scale);
}

EF_HD void decode_group(const uint8_t* codes, int count, DreScale scale, float* x) {
  if (scale.maximum != scale.maximum) {
    for (int i = 0; i < count; ++i) x[i] = bits_float(kQuietNaN);
    return;
  }
  uint32_t wide[kDreGroup];
  float exponents[kDreGroup];
  for (int i = 0; i < count; ++i) wide[i] = codes[i];
  const float half_inverse_k = half_inverse(scale.exponent), log2_top = log2_poly(kE4M3Max);
  for (int i = 0; i < count; ++i) exponents[i] = root_exponent(wide[i], half_inverse_k, log2_top);
  for (int i = 0; i < count; ++i) x[i] = from_root(wide[i], exp2_poly(exponents[i]), scale);
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

EF_HD float magnitude(float x) { return bits_float(float_bits(x) & 0x7FFFFFFFu); }

// 448 power, at least the value of code 1 unless x is 0. power: (|x| / M)^k.
EF_HD float expand_one(float x, float power) {
  float y = kE4M3Max * power;
  y = y > kE4M3Tiny ? y : kE4M3Tiny;
  y = y < kE4M3Max ? y : kE4M3Max;
  return x == 0.0f ? 0.0f : y;
}

// Rounds x to one of the two values its code may have, up with the probability that makes the mean x. random: 16 bits.
EF_HD uint32_t round_stochastically(float x, float y, uint32_t random, DreScale scale, float half_inverse_k, float log2_top) {
  uint32_t low = e4m3_floor(y);
  uint32_t high = low + (low < kE4M3Top);
  float a = decode_one(low, scale, half_inverse_k, log2_top), b = decode_one(high, scale, half_inverse_k, log2_top);
  float threshold = (static_cast<float>(random) + 0.5f) * (1.0f / 65536.0f);
  return magnitude(x) - a > threshold * (b - a) ? high : low;
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
  float expanded[kDreGroup];
  uint32_t wide[kDreGroup];
  for (int i = 0; i < count; ++i) expanded[i] = (log2_poly(magnitude(x[i])) - log2_maximum) * k;
  for (int i = 0; i < count; ++i) expanded[i] = expand_one(x[i], exp2_poly(expanded[i]));
  for (int i = 0; i < count; ++i) {
    const float y = expanded[i];
    uint32_t code;
    if constexpr (kStochastic) {
      code = round_stochastically(x[i], y, (random[i] >> shift) & 0xFFFFu, scale, half_inverse_k, log2_top);
      code = y == 0.0f ? 0 : code;
    } else {
      code = e4m3_nearest(y);
    }
    wide[i] = code | (float_bits(x[i]) >> 24 & 0x80u);
  }
  for (int i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
  return scale;
}

}  // namespace eightfold
