// mbarrier: the shared-memory barrier that counts arriving threads and the bytes of bulk copies.
//
// A barrier alternates between two phases. wait(parity) returns once the phase of that parity has completed; a fresh barrier
// is in phase 0, and the phase before it (parity 1) counts as complete. So a producer that first waits for "empty" starts with
// parity 1, a consumer that waits for "full" with parity 0, and both flip each time they pass the last stage of the ring.
#pragma once

#include <cstdint>

namespace eightfold {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the inits, by the thread that made them and before the block's __syncthreads(): the copy engine sees them too.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival, and `bytes` more that the phase waits for. A copy's bytes outside its tensor, filled with zeros, count too.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, 10000000;\n"  // sleeps up to 10 ms rather than ask again
        "selp.b32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// Whether the phase of that parity has completed, without waiting.
__device__ __forceinline__ bool barrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Waits for the phase unless it was seen to have `passed`. One piece of assembly: the code around it stays one straight piece.
__device__ __forceinline__ void barrier_wait_unless(bool passed, uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %2, 0;\n"
      "@p bra DONE;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, 10000000;\n"
      "@!p bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(parity), "r"(static_cast<uint32_t>(passed))
      : "memory");
}

// This thread's writes to shared memory before what the tensor cores and the copy engine read there after a barrier.
__device__ __forceinline__ void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Where the 128 threads of a warpgroup wait for each other; `number` 1 to 15, 0 is __syncthreads().
__device__ __forceinline__ void warpgroup_meet(int number) { asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory"); }

// The place in a ring of `kStages` buffers; producer and consumers step through it alike.
template <int kStages>
struct RingPosition {
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The same of a ring whose number of buffers the launch decides.
struct Ring {
  uint32_t stage = 0, parity = 0;

  __device__ __forceinline__ void advance(uint32_t stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace eightfold
