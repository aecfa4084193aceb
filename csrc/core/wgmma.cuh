// Hopper's warpgroup matrix instruction (wgmma) on operands in shared memory, and what surrounds it.
//
// A tile of 64 x kN outputs is spread over the 128 threads of a warpgroup, kN / 2 registers each: with w the warp and l the
// lane, register 4 * j + 2 * h + c holds row 16 * w + l / 4 + 8 * h, column 8 * j + 2 * (l % 4) + c.
//
// Operands are K-major tiles in shared memory, rows of 128 bytes (128 codes, or 64 bf16) in the 128-byte swizzle that the copy engine
// writes: 8 rows of 128 bytes are an atom of 1024 bytes, 1024-byte aligned; atoms follow each other along the rows.
#pragma once

#include <cstdint>

#include "core/wgmma_multiply.cuh"

namespace eightfold {

// Orders this thread's uses of the accumulators before the instructions that follow; before the first of each batch.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending batches are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void wgmma_wait_all() { wgmma_wait<0>(); }

// The compiler may not move uses of these registers across this point: it cannot see that wgmma writes them later.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Describes a K-major operand with 128-byte swizzle: bits 0-13 the address, 16-29 unused with a swizzle (1 by convention), 32-45
// the 1024 bytes from one 8-row atom to the next, all in units of 16 bytes; 62-63 the swizzle, 1 for 128 bytes.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t shared) {
  return static_cast<uint64_t>((shared & 0x3FFFFu) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

// Describes b [K, columns] with columns contiguous, in blocks of 64 of them (128 bytes, the 128-byte swizzle): 1024 bytes from 8 rows of K
// to the next 8, `block_bytes` from 64 columns to the next 64.
__device__ __forceinline__ uint64_t wgmma_columns_operand(uint32_t shared, uint32_t block_bytes) {
  return static_cast<uint64_t>((shared & 0x3FFFFu) >> 4) | (static_cast<uint64_t>(block_bytes >> 4) << 16) | (uint64_t{1024 >> 4} << 32) |
         (uint64_t{1} << 62);
}

// The descriptor `bytes` further on: 32 bytes is the next 32 codes of K inside the atom, 8192 the next 64 rows. Shared memory
// ends below 2^18, so the sum stays inside the address bits.
__device__ __forceinline__ uint64_t wgmma_operand_offset(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

// A value that all lanes of the warp hold; said to the compiler, so that descriptors and branches stay in uniform registers.
__device__ __forceinline__ uint32_t warp_uniform(uint32_t value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

// True in one lane of a converged warp.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// Registers a thread may use, moved between warpgroups at run time; all four warps of a warpgroup call it.
template <int kRegisters>
__device__ __forceinline__ void warpgroup_give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void warpgroup_take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace eightfold
