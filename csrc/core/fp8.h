// The E4M3 codec and the one quantiser rule of the library (DESIGN "Numbers"), for host and device.
//
//   amax  = max(max|x|, 1e-10)         scale = amax / 448          code = RNE(saturate(x / scale))
//
// all in IEEE fp32 with a true division, so that CPU, CUDA and the torch reference write identical bytes. A group that holds
// a NaN or an Inf gets a NaN scale and NaN codes, with one bit pattern each (0x7FC00000, 0x7F), because processors disagree
// on the sign and payload of a computed NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp8.h>
#define EF_HD __host__ __device__ __forceinline__
#else
#define EF_HD inline __attribute__((always_inline))
#endif

namespace eightfold {

constexpr float kE4M3Max = 448.0f;
constexpr float kAmaxFloor = 1e-10f;
constexpr uint8_t kE4M3NaN = 0x7F;
constexpr uint32_t kQuietNaN = 0x7FC00000u;

EF_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
#endif
}

EF_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, 4);
  return x;
#endif
}

EF_HD float bf16_to_float(uint16_t b) { return bits_float(static_cast<uint32_t>(b) << 16); }

// Round to nearest even; NaN becomes the quiet NaN of the same sign, as in torch.
EF_HD uint16_t float_to_bf16(float x) {
  uint32_t u = float_bits(x);
  uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(nan ? 0x7FC0u : rounded);
}

// The code nearest to 0 <= x <= 448, ties to even.
EF_HD uint32_t e4m3_nearest(float x) {
  uint32_t bits = float_bits(x);
  // Normal results (>= 2^-6): round the 20 dropped mantissa bits, rebias the exponent from 127 to 7.
  uint32_t normal = ((bits + 0x7FFFFu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
  // Subnormal results: adding 2^14 leaves x in units of 2^-9 in the low mantissa bits, rounded to nearest even.
  uint32_t subnormal = float_bits(x + 16384.0f) - 0x46800000u;
  return bits < 0x3C800000u ? subnormal : normal;  // 2^-6
}

// fp32 -> E4M3, round to nearest even, saturating at +-448; NaN -> 0x7F. Branch-free, so that compilers vectorise it.
EF_HD uint8_t float_to_e4m3(float x) {
#if defined(__CUDA_ARCH__)
  uint8_t code = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  return x != x ? kE4M3NaN : code;
#else
  uint32_t u = float_bits(x);
  uint32_t sign = (u >> 24) & 0x80u;
  uint32_t mag = u & 0x7FFFFFFFu;
  uint32_t capped = mag < 0x43E00000u ? mag : 0x43E00000u;  // 448
  uint32_t code = e4m3_nearest(bits_float(capped));
  return static_cast<uint8_t>(mag > 0x7F800000u ? kE4M3NaN : (code | sign));
#endif
}

// The value of a code without sign below 0x7F.
EF_HD float e4m3_magnitude(uint32_t code) {
  uint32_t normal = (code << 20) + (120u << 23);
  uint32_t subnormal = float_bits(static_cast<float>(static_cast<int32_t>(code)) * 0.001953125f);  // 2^-9
  return bits_float(code < 8u ? subnormal : normal);
}

// E4M3 -> fp32, exact; both NaN codes become the quiet NaN.
EF_HD float e4m3_to_float(uint8_t code) {
  uint32_t mag = code & 0x7Fu;
  uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  return bits_float(mag == 0x7Fu ? kQuietNaN : float_bits(e4m3_magnitude(mag)) | sign);
}

// The scale of a group with largest magnitude `amax` (NaN or Inf marks a group that holds one). Power-of-two scales are
// rounded up, so that no element exceeds 448.
EF_HD float group_scale(float amax, bool power_of_two) {
  float floored = amax > kAmaxFloor ? amax : kAmaxFloor;
#if defined(__CUDA_ARCH__)
  // One Newton step on the quotient gives IEEE division: checked for every fp32 from 1e-10 up.
  float quotient = floored * (1.0f / kE4M3Max);
  float scale = __fmaf_rn(__fmaf_rn(-kE4M3Max, quotient, floored), 1.0f / kE4M3Max, quotient);
#else
  float scale = floored / kE4M3Max;
#endif
  if (power_of_two) scale = bits_float((float_bits(scale) + 0x7FFFFFu) & 0x7F800000u);
  bool finite = (float_bits(amax) & 0x7F800000u) != 0x7F800000u;
  return finite ? scale : bits_float(kQuietNaN);
}

// `scale` as group_scale gave it: a NaN scale gives NaN codes.
EF_HD uint8_t quantize_one(float x, float scale) { return float_to_e4m3(x / scale); }

// Folds |x| into a running maximum that keeps NaN and Inf: integer order of the magnitudes puts NaN above Inf above all else.
EF_HD uint32_t fold_amax(uint32_t amax_bits, float x) {
  uint32_t mag = float_bits(x) & 0x7FFFFFFFu;
  return mag > amax_bits ? mag : amax_bits;
}

}  // namespace eightfold
