// AVX-512: tiles of 14 rows by 32 columns, 28 of 32 registers accumulate.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace eightfold {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16, kVecs = 2, kMr = 14;
  static constexpr int64_t kDepth = 4, kRowBlock = 168;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace eightfold
