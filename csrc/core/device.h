// The device that kernels are launched on.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "core/cuda_check.h"

namespace eightfold {

constexpr int kMaxDevices = 64;  // that facts are remembered of

inline int current_device() {
  int device = 0;
  cuda_check(cudaGetDevice(&device), "reading the current device");
  return device;
}

inline int multiprocessors(int device) {
  static std::atomic<int> counts[kMaxDevices];
  int count = device < kMaxDevices ? counts[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "reading the number of multiprocessors");
    if (device < kMaxDevices) counts[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// Lets launches of `kernel` ask for `bytes` of dynamic shared memory; asked of the driver once for each device and kernel.
template <auto kernel>
void allow_shared_memory(int bytes, int device, const char* doing) {
  static std::atomic<bool> allowed[kMaxDevices];
  if (device < kMaxDevices && allowed[device].load(std::memory_order_relaxed)) return;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), doing);
  if (device < kMaxDevices) allowed[device].store(true, std::memory_order_relaxed);
}

}  // namespace eightfold
