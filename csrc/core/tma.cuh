// The bulk tensor copy engine (TMA): boxes of a tensor described by a CUtensorMap, copied to shared memory by one thread.
// The maps come from core/tensor_map.h and travel as __grid_constant__ kernel parameters.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace eightfold {

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// Copies the box whose corner is (x, y), x along the contiguous dimension; completion is counted in bytes on `barrier`.
// `shared` is 128-byte aligned; for 128-byte swizzling 1024-byte aligned.
__device__ __forceinline__ void tma_load_2d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int32_t x, int32_t y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(shared),
               "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(x), "r"(y)
               : "memory");
}

// The same, to the same place in every block of the cluster whose bit is set in `blocks`; each counts the bytes on its own barrier.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int32_t x, int32_t y,
                                                      uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::
          "r"(shared),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void tma_load_3d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int32_t x, int32_t y, int32_t z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
               "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(x), "r"(y), "r"(z)
               : "memory");
}
__device__ __forceinline__ void tma_load_4d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int32_t x, int32_t y, int32_t z,
                                            int32_t w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// Of five dimensions, from index (x, 0, 0, 0, y).
__device__ __forceinline__ void tma_load_5d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %5, %5, %5, %4}], [%2];" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(x), "r"(y), "r"(0)
      : "memory");
}
__device__ __forceinline__ void tma_load_5d_multicast(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int32_t x, int32_t y,
                                                      uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %6, %6, %6, %4}], "
      "[%2], %5;" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(x), "r"(y), "h"(blocks), "r"(0)
      : "memory");
}

}  // namespace eightfold
