// AVX2 + FMA + F16C: tiles of 6 rows by 16 columns, 12 of 16 registers accumulate.
#if defined(__x86_64__)
#include "gemm/fp8_gemm_cpu.h"
#include "gemm/fp8_gemm_cpu_x86.h"

namespace eightfold {
namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8, kVecs = 2, kMr = 6, kCodes = 1, kStageRows = 8;
  static constexpr int64_t kDepth = 2, kRowBlock = 168;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec dot_step(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

  // Both operands decode to value * 2^-8; `a` (kScaleUp) carries the 2^16 that makes products whole again.
  template <bool kScaleUp, bool kNaN>
  static Vec decode(__m128i code_in_high_byte) {
    Vec v = _mm256_cvtph_ps(to_half_bits<kNaN>(code_in_high_byte));
    return kScaleUp ? _mm256_mul_ps(v, _mm256_set1_ps(65536.0f)) : v;
  }

  template <int kRows, bool kScaleUp, bool kNaN>
  static void transpose_decode_stage(const uint8_t* stage, float* dst, int stride) {
    const __m128i zero = _mm_setzero_si128();
    for (int k = 0; k < 64; k += 16) {
      __m128i x[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) x[r] = _mm_load_si128(reinterpret_cast<const __m128i*>(stage + r * 64 + k));
      transpose_codes<kRows>(x);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        Vec low = decode<kScaleUp, kNaN>(_mm_unpacklo_epi8(zero, x[i]));
        Vec high = decode<kScaleUp, kNaN>(_mm_unpackhi_epi8(zero, x[i]));
        _mm256_storeu_ps(dst, low);
        _mm256_storeu_ps(dst + (kRows == 8 ? stride : 8), high);
        dst += kRows == 8 ? 2 * stride : stride;
      }
    }
  }

  // stage[kRows][64] to dst[k * stride + row]; with kRows = 8, rows past `stride` are overwritten by the next k.
  template <int kRows, bool kScaleUp>
  static void transpose_decode(const uint8_t* stage, float* dst, int stride) {
    if (holds_nan(stage, kRows * 64)) return transpose_decode_stage<kRows, kScaleUp, true>(stage, dst, stride);
    transpose_decode_stage<kRows, kScaleUp, false>(stage, dst, stride);
  }
};

}  // namespace

void fp8_gemm_cpu_avx2(const Fp8GemmArgs& args) { Fp8GemmCpu<Avx2>::run(args); }

}  // namespace eightfold
#endif
