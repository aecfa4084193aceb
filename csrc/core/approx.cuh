// The special-function unit's approximations, where a relative error near 2^-22 is welcome, and what is built on them. One MUFU each.
#pragma once

namespace eightfold {

// 2^x; results below 2^-126 become 0. 2^0 = 1 exactly, 2^-inf = 0.
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x); subnormals count as 0, log2(0) = -inf.
__device__ __forceinline__ float lg2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x), subnormals included (a few instructions more); log2(0) = -inf.
__device__ __forceinline__ float lg2_approx_subnormal(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sqrt(x); subnormals count as 0.
__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x; 0 for |x| above 2^126, infinite for subnormals.
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x as IEEE division rounds it, for 2^-125 < x < 2^126: __frcp_rn without its test of the range.
__device__ __forceinline__ float reciprocal(float x) {
  const float y = rcp_approx(x);
  return __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);
}

}  // namespace eightfold
