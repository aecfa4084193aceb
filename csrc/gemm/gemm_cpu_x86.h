// Rows of bf16 or fp32 to steps of k, eight rows by eight k at a time, for the x86 kernels.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "gemm/blocked_cpu.h"

namespace eightfold {
namespace {

inline __attribute__((always_inline)) __m256 widen(const float* x) { return _mm256_loadu_ps(x); }
inline __attribute__((always_inline)) __m256 widen(const uint16_t* x) {
  __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

// y[i]: k = i of rows [first, first + 8); rows past the last repeat row 0.
template <class T>
inline __attribute__((always_inline)) void transpose(const T* x, int64_t ld, int first, int rows, __m256 (&y)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) a[r] = widen(x + (first + r < rows ? first + r : 0) * ld);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
      a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xEE);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    y[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
}

// Up to 8 kHalves rows: k of row r to dst[k * stride + r], k ascending. Where stride < 8 kHalves, what the store of a k spills is
// overwritten by the next ones.
template <int kHalves, class T>
void pack_rows(const T* x, int64_t ld, int rows, float* dst, int stride) {
  for (int k = 0; k < kStage; k += 8, x += 8) {
    __m256 y[kHalves][8];
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) transpose(x, ld, 8 * half, rows, y[half]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, dst += stride)
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; ++half) _mm256_storeu_ps(dst + 8 * half, y[half][i]);
  }
}

template <class I>
struct X86Pack {
  using Isa = I;

  template <class T>
  static void pack_a(const T* x, int64_t ld, int rows, float* dst) {
    rows <= 8 ? pack_rows<1>(x, ld, rows, dst, rows) : pack_rows<Isa::kMr <= 8 ? 1 : 2>(x, ld, rows, dst, rows);
  }

  // Eight columns after eight: sixteen at once would take more registers than AVX2 has.
  template <class T>
  static void pack_b(const T* x, int64_t ld, int columns, float* dst) {
    constexpr int kNr = Isa::kLanes * Isa::kVecs;
    pack_rows<1>(x, ld, columns, dst, kNr);
    columns > 8 ? pack_rows<1>(x + 8 * ld, ld, columns - 8, dst + 8, kNr) : pack_rows<1>(x, ld, columns, dst + 8, kNr);
  }
};

}  // namespace
}  // namespace eightfold
