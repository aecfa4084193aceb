// Both directions of the DRE power, as one lane of the AdamW kernel takes them. Moments are in units that make them cheap
// (adamw_dre_sm90.cu says which): a power and its factor are one multiply-add of the update, no value is subnormal, and a group's constants
// are worked out once.
#pragma once

#include <cuda_fp8.h>

#include "core/approx.cuh"
#include "optim/adamw_dre.h"
#include "optim/dre_group.cuh"
#include "optim/packs.cuh"

namespace eightfold::adamw {

using optim::kWarp;
using optim::Pack;

// code -> power (|code| / 448)^(1/k), to be multiplied by `factor`, which is the group's maximum in some unit.
struct Decoder {
  float factor, inverse_k, offset;

  __device__ __forceinline__ Decoder(float maximum, uint32_t exponent) : factor(maximum) {
    inverse_k = 16.0f * rcp_approx(static_cast<float>(exponent + 1));
    offset = lg2_approx(kE4M3Max) * inverse_k;  // by the instruction, so that code 448 cancels
    if (exponent < 2) {                         // powers down to 2^-269: part of the factor moves into them
      const float shift = exponent ? 16.0f : 125.0f;
      offset -= shift, factor *= ex2_approx(-shift);
    }
  }

  template <int kWidth, bool kSigned>
  __device__ __forceinline__ void powers(const Pack<uint8_t, kWidth>& codes, float (&r)[kWidth]) const {
#pragma unroll
    for (int pair = 0; pair < kWidth / 2; ++pair) {
      const uint32_t two = codes.words[pair / 2] >> (pair % 2 * 16);
      const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
      const float2 values = __half22float2(__half2(halves));
      r[2 * pair] = power<kSigned>(values.x), r[2 * pair + 1] = power<kSigned>(values.y);
    }
  }

 private:
  template <bool kSigned>
  __device__ __forceinline__ float power(float value) const {
    const float y = ex2_approx(__fmaf_rn(lg2_approx(fabsf(value)), inverse_k, -offset));
    return kSigned ? bits_float(float_bits(y) | (float_bits(value) & 0x80000000u)) : y;
  }
};

// Largest and smallest non-zero magnitude, as integers: NaN is above Inf above all else.
struct Range {
  uint32_t max_bits = 0, min_less_one = 0xFFFFFFFFu;

  __device__ __forceinline__ void fold(uint32_t a, uint32_t b) {  // magnitudes
    max_bits = __vimax3_u32(a, b, max_bits);
    min_less_one = __viaddmin_u32(a, 0xFFFFFFFFu, min_less_one);
    min_less_one = __viaddmin_u32(b, 0xFFFFFFFFu, min_less_one);
  }
  __device__ __forceinline__ void fold(Range other) {
    max_bits = max(max_bits, other.max_bits);
    min_less_one = min(min_less_one, other.min_less_one);
  }
  __device__ __forceinline__ Range of_lane(int mask) const {
    return {__shfl_xor_sync(kWarp, max_bits, mask), __shfl_xor_sync(kWarp, min_less_one, mask)};
  }
};

__device__ __forceinline__ Range select(bool first, Range a, Range b) {
  return {first ? a.max_bits : b.max_bits, first ? a.min_less_one : b.min_less_one};
}

// value -> code: log2 of the expanded value is k log2|x| + offset.
struct Encoder {
  float k, offset;

  // Four neighbours; a group with a NaN has a NaN offset and codes 0x7F.
  template <bool kSigned>
  __device__ __forceinline__ uint32_t quad(const float* x) const {
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = ex2_approx(__fmaf_rn(lg2_approx(fabsf(x[i])), k, offset));
      if (kSigned) y[i] = bits_float(float_bits(y[i]) | (float_bits(x[i]) & 0x80000000u));
    }
    const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(y[0], y[1]), __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(y[2], y[3]), __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
  }
};

// A group's new scale: dre.h's rule on approximate logarithms. k is a rounded number and only differs from range_exponent's where
// that is a coin's toss. Elements below 2^-126 of the unit count as 2^-126.
struct Stretch {
  Encoder encoder;
  float maximum;      // in the unit of the range
  uint32_t exponent;  // 16 k - 1

  __device__ __forceinline__ explicit Stretch(Range range) {
    constexpr uint32_t kSmallestNormal = 0x00800000u;
    constexpr float kInteger = 8388608.0f;  // 2^23: adding it rounds to integers
    maximum = bits_float(range.max_bits < 0x7F800000u ? range.max_bits : kQuietNaN);
    const float log2_high = lg2_approx(bits_float(max(float_bits(maximum), kSmallestNormal)));
    const float log2_low = lg2_approx(bits_float(max(range.min_less_one + 1u, kSmallestNormal)));
    const float inverse = rcp_approx(fmaxf(log2_high - log2_low, 1.0f));
    const float k16 = fminf(__fmaf_rn(inverse, 16.0f * kDreBoundLog2, 0.5f), inverse * (16.0f * kDreTopLog2));
    const float shifted = __fadd_rz(fminf(k16, 256.0f), kInteger);
    exponent = float_bits(shifted) - float_bits(kInteger) - 1u;
    encoder.k = (shifted - kInteger) * 0.0625f;
    encoder.offset = __fmaf_rn(-encoder.k, log2_high, kE4M3MaxLog2);
  }
};

}  // namespace eightfold::adamw
