// What a launch reports at once: a bad configuration, no kernel image for the device, an error left by earlier work.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace eightfold {

inline void check_launch(const char* kernel) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("eightfold: launch of ") + kernel + " failed: " + cudaGetErrorString(error));
}

}  // namespace eightfold
