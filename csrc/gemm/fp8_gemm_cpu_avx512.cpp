// Decodes with F16C on AVX-512.
#if defined(__x86_64__)
#include "gemm/fp8_gemm_cpu.h"
#include "gemm/fp8_gemm_cpu_x86.h"
#include "gemm/isa_avx512.h"

namespace eightfold {
namespace {

struct Avx512Codes {
  using Isa = Avx512;
  using Vec = Isa::Vec;
  static constexpr float kUnit = 256.0f;

  // Register i holds k = i and k = i + 16.
  template <bool kIsA, bool kNaN>
  static void write(const __m256i (&x)[16], Vec scales, float* dst, int stride) {
    const __m256i zero = _mm256_setzero_si256();
    const __mmask16 mask = kIsA ? static_cast<__mmask16>((1u << stride) - 1) : static_cast<__mmask16>(0xFFFF);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i, dst += stride) {
      __m256i low = half_bits<kNaN>(_mm256_unpacklo_epi8(zero, x[i]));
      __m256i high = half_bits<kNaN>(_mm256_unpackhi_epi8(zero, x[i]));
      Vec first = _mm512_maskz_cvtph_ps(0xFFFF, _mm256_permute2x128_si256(low, high, 0x20));
      Vec second = _mm512_maskz_cvtph_ps(0xFFFF, _mm256_permute2x128_si256(low, high, 0x31));
      _mm512_mask_storeu_ps(dst, mask, _mm512_mul_ps(first, scales));
      _mm512_mask_storeu_ps(dst + 16 * stride, mask, _mm512_mul_ps(second, scales));
    }
  }

  template <bool kIsA>
  static void decode(const uint8_t* codes, int64_t ld, int rows, const float* scales, float* dst, int stride) {
    for (int k = 0; k < kStage; k += 32, dst += 32 * stride) {
      __m256i x[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) x[r] = load_codes(codes + (r < rows ? r : 0) * ld + k, __m256i{});
      bool nan = holds_nan(x);
      transpose_codes(x);
      nan ? write<kIsA, true>(x, Isa::load(scales), dst, stride) : write<kIsA, false>(x, Isa::load(scales), dst, stride);
    }
  }

  static void decode_a(const uint8_t* codes, int64_t ld, int rows, const float* scales, float* dst) {
    decode<true>(codes, ld, rows, scales, dst, rows);
  }
  static void decode_b(const uint8_t* codes, int64_t ld, int columns, const float* scales, float* dst) {
    decode<false>(codes, ld, columns, scales, dst, 32);
  }
};

}  // namespace

void fp8_gemm_cpu_avx512(const Fp8GemmArgs& args) { BlockedGemm<Fp8Operands<Avx512Codes>>::run(args); }

}  // namespace eightfold
#endif
