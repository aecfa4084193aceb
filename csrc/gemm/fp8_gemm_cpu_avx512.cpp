// AVX-512: tiles of 14 rows by 32 columns, 28 of 32 registers accumulate.
#if defined(__x86_64__)
#include "gemm/fp8_gemm_cpu.h"
#include "gemm/fp8_gemm_cpu_x86.h"

namespace eightfold {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16, kVecs = 2, kMr = 14, kCodes = 1, kStageRows = 16;
  static constexpr int64_t kDepth = 2, kRowBlock = 168;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec dot_step(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  template <int kRows, bool kScaleUp, bool kNaN>
  static void transpose_decode_stage(const uint8_t* stage, float* dst, int stride) {
    const __m128i zero = _mm_setzero_si128();
    for (int k = 0; k < 64; k += 16) {
      __m128i x[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) x[r] = _mm_load_si128(reinterpret_cast<const __m128i*>(stage + r * 64 + k));
      transpose_codes<kRows>(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i, dst += stride) {
        __m128i low = to_half_bits<kNaN>(_mm_unpacklo_epi8(zero, x[i]));
        __m128i high = to_half_bits<kNaN>(_mm_unpackhi_epi8(zero, x[i]));
        Vec v = _mm512_maskz_cvtph_ps(0xFFFF, _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
        // Both operands decode to value * 2^-8; `a` carries the 2^16 that makes products whole again.
        _mm512_storeu_ps(dst, kScaleUp ? _mm512_mul_ps(v, _mm512_set1_ps(65536.0f)) : v);
      }
    }
  }

  // stage[16][64] to dst[k * stride + row]; rows past `stride` are overwritten by the next k.
  template <int kRows, bool kScaleUp>
  static void transpose_decode(const uint8_t* stage, float* dst, int stride) {
    static_assert(kRows == 16);
    if (holds_nan(stage, kRows * 64)) return transpose_decode_stage<kRows, kScaleUp, true>(stage, dst, stride);
    transpose_decode_stage<kRows, kScaleUp, false>(stage, dst, stride);
  }
};

}  // namespace

void fp8_gemm_cpu_avx512(const Fp8GemmArgs& args) { Fp8GemmCpu<Avx512>::run(args); }

}  // namespace eightfold
#endif
