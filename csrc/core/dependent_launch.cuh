// Programmatic dependent launch: a kernel's blocks may start while the kernel before it in the stream still runs, if the launch
// carries cudaLaunchAttributeProgrammaticStreamSerialization. Without the attribute both instructions do nothing.
#pragma once

#include <cuda_runtime_api.h>

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

}  // namespace eightfold
