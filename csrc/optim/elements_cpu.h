// A few neighbouring elements on the CPU: loaded as fp32 whatever their type, the random bits that round them, and rounding.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "optim/random_bits.h"

namespace eightfold {

EF_HD void load(const void* source, DType type, int64_t begin, int count, float* out) {
  if (type == DType::f32) {
    const float* p = static_cast<const float*>(source) + begin;
    for (int i = 0; i < count; ++i) out[i] = p[i];
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(source) + begin;
    for (int i = 0; i < count; ++i) out[i] = bf16_to_float(p[i]);
  }
}

constexpr int kRandomSpan = 128;  // elements that fill_random takes, at most

// For elements [first, first + count): the 16 bits that round a parameter (purpose 0), or the word that rounds its states (1).
template <uint32_t kPurpose>
EF_HD void fill_random(uint32_t* random, int count, uint64_t first, uint32_t step, const PhiloxKeys& keys) {
  constexpr int kPerBlock = kPurpose == 0 ? 8 : 4;
  uint32_t all[kRandomSpan + 2 * kPerBlock];
  const uint64_t block = first / kPerBlock;
  const int skip = static_cast<int>(first % kPerBlock), blocks = (skip + count + kPerBlock - 1) / kPerBlock;
  for (int b = 0; b < blocks; ++b) {
    const PhiloxWords four = random_words(block + b, step, kPurpose, keys);
    for (int i = 0; i < 4; ++i) {
      if constexpr (kPurpose == 0)
        all[8 * b + 2 * i] = four.w[i] & 0xFFFFu, all[8 * b + 2 * i + 1] = four.w[i] >> 16;
      else
        all[4 * b + i] = four.w[i];
    }
  }
  for (int i = 0; i < count; ++i) random[i] = all[skip + i];
}

// A span of bf16 parameters, rounded stochastically; the first is element `first` of the random stream.
EF_HD void store_stochastic(uint16_t* out, int count, const float* p, uint64_t first, uint32_t step, const PhiloxKeys& keys) {
  uint32_t random[kRandomSpan];
  fill_random<0>(random, count, first, step, keys);
  for (int i = 0; i < count; ++i) out[i] = float_to_bf16_stochastic(p[i], random[i]);
}

}  // namespace eightfold
