// What the x86 kernels share: codes of several rows to half precision bits, column by column, in byte registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define EF_INLINE inline __attribute__((always_inline))

namespace eightfold {
namespace {

EF_INLINE __m128i load_codes(const uint8_t* p, __m128i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
EF_INLINE __m256i load_codes(const uint8_t* p, __m256i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
EF_INLINE __m128i unpack_low(__m128i a, __m128i b) { return _mm_unpacklo_epi8(a, b); }
EF_INLINE __m256i unpack_low(__m256i a, __m256i b) { return _mm256_unpacklo_epi8(a, b); }
EF_INLINE __m128i unpack_high(__m128i a, __m128i b) { return _mm_unpackhi_epi8(a, b); }
EF_INLINE __m256i unpack_high(__m256i a, __m256i b) { return _mm256_unpackhi_epi8(a, b); }

// Whether any of the codes is a NaN: twice its byte is then 0xFE, the largest that twice a byte can be.
template <int kRows>
EF_INLINE bool holds_nan(const __m128i (&x)[kRows]) {
  __m128i most = _mm_setzero_si128();
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) most = _mm_max_epu8(most, _mm_add_epi8(x[r], x[r]));
  return _mm_movemask_epi8(_mm_cmpeq_epi8(most, _mm_set1_epi8(static_cast<char>(0xFE)))) != 0;
}
template <int kRows>
EF_INLINE bool holds_nan(const __m256i (&x)[kRows]) {
  __m256i most = _mm256_setzero_si256();
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) most = _mm256_max_epu8(most, _mm256_add_epi8(x[r], x[r]));
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(most, _mm256_set1_epi8(static_cast<char>(0xFE)))) != 0;
}

// kRows rows of codes, one a register, to columns: afterwards, in each 128-bit lane, the codes of k = 0, 1, ... of the lane's 16
// follow each other across the registers, kRows bytes each. A round interleaves the halves of the list, which rotates the bits of
// an element's index (row, k) by one.
template <int kRows, class Register>
EF_INLINE void transpose_codes(Register (&x)[kRows]) {
  static_assert(kRows == 8 || kRows == 16);
#pragma GCC unroll 4
  for (int round = 0; round < (kRows == 16 ? 4 : 3); ++round) {
    Register y[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows / 2; ++i) {
      y[2 * i] = unpack_low(x[i], x[i + kRows / 2]);
      y[2 * i + 1] = unpack_high(x[i], x[i + kRows / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) x[i] = y[i];
  }
}

// Codes in the high bytes of 16-bit words to half precision bits of value * 2^-8 (the formats' biases differ by 8); exact,
// subnormals included. F16C widens subnormal halves whatever MXCSR says, so flush-to-zero modes do not change a result.
template <bool kNaN>
EF_INLINE __m128i half_bits(__m128i words) {
  __m128i half = _mm_and_si128(_mm_srai_epi16(words, 1), _mm_set1_epi16(static_cast<short>(0xBFFF)));
  if (!kNaN) return half;
  const __m128i nan = _mm_set1_epi16(0x7F00);
  return _mm_or_si128(half, _mm_and_si128(_mm_cmpeq_epi16(_mm_and_si128(words, nan), nan), _mm_set1_epi16(0x7E00)));
}
template <bool kNaN>
EF_INLINE __m256i half_bits(__m256i words) {
  __m256i half = _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16(static_cast<short>(0xBFFF)));
  if (!kNaN) return half;
  const __m256i nan = _mm256_set1_epi16(0x7F00);
  return _mm256_or_si256(half, _mm256_and_si256(_mm256_cmpeq_epi16(_mm256_and_si256(words, nan), nan), _mm256_set1_epi16(0x7E00)));
}

}  // namespace
}  // namespace eightfold
