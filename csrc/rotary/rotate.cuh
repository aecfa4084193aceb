// Rotation of one element on the device, where its pair is at hand.
#pragma once

#include <cuda_runtime.h>

namespace eightfold {

// Each product and the sum are rounded on their own, as on the CPU and in the reference. Of a pair (a, b) the first becomes
// rotated(a, -b), the second rotated(b, a); backwards rotated(a, b) and rotated(b, -a).
__device__ __forceinline__ float rotated(float mine, float other, float cos, float sin) {
  return __fadd_rn(__fmul_rn(mine, cos), __fmul_rn(other, sin));
}

}  // namespace eightfold
