// New keys and values into their pages: 16 lanes a row of a head, eight elements each.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/attention.h"
#include "core/fp8_vector.cuh"
#include "core/launch.cuh"

namespace eightfold {
namespace {

constexpr int kThreads = 256, kLanes = 16;

template <bool kCodes>
__global__ void __launch_bounds__(kThreads) paged_store_kernel(const PagedStore op) {
  using T = __nv_bfloat16;
  const int lane = threadIdx.x % kLanes;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int64_t token = index / op.kv_heads, head = index % op.kv_heads;
  const int64_t slot = token < op.tokens ? __ldg(op.slots + token) : -1;
  const bool exists = slot >= 0 && slot < op.page_count * op.page_size;
  const int64_t place = exists ? (slot / op.page_size * op.kv_heads + head) * op.page_size + slot % op.page_size : 0;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const AttentionRows& rows = which ? op.v : op.k;
    void* pages = which ? op.v_pages : op.k_pages;
    const bool mine = exists && 8 * lane < op.dim;
    const T* from = static_cast<const T*>(rows.data) + token * rows.token_stride + head * rows.head_stride + 8 * lane;
    const Octet<T> x = load_octet<true>(from, mine ? 8 : 0);
    const int64_t at = place * op.dim + 8 * lane;
    if constexpr (kCodes) {
      uint32_t maximum = octet_maximum(x);
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) maximum = Octet<T>::larger(maximum, __shfl_xor_sync(0xFFFFFFFFu, maximum, step));
      const float scale = group_scale(__uint_as_float(Octet<T>::widest_bits(maximum)), false);
      if (exists && lane == 0) (which ? op.v_scales : op.k_scales)[place] = scale;
      if (mine) store_codes8(static_cast<uint8_t*>(pages) + at, encode_octet(x, GroupDivider<T>::of(scale)), 8, true);
    } else if (mine) {
      store_octet(static_cast<T*>(pages) + at, x, 8, true);
    }
  }
}

}  // namespace

void paged_store_sm90(const PagedStore& op, void* stream) {
  const int64_t rows = op.tokens * op.kv_heads;
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows * kLanes + kThreads - 1) / kThreads);
  const auto s = static_cast<cudaStream_t>(stream);
  op.page_dtype == DType::e4m3 ? paged_store_kernel<true><<<blocks, kThreads, 0, s>>>(op)
                               : paged_store_kernel<false><<<blocks, kThreads, 0, s>>>(op);
  check_launch("paged_store_kernel");
}

}  // namespace eightfold
