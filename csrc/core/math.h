// exp and the logistic function in fp32, for host and device. The host versions have no branch and no fused multiply-add, so
// that compilers vectorise them and every instruction set gives the same bits.
#pragma once

#include <cmath>

#include "core/fp8.h"

#if defined(__CUDACC__)
#include "core/approx.cuh"
#endif

namespace eightfold {

// exp(x) for x <= 0, within 2 ulp; 0 below -87.3 (results under 2^-126), NaN for NaN.
EF_HD float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return ex2_approx(x * 1.44269504f);  // error at most 2 + floor(1.16 |x|) ulp
#else
  float in = x < -87.3f ? -87.3f : x;
  // Adding 1.5 * 2^23 leaves round(x / ln 2) in the low mantissa bits; ln 2 is subtracted in two parts, the first exact.
  float shifted = in * 1.44269504f + 12582912.0f;
  float n = shifted - 12582912.0f;
  float r = (in - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  float e = (p * (r * r) + r) + 1.0f;
  float power = bits_float((float_bits(shifted) << 23) + 0x3F800000u);
  return x < -87.3f ? 0.0f : e * power;
#endif
}

// 1 / (1 + exp(-x)). Host: only exp(-|x|) is taken, within 3 ulp. Device: an exp(-x) that overflows gives the right 0; relative error
// below 2^-21 + 1.4e-7 |x| for negative x, below 2^-21 for positive x.
EF_HD float sigmoid(float x) {
#if defined(__CUDA_ARCH__)
  return rcp_approx(1.0f + ex2_approx(x * -1.44269504f));
#else
  float e = exp_nonpositive(-std::fabs(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
#endif
}

}  // namespace eightfold
