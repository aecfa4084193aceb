// A word that one block writes when what it made is in memory, and that others of the same launch wait for.
#pragma once

#include <cstdint>

namespace eightfold {

// kOrdered: what this thread wrote, and what it knows others to have written (after a barrier), is there for whoever reads `value`.
template <bool kOrdered>
__device__ __forceinline__ void publish(float* at, float value) {
  if (kOrdered)
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(at), "r"(__float_as_uint(value)) : "memory");
  else
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(at), "r"(__float_as_uint(value)) : "memory");
}

// The word once it is no longer `unwritten`. The block that publishes it must already run, or start without waiting for this one.
template <bool kOrdered>
__device__ __forceinline__ float await_published(const float* at, uint32_t unwritten) {
  uint32_t word;
  do {
    if (kOrdered)
      asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
    else
      asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
  } while (word == unwritten);
  return __uint_as_float(word);
}

}  // namespace eightfold
