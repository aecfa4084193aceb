// What a launch reports at once: a bad configuration, no kernel image for the device, an error left by earlier work.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace eightfold {

inline void check_launch(const char* kernel) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("eightfold: launch of ") + kernel + " failed: " + cudaGetErrorString(error));
}

// kernel<<<clusters * size, threads, 0, stream>>>(arguments...) in clusters of `size` blocks.
template <class... Parameters, class... Arguments>
void launch_in_clusters(const char* name, void (*kernel)(Parameters...), int64_t clusters, int size, int threads, cudaStream_t stream,
                        const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * size));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  check_launch(name);
}

}  // namespace eightfold
