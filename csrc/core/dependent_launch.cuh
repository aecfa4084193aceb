// Programmatic dependent launch: a kernel's blocks may start while the kernel before it in the stream still runs, if the launch
// carries cudaLaunchAttributeProgrammaticStreamSerialization. Without the attribute both instructions do nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/launch.cuh"

namespace eightfold {

// Until every kernel before this one has ended and its writes can be seen. Each thread that reads what an earlier kernel may have
// written, or writes what one may still read, calls it first; and some thread of every block, so that this kernel never ends
// before the ones it follows.
__device__ __forceinline__ void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Once every block has called it (or ended), the next kernel's blocks start where they find room.
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// The attribute.
inline cudaLaunchAttribute early_start() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// A kernel of so few rows is over about when the next has been launched: what it costs is its launch. So it starts early and lets the next
// one start at once, which asks for its weights meanwhile.
constexpr int64_t kFewRows = 1024;

__device__ __forceinline__ void begin_rows(int64_t rows) {
  if (rows <= kFewRows) let_next_kernel_start();
  wait_for_earlier_kernels();
}

// kernel<<<blocks, threads, bytes, stream>>>(arguments...) in clusters of so many blocks, with the attribute, if `early`; reports what the
// launch reports.
template <class... Parameters, class... Arguments>
void launch_clusters(bool early, int cluster, const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int bytes,
                     cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.attrs = attributes;
  if (early) attributes[config.numAttrs++] = early_start();
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  check_launch(name);
}

template <class... Parameters, class... Arguments>
void launch_kernel(bool early, const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  launch_clusters(early, 1, name, kernel, blocks, threads, bytes, stream, arguments...);
}

}  // namespace eightfold
