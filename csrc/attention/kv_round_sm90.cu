// 16 lanes a row of a head, eight elements each; floor: two bytes an element read and two written.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "attention/paged_store.cuh"
#include "core/launch.cuh"

namespace eightfold {
namespace {

using namespace attention;

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) kv_round_kernel(const KvRound op) {
  using T = __nv_bfloat16;
  const int lane = threadIdx.x % kRowLanes;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kRowLanes;
  const int64_t token = index / op.heads, head = index % op.heads;
  const bool mine = token < op.tokens && 8 * lane < op.dim;
  const auto* from = static_cast<const T*>(op.x.data) + token * op.x.token_stride + head * op.x.head_stride + 8 * lane;
  const Octet<T> x = load_octet<true>(from, mine ? 8 : 0);
  const float scale = scale_of_row(x);
  const uint2 codes = encode_octet(x, GroupDivider<T>::of(scale));
  const Octet<ScaledCodes> scaled{{codes.x, codes.y, __float_as_uint(scale)}};
  float values[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] = scaled.value(j);
  Octet<T> rounded;
  rounded.set(values);
  if (mine) store_octet_whole(static_cast<T*>(op.out.data) + token * op.out.token_stride + head * op.out.head_stride + 8 * lane, rounded);
}

}  // namespace

void kv_round_sm90(const KvRound& op, void* stream) {
  const int64_t rows = op.tokens * op.heads;
  if (rows == 0) return;
  const auto blocks = static_cast<unsigned>((rows * kRowLanes + kThreads - 1) / kThreads);
  kv_round_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
  check_launch("kv_round_kernel");
}

}  // namespace eightfold
