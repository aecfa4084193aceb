// AVX2 + FMA: tiles of 6 rows by 16 columns, 12 of 16 registers accumulate.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace eightfold {
namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8, kVecs = 2, kMr = 6;
  static constexpr int64_t kDepth = 5, kRowBlock = 172;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace eightfold
