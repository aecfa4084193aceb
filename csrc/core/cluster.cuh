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

// The same where a thread then reads what threads of other blocks have written to their shared memory before: a fence of all memory.
__device__ __forceinline__ void cluster_meet_to_read() {
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

// From shared memory at a cluster address.
__device__ __forceinline__ float2 load_cluster_pair(uint32_t address) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ float4 load_cluster_floats(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}

// One arrival at the barrier at a cluster address. It orders the thread's earlier reads of shared memory before what waits for it;
// said with the scope of the cluster, it would flush writes to the device first, 1,000 clocks.
__device__ __forceinline__ void cluster_barrier_arrive(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

}  // namespace eightfold
