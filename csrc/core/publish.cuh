// A count in device memory by which blocks of one launch say what is done, and on which others wait.
#pragma once

#include <cstdint>

namespace eightfold {

// Adds one. What this thread wrote, and what it knows others to have written (after a barrier), is there for whoever sees the count.
__device__ __forceinline__ void count_one(uint32_t* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

// Until the count is reached. The blocks that count must already run, or start without waiting for this one.
__device__ __forceinline__ void await_count(const uint32_t* count, uint32_t reached) {
  uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
  } while (seen < reached);
}

}  // namespace eightfold
