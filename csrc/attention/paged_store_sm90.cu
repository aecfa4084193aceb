// New keys and values into their pages.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/paged_store.cuh"
#include "core/launch.cuh"

namespace eightfold {
namespace {

using namespace attention;

constexpr int kThreads = 256;

template <bool kCodes>
__global__ void __launch_bounds__(kThreads) paged_store_kernel(const PagedStore op) {
  const int lane = threadIdx.x % kRowLanes;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kRowLanes;
  const int64_t token = index / op.kv_heads, head = index % op.kv_heads;
  const int64_t place = token < op.tokens ? place_of(op, __ldg(op.slots + token), static_cast<uint32_t>(head)) : -1;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const AttentionRows& rows = which ? op.v : op.k;
    const auto* from = static_cast<const __nv_bfloat16*>(rows.data) + token * rows.token_stride + head * rows.head_stride + 8 * lane;
    store_row<kCodes>(op, which, place, load_octet<true>(from, place >= 0 && 8 * lane < op.dim ? 8 : 0));
  }
}

}  // namespace

void paged_store_sm90(const PagedStore& op, void* stream) {
  const int64_t rows = op.tokens * op.kv_heads;
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows * kRowLanes + kThreads - 1) / kThreads);
  const auto s = static_cast<cudaStream_t>(stream);
  op.page_dtype == DType::e4m3 ? paged_store_kernel<true><<<blocks, kThreads, 0, s>>>(op)
                               : paged_store_kernel<false><<<blocks, kThreads, 0, s>>>(op);
  check_launch("paged_store_kernel");
}

}  // namespace eightfold
