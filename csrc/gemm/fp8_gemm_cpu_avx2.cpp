// Decodes with F16C on AVX2.
#if defined(__x86_64__)
#include "gemm/fp8_gemm_cpu.h"
#include "gemm/fp8_gemm_cpu_x86.h"
#include "gemm/isa_avx2.h"

namespace eightfold {
namespace {

struct Avx2Codes {
  using Isa = Avx2;
  using Vec = Isa::Vec;
  static constexpr float kUnit = 256.0f;

  static EF_INLINE Vec dequantise(__m128i half, Vec scales) { return _mm256_mul_ps(_mm256_cvtph_ps(half), scales); }

  // Two k a register, in ascending order: the store of a k spills over the next one's place, which is written after it.
  template <bool kNaN>
  static void write_a(const __m128i (&x)[8], Vec scales, float* dst, int rows) {
    const __m128i zero = _mm_setzero_si128();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, dst += 2 * rows) {
      _mm256_storeu_ps(dst, dequantise(half_bits<kNaN>(_mm_unpacklo_epi8(zero, x[i])), scales));
      _mm256_storeu_ps(dst + rows, dequantise(half_bits<kNaN>(_mm_unpackhi_epi8(zero, x[i])), scales));
    }
  }

  static void decode_a(const uint8_t* codes, int64_t ld, int rows, const float* scales, float* dst) {
    for (int k = 0; k < kStage; k += 16, dst += 16 * rows) {
      __m128i x[8];
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) x[r] = load_codes(codes + (r < rows ? r : 0) * ld + k, __m128i{});
      bool nan = holds_nan(x);
      transpose_codes(x);
      nan ? write_a<true>(x, Isa::load(scales), dst, rows) : write_a<false>(x, Isa::load(scales), dst, rows);
    }
  }

  // Four k a register: 2 i, 2 i + 1, and those 16 further.
  template <bool kNaN>
  static void write_b(const __m256i (&x)[8], Vec scales, float* dst) {
    const __m256i zero = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, dst += 32) {
      __m256i even = half_bits<kNaN>(_mm256_unpacklo_epi8(zero, x[i]));
      __m256i odd = half_bits<kNaN>(_mm256_unpackhi_epi8(zero, x[i]));
      _mm256_storeu_ps(dst, dequantise(_mm256_castsi256_si128(even), scales));
      _mm256_storeu_ps(dst + 16, dequantise(_mm256_castsi256_si128(odd), scales));
      _mm256_storeu_ps(dst + 16 * 16, dequantise(_mm256_extracti128_si256(even, 1), scales));
      _mm256_storeu_ps(dst + 17 * 16, dequantise(_mm256_extracti128_si256(odd, 1), scales));
    }
  }

  static void decode_b(const uint8_t* codes, int64_t ld, int columns, const float* scales, float* dst) {
    for (int half = 0; half < 16; half += 8)
      for (int k = 0; k < kStage; k += 32) {
        __m256i x[8];
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) x[r] = load_codes(codes + (half + r < columns ? half + r : 0) * ld + k, __m256i{});
        bool nan = holds_nan(x);
        transpose_codes(x);
        float* at = dst + k * 16 + half;
        nan ? write_b<true>(x, Isa::load(scales + half), at) : write_b<false>(x, Isa::load(scales + half), at);
      }
  }
};

}  // namespace

void fp8_gemm_cpu_avx2(const Fp8GemmArgs& args) { BlockedGemm<Fp8Operands<Avx2Codes>>::run(args); }

}  // namespace eightfold
#endif
