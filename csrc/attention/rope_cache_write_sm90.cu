// What lies between the projection and attention over pages, in one pass: 16 lanes a row of a head, eight elements each, a row of q, k
// or v. All of a row's loads are on their way at once; its sum of squares, the other half of each rotated pair and the scale of codes
// come by shuffles. While decoding there are few rows, so the launch is most of it: blocks start while the kernel before still runs, and
// let the next start at once, which attention over settled keys begins with.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "attention/paged_store.cuh"
#include "core/dependent_launch.cuh"
#include "core/launch.cuh"
#include "core/tma_stream.cuh"
#include "quant/row_cast.cuh"
#include "quant/row_sum.cuh"
#include "rotary/rotate.cuh"

namespace eightfold {
namespace {

using namespace attention;

constexpr int kThreads = 128, kRowsOfBlock = kThreads / kRowLanes;

template <bool kNorm, bool kCodes>
__global__ void __launch_bounds__(kThreads) rope_cache_write_kernel(const RopeCacheWrite op) {
  using T = __nv_bfloat16;
  const PagedStore& store = op.store;
  const int lane = threadIdx.x % kRowLanes, half = static_cast<int>(store.dim) / 16;
  const uint32_t heads = static_cast<uint32_t>(op.heads), kv_heads = static_cast<uint32_t>(store.kv_heads);
  const uint32_t row = blockIdx.x * kRowsOfBlock + threadIdx.x / kRowLanes, each = heads + 2 * kv_heads;
  const uint32_t token = row / each, among = row - token * each;
  const bool query = among < heads, value = among >= heads + kv_heads, mine = token < store.tokens && lane < 2 * half;
  const uint32_t head = query ? among : value ? among - heads - kv_heads : among - heads;
  const AttentionRows& rows = query ? op.q : value ? store.v : store.k;
  const int64_t from = token * rows.token_stride + head * rows.head_stride + 8 * lane;
  const int64_t table = static_cast<int64_t>(token) * 8 * half + 8 * (lane < half ? lane : lane - half);

  if constexpr (kNorm) {  // once a step: hardly in the L2 cache still
    const int64_t line = 128 * static_cast<int64_t>(threadIdx.x), bytes = store.dim * (op.weight_dtype == DType::bf16 ? 2 : 4);
    if (line < bytes) {
      prefetch_l2(static_cast<const char*>(op.q_weight) + line);
      prefetch_l2(static_cast<const char*>(op.k_weight) + line);
    }
  }
  begin_rows(op.store.tokens);
  const int64_t slot = token < store.tokens && !query ? __ldcg(store.slots + token) : -1;
  Octet<T> x = load_octet<true, true>(static_cast<const T*>(rows.data) + from, mine ? 8 : 0);
  const int turning = mine && !value ? 8 : 0;
  const Octet<float> cos = load_octet<true, true>(op.cos + table, turning), sin = load_octet<true, true>(op.sin + table, turning);
  float weight[8];
  if (kNorm) quant::load_weights<true>(query ? op.q_weight : op.k_weight, op.weight_dtype == DType::bf16, 8 * lane, turning, weight);
  let_next_kernel_start();  // no load is moved behind this

  if constexpr (kNorm) {
    const float rstd = quant::rstd_of(quant::squares_of_group(x), store.dim, op.eps);
    if (!value) x = quant::normalise_octet(x, rstd, weight);
  }
  const Octet<T> turned = rotate_octet(x, cos, sin, half);
  if (!value) x = turned;
  if (query && mine) {
    store_octet_whole(static_cast<T*>(op.out.data) + token * op.out.token_stride + head * op.out.head_stride + 8 * lane, x);
  }
  store_row<kCodes>(store, value, place_of(store, slot, head), x);
}

}  // namespace

void rope_cache_write_sm90(const RopeCacheWrite& op, void* stream) {
  const int64_t rows = op.store.tokens * (op.heads + 2 * op.store.kv_heads);
  if (rows == 0) return;
  if (rows > INT32_MAX) throw std::runtime_error("rope_cache_write: q, k and v have more than 2^31 - 1 rows of heads");
  const bool norm = op.q_weight != nullptr, codes = op.store.page_dtype == DType::e4m3;
  const auto kernel = norm ? (codes ? rope_cache_write_kernel<true, true> : rope_cache_write_kernel<true, false>)
                           : (codes ? rope_cache_write_kernel<false, true> : rope_cache_write_kernel<false, false>);
  launch_kernel(true, "rope_cache_write_kernel", kernel, (rows + kRowsOfBlock - 1) / kRowsOfBlock, kThreads, 0,
                static_cast<cudaStream_t>(stream), op);
}

}  // namespace eightfold
