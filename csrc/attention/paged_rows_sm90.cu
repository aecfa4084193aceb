#include <cuda_runtime.h>

#include "attention/paged_rows.h"
#include "core/launch.cuh"

namespace eightfold {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) paged_next_rows_kernel(const PagedRows op) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row < op.rows) next_row(op, row);
}

}  // namespace

void paged_next_rows_sm90(const PagedRows& op, void* stream) {
  const int64_t blocks = (op.rows + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  paged_next_rows_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
  check_launch("paged_next_rows_kernel");
}

}  // namespace eightfold
