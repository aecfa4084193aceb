// CUDA runtime errors as exceptions that say what was being done.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace eightfold {

inline void cuda_check(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("eightfold: ") + doing + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace eightfold
