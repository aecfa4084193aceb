#include <cuda_runtime.h>

#include "core/launch.cuh"
#include "rotary/rotary_tables.h"

namespace eightfold {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) rotary_tables_kernel(const RotaryAngles op) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= op.rows * op.half) return;
  const float angle = static_cast<float>(op.positions[index / op.half]) * op.frequency[index % op.half];
  sincosf(angle, op.sin + index, op.cos + index);
}

}  // namespace

void rotary_tables_sm90(const RotaryAngles& op, void* stream) {
  const int64_t blocks = (op.rows * op.half + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  rotary_tables_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
  check_launch("rotary_tables_kernel");
}

}  // namespace eightfold
