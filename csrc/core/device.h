// The device that kernels are launched on.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

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

// Lets launches of `kernel` ask for `bytes` of dynamic shared memory; the driver is asked once for each device, kernel and larger size.
// The multiprocessors then give shared memory all that they can, so that as many blocks fit as its size allows.
template <auto kernel>
void allow_shared_memory(int bytes, int device, const char* doing) {
  static std::atomic<int> allowed[kMaxDevices];
  static std::mutex asking;  // so that a larger size is never followed by a smaller one
  if (device < kMaxDevices && allowed[device].load(std::memory_order_acquire) >= bytes) return;
  std::lock_guard<std::mutex> lock(asking);
  if (device < kMaxDevices && allowed[device].load(std::memory_order_relaxed) >= bytes) return;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), doing);
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), doing);
  if (device < kMaxDevices) allowed[device].store(bytes, std::memory_order_release);
}

}  // namespace eightfold
