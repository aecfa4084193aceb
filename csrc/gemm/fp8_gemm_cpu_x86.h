// What the x86 kernels share: the transpose of staged codes in byte registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace eightfold {
namespace {

// Register r holds `kRows` rows' worth of... rows of 16 codes in, and out: 16 codes of k = 0 .. 15 side by side, kRows each. Every round
// interleaves the two halves of the list, which rotates the bits of an element's index (row, k) by one.
template <int kRows>
inline __attribute__((always_inline)) void transpose_codes(__m128i (&x)[kRows]) {
  constexpr int kRounds = kRows == 16 ? 4 : 3;
  static_assert(kRows == 8 || kRows == 16);
#pragma GCC unroll 4
  for (int round = 0; round < kRounds; ++round) {
    __m128i y[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows / 2; ++i) {
      y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + kRows / 2]);
      y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + kRows / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) x[i] = y[i];
  }
}

// Whether any of `bytes` (a multiple of 32, aligned) staged codes is a NaN: twice the code is then 0xFE.
inline __attribute__((always_inline)) bool holds_nan(const uint8_t* codes, int bytes) {
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < bytes; i += 32) {
    __m256i c = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + i));
    most = _mm256_max_epu8(most, _mm256_add_epi8(c, c));
  }
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(most, _mm256_set1_epi8(static_cast<char>(0xFE)))) != 0;
}

// Eight codes to half precision bits of value * 2^-8 (the formats differ by 8 in bias); exact, subnormals included. F16C widens
// subnormal halves whatever MXCSR says, so flush-to-zero modes do not change a result.
template <bool kNaN>
inline __attribute__((always_inline)) __m128i to_half_bits(__m128i code_in_high_byte) {
  __m128i half = _mm_and_si128(_mm_srai_epi16(code_in_high_byte, 1), _mm_set1_epi16(static_cast<short>(0xBFFF)));
  if (kNaN) {
    __m128i magnitude = _mm_and_si128(code_in_high_byte, _mm_set1_epi16(0x7F00));
    half = _mm_or_si128(half, _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F00)), _mm_set1_epi16(0x7E00)));
  }
  return half;
}

}  // namespace
}  // namespace eightfold
