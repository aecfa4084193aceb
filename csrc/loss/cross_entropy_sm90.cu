// A block for a row: 1024 threads, eight logits each at a time. First an online maximum and sum in registers, folded over the parts of the
// row, over warps and over the block in one fixed order; then the gradient, from logits that are still in the L2 cache: with two blocks
// on a multiprocessor 264 rows are in flight, 34 MB at 32,000 logits. Of few rows a cluster of eight blocks takes one, a part each: at
// 152,000 logits one block alone would need 25 us and more.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <stdexcept>

#include "core/barrier.cuh"
#include "core/cluster.cuh"
#include "core/dependent_launch.cuh"
#include "core/fp8_vector.cuh"
#include "core/math.h"
#include "loss/cross_entropy.h"

namespace eightfold {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr uint32_t kStep = kThreads * 8;
constexpr uint32_t kParts = 8;        // step s of a row belongs to part s % kParts
constexpr int64_t kSharedRows = 128;  // that a cluster takes one by one: at one block a row they would not fill the device

// sum of exp(x - max) over what was seen. The maximum starts at the lowest finite value, so that no difference is Inf - Inf.
struct alignas(8) Running {
  float max = -FLT_MAX, sum = 0.0f;

  __device__ void add(const Running& other) {
    const float larger = fmaxf(max, other.max);
    const float theirs = __fmul_rn(other.sum, exp_nonpositive(other.max - larger));
    sum = __fmaf_rn(sum, exp_nonpositive(max - larger), theirs);  // said out loud: every kernel here must fold alike
    max = larger;
  }
};

__device__ Running over_warp(Running mine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const Running other{__shfl_xor_sync(0xFFFFFFFFu, mine.max, mask), __shfl_xor_sync(0xFFFFFFFFu, mine.sum, mask)};
    mine.add(other);
  }
  return mine;
}

// 1 / T; a T of 0, at which a draw takes the most likely token, counts as 1.
__device__ __forceinline__ float coldness(const CrossEntropy& op, int64_t row) {
  return op.temperatures != nullptr && op.temperatures[row] > 0.0f ? 1.0f / op.temperatures[row] : 1.0f;
}

// The gradient that reaches the row's loss.
__device__ __forceinline__ float upstream_of(const CrossEntropy& op, int64_t row) {
  return op.grad_output != nullptr ? op.grad_output[row] : 1.0f;
}

// This thread's share of a part of the row.
template <bool kVector>
__device__ Running over_part(const float* logits, uint32_t cols, uint32_t part, float cold) {
  Running mine;
  for (uint32_t col = part * kStep + threadIdx.x * 8; col < cols; col += kParts * kStep) {
    const int count = static_cast<int>(min(cols - col, 8u));
    Octet<float> x = load_octet<kVector>(logits + col, count);
    Running eight;
#pragma unroll
    for (int j = 0; j < 8; ++j) x.words[j] = __float_as_uint(__fmul_rn(x.value(j), cold));
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < count) eight.max = fmaxf(eight.max, x.value(j));
    eight.max = fmaxf(eight.max, mine.max);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < count) eight.sum += exp_nonpositive(x.value(j) - eight.max);
    mine.sum = __fmaf_rn(mine.sum, exp_nonpositive(mine.max - eight.max), eight.sum);
    mine.max = eight.max;
  }
  return mine;
}

// kBlocks of a cluster share a row: 1, or kParts.
template <class G, bool kVector, uint32_t kBlocks>
__global__ void __launch_bounds__(kThreads, kVector ? 2 : 1) cross_entropy_kernel(const CrossEntropy op) {
  __shared__ Running of_warp[kWarps];
  __shared__ Running of_thread[kBlocks == 1 ? 1 : kThreads];
  begin_rows(op.rows);
  const uint32_t rank = blockIdx.x % kBlocks, cols = static_cast<uint32_t>(op.cols);
  const int64_t row = blockIdx.x / kBlocks, label = __ldcg(op.labels + row);
  const float* logits = op.logits + row * op.ld;
  G* grad = static_cast<G*>(op.grad) + row * op.cols;
  const uint32_t first = rank * kStep + threadIdx.x * 8;

  if (label == kIgnoredLabel) {  // so for all blocks of a cluster
    if (threadIdx.x == 0 && rank == 0) op.loss[row] = 0.0f;
    if (op.grad == nullptr) return;
    const float zero = __fmul_rn(0.0f, upstream_of(op, row));  // a NaN that reaches the loss stays one
    Octet<G> zeros;
    zeros.set({zero, zero, zero, zero, zero, zero, zero, zero});
    for (uint32_t col = first; col < cols; col += kBlocks * kStep) {
      store_octet(grad + col, zeros, static_cast<int>(min(cols - col, 8u)), kVector);
    }
    return;
  }

  const float cold = coldness(op, row);
  Running mine = over_part<kVector>(logits, cols, kBlocks == 1 ? 0 : rank, cold);
  if constexpr (kBlocks == 1) {
#pragma unroll 1
    for (uint32_t part = 1; part < kParts; ++part) mine.add(over_part<kVector>(logits, cols, part, cold));
  } else {
    of_thread[threadIdx.x] = mine;
    cluster_meet_to_read();
#pragma unroll
    for (uint32_t part = 0; part < kParts; ++part) {
      const float2 pair = load_cluster_pair(cluster_address(shared_address(&of_thread[threadIdx.x]), part));
      const Running other{pair.x, pair.y};
      if (part == 0)
        mine = other;
      else
        mine.add(other);
    }
    cluster_meet_to_read();  // this block's are read
  }
  mine = over_warp(mine);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  const Running all = over_warp(of_warp[threadIdx.x % kWarps]);  // every warp folds the same values in the same order

  const bool known = label >= 0 && label < op.cols;
  const float nan = __int_as_float(0x7FC00000);
  if (threadIdx.x == 0 && rank == 0) op.loss[row] = known ? logf(all.sum) + (all.max - __fmul_rn(logits[label], cold)) : nan;
  if (op.grad == nullptr) return;
  const float inverse = known ? 1.0f / all.sum : nan, upstream = upstream_of(op, row);
  for (uint32_t col = first; col < cols; col += kBlocks * kStep) {
    const int count = static_cast<int>(min(cols - col, 8u));
    const Octet<float> x = load_octet<kVector>(logits + col, count);
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float share = exp_nonpositive(__fmul_rn(x.value(j), cold) - all.max) * inverse;
      values[j] = __fmul_rn((share - (col + j == label ? 1.0f : 0.0f)) * cold, upstream);
    }
    Octet<G> out;
    out.set(values);
    store_octet(grad + col, out, count, kVector);
  }
}

template <class G, bool kVector>
void launch(const CrossEntropy& op, cudaStream_t stream) {
  const char* name = "cross_entropy_kernel";
  if (op.rows <= kSharedRows && op.cols > kStep) {
    launch_clusters(true, kParts, name, cross_entropy_kernel<G, kVector, kParts>, op.rows * kParts, kThreads, 0, stream, op);
  } else {
    launch_kernel(false, name, cross_entropy_kernel<G, kVector, 1>, op.rows, kThreads, 0, stream, op);
  }
}

template <class G>
void typed(const CrossEntropy& op, cudaStream_t stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vector = op.cols % 8 == 0 && op.ld % 4 == 0 && aligned(op.logits) && aligned(op.grad);
  if (vector)
    launch<G, true>(op, stream);
  else
    launch<G, false>(op, stream);
}

}  // namespace

void cross_entropy_sm90(const CrossEntropy& op, void* stream) {
  if (op.rows == 0) return;
  if (op.rows > INT32_MAX || op.cols > INT32_MAX) throw std::runtime_error("cross_entropy: logits has more than 2^31 - 1 rows or columns");
  if (op.grad_type == DType::bf16)
    typed<__nv_bfloat16>(op, static_cast<cudaStream_t>(stream));
  else
    typed<float>(op, static_cast<cudaStream_t>(stream));
}

}  // namespace eightfold
