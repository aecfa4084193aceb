// Random bits for rounding: Philox words of (global element index, step), keyed by the seed.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace eightfold {

// Purpose 0 rounds parameters: eight neighbours share a Philox block, 16 bits each, the even element the low half of
// a word. Purpose 1 rounds states: four neighbours share a block, a word each, bits 0-15 for m and 16-31 for v.
EF_HD PhiloxWords random_words(uint64_t block, uint32_t step, uint32_t purpose, const PhiloxKeys& keys) {
  return philox4x32(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), step, purpose, keys);
}

EF_HD uint32_t random_word(PhiloxWords words, uint32_t index) {
  uint32_t low = index & 1 ? words.w[1] : words.w[0], high = index & 1 ? words.w[3] : words.w[2];
  return index & 2 ? high : low;
}

EF_HD uint32_t random_for_param(uint64_t element, uint32_t step, const PhiloxKeys& keys) {
  const uint32_t word = random_word(random_words(element >> 3, step, 0, keys), static_cast<uint32_t>(element >> 1));
  return element & 1 ? word >> 16 : word & 0xFFFFu;
}

EF_HD uint32_t random_for_states(uint64_t element, uint32_t step, const PhiloxKeys& keys) {
  return random_word(random_words(element >> 2, step, 1, keys), static_cast<uint32_t>(element));
}

// Up with probability (distance to the lower neighbour) / spacing; exact values stay. NaN and Inf as in rounding to nearest.
EF_HD uint16_t float_to_bf16_stochastic(float x, uint32_t random) {
  uint32_t u = float_bits(x);
  bool finite = (u & 0x7F800000u) != 0x7F800000u;
  return finite ? static_cast<uint16_t>((u + (random & 0xFFFFu)) >> 16) : float_to_bf16(x);
}

}  // namespace eightfold
