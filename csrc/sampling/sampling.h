// One token a row, drawn from softmax(logits / temperature) cut to its most likely tokens. Rollout draws with any batch, so a token
// depends on its own logits, seed, position and options alone.
//
// Rank: by logit, descending; equal ones by index. Kept are the top_k first in rank (0: all), of them the fewest first whose probability
// reaches top_p (1: all). Of the kept, the largest (x - max) / T + Gumbel noise is taken (equal ones: the lowest index), which is a draw
// from their softmax. Temperature 0 takes the first in rank.
//
// Noise: token v takes word v % 4 of Philox at the counter (v / 4, 0, position, position >> 32) with the seed as its key; u in (0, 1) of
// its 32 bits; noise = -log(-log(1 - u)), so that where large noise comes from, u is small and has all its bits.
//
// The cut is exact and nothing is sorted: a select by 11, 11 and 10 bits of an order-preserving integer of the logit finds the key where
// the count, or the mass, of what is above reaches its target, and a select on indices parts equal ones. Masses are integers, exp2 of at
// most 0 in steps of 2^-40, so their sums know no order; exponentials and logarithms are core/exp2log2.h's: the same bits on host and
// device, and with them the same tokens.
//
// A row with a NaN logit, and one with a temperature, top_k or top_p out of range, gives -1.
//
// Floor: 4 bytes a logit. A pass to find the largest, three for each cut asked for, one to draw: the row comes from memory once and from
// the L2 cache after. A block takes a row, eight one of few.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/exp2log2.h"
#include "core/philox.h"

namespace eightfold {

constexpr int64_t kMaxVocabulary = int64_t{1} << 22;  // so that masses add up below 2^63

struct Sample {
  const float* logits;  // element (r, v) at r * ld + v
  int64_t rows, vocabulary, ld;
  const int64_t* seeds;  // [rows], as are all that follow
  const int64_t* positions;
  const float* temperatures;
  const int32_t* top_k;
  const float* top_p;
  int64_t* tokens;
};

void sample_cpu(const Sample& op);
void sample_sm90(const Sample& op, void* stream);

// --- the words of a row, for host and device ---

EF_HD bool sample_options_valid(float temperature, int32_t top_k, float top_p) {
  return temperature >= 0.0f && temperature < INFINITY && top_k >= 0 && top_p > 0.0f && top_p <= 1.0f;
}

// Larger for a larger x; -0 and 0 are one.
EF_HD uint32_t order_key(float x) {
  const uint32_t bits = float_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
EF_HD float of_order_key(uint32_t key) { return bits_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

// Larger for a larger x, and for the lower index among equal ones.
EF_HD uint64_t ranked(float x, uint32_t index) { return static_cast<uint64_t>(order_key(x)) << 32 | (0xFFFFFFFFu - index); }
EF_HD uint32_t index_of(uint64_t ranked) { return 0xFFFFFFFFu - static_cast<uint32_t>(ranked); }

// The kept tokens: a key above `key`, or that key and an index up to `last`.
struct SampleCut {
  uint32_t key = 0, last = 0xFFFFFFFFu;
  EF_HD bool keeps(uint32_t k, uint32_t index) const { return k > key || (k == key && index <= last); }
};

// log2 of the probability, unscaled: 0 for the largest, infinities included.
EF_HD float sample_log2(float x, float max, float temperature) {
  const float scaled = x == max ? 0.0f : (x - max) / temperature;
#if defined(__CUDA_ARCH__)
  return __fmul_rn(scaled, 1.44269504f);  // that no addition is fused to
#else
  return scaled * 1.44269504f;
#endif
}

EF_HD uint64_t sample_mass(float log2_probability) {
  return static_cast<uint64_t>(static_cast<int64_t>(exp2_poly(log2_probability) * 1099511627776.0f));
}

// The mass that top_p asks for: at least 1, below the total.
EF_HD uint64_t sample_target(uint64_t total, float top_p) {
  const double target = std::ceil(static_cast<double>(total) * static_cast<double>(top_p));
  return target < 1.0 ? 1 : static_cast<uint64_t>(target);
}

// log2 p plus Gumbel noise in units of log 2, but for a constant.
EF_HD float sample_score(float log2_probability, uint32_t word) {
  float u = static_cast<float>(word) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
  u = u < 0.99999994f ? u : 0.99999994f;
  return log2_probability - log2_poly_normal(-log2_one_minus(u));
}

}  // namespace eightfold
