// Thread block clusters: blocks that run at the same time on neighbouring multiprocessors and reach each other's shared memory.
#pragma once

#include <cstdint>

namespace eightfold {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster. For after barrier_init_fence(), which has made the barriers seen: no fence of all memory. Not
// for the end of a block at whose barriers others arrive: their arrivals may still be on their way.
__device__ __forceinline__ void cluster_meet() {
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait;\n" ::
          : "memory");
}

// The same, and what each block's threads have written before can be read by the others' after: also for the last time before a block ends
// whose shared memory others read.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;\n" ::
          : "memory");
}

// The address by which this block reaches what lies at `shared` in block `rank`.
__device__ __forceinline__ uint32_t cluster_address(uint32_t shared, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// Eight bytes of block `rank` of the cluster, which there lie at `shared`, at a multiple of 8.
__device__ __forceinline__ uint64_t cluster_load(const void* shared, uint32_t rank) {
  uint64_t value;
  asm volatile("ld.shared::cluster.b64 %0, [%1];"
               : "=l"(value)
               : "r"(cluster_address(static_cast<uint32_t>(__cvta_generic_to_shared(shared)), rank))
               : "memory");
  return value;
}

// One arrival at the barrier at a cluster address. It orders the thread's earlier reads of shared memory before what waits for it;
// said with the scope of the cluster, it would flush writes to the device first, 1,000 clocks.
__device__ __forceinline__ void cluster_barrier_arrive(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

}  // namespace eightfold
