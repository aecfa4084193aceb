// The device that kernels are launched on.
#pragma once

#include <cuda_runtime_api.h>

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

}  // namespace eightfold
