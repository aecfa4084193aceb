// A block for a row: 1024 threads, eight logits each at a time. First an online maximum and sum in registers, folded over warps and
// then over the block in one fixed order; then the gradient, from logits that are still in the L2 cache: with two blocks on a
// multiprocessor 264 rows are in flight, 34 MB at 32,000 logits.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <stdexcept>

#include "core/fp8_vector.cuh"
#include "core/launch.cuh"
#include "core/math.h"
#include "loss/cross_entropy.h"

namespace eightfold {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kStep = kThreads * 8;

// sum of exp(x - max) over what was seen. The maximum starts at the lowest finite value, so that no difference is Inf - Inf.
struct Running {
  float max = -FLT_MAX, sum = 0.0f;

  __device__ void add(const Running& other) {
    const float larger = fmaxf(max, other.max);
    sum = sum * exp_nonpositive(max - larger) + other.sum * exp_nonpositive(other.max - larger);
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

template <class G, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) cross_entropy_kernel(const CrossEntropy op) {
  __shared__ Running of_warp[kWarps];
  const int64_t row = blockIdx.x, label = op.labels[row];
  const float* logits = op.logits + row * op.ld;
  G* grad = static_cast<G*>(op.grad) + row * op.cols;
  const int64_t first = threadIdx.x * 8;

  if (label == kIgnoredLabel) {
    if (threadIdx.x == 0) op.loss[row] = 0.0f;
    if (op.grad == nullptr) return;
    for (int64_t col = first; col < op.cols; col += kStep) {
      store_octet(grad + col, Octet<G>{}, static_cast<int>(min(op.cols - col, int64_t{8})), kVector);
    }
    return;
  }

  Running mine;
  for (int64_t col = first; col < op.cols; col += kStep) {
    const int count = static_cast<int>(min(op.cols - col, int64_t{8}));
    const Octet<float> x = load_octet<kVector>(logits + col, count);
    Running part;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < count) part.max = fmaxf(part.max, x.value(j));
    part.max = fmaxf(part.max, mine.max);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < count) part.sum += exp_nonpositive(x.value(j) - part.max);
    mine.sum = mine.sum * exp_nonpositive(mine.max - part.max) + part.sum;
    mine.max = part.max;
  }
  mine = over_warp(mine);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  const Running all = over_warp(of_warp[threadIdx.x % kWarps]);  // every warp folds the same values in the same order

  const bool known = label >= 0 && label < op.cols;
  const float nan = __int_as_float(0x7FC00000);
  if (threadIdx.x == 0) op.loss[row] = known ? logf(all.sum) + (all.max - logits[label]) : nan;
  if (op.grad == nullptr) return;
  const float inverse = known ? 1.0f / all.sum : nan;
  for (int64_t col = first; col < op.cols; col += kStep) {
    const int count = static_cast<int>(min(op.cols - col, int64_t{8}));
    const Octet<float> x = load_octet<kVector>(logits + col, count);
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = exp_nonpositive(x.value(j) - all.max) * inverse - (col + j == label ? 1.0f : 0.0f);
    Octet<G> out;
    out.set(values);
    store_octet(grad + col, out, count, kVector);
  }
}

template <class G>
void typed(const CrossEntropy& op, cudaStream_t stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vector = op.cols % 8 == 0 && op.ld % 4 == 0 && aligned(op.logits) && aligned(op.grad);
  const auto kernel = vector ? cross_entropy_kernel<G, true> : cross_entropy_kernel<G, false>;
  kernel<<<static_cast<unsigned>(op.rows), kThreads, 0, stream>>>(op);
  check_launch("cross_entropy_kernel");
}

}  // namespace

void cross_entropy_sm90(const CrossEntropy& op, void* stream) {
  if (op.rows == 0) return;
  if (op.rows > INT32_MAX) throw std::runtime_error("cross_entropy: logits has more than 2^31 - 1 rows");
  if (op.grad_type == DType::bf16)
    typed<__nv_bfloat16>(op, static_cast<cudaStream_t>(stream));
  else
    typed<float>(op, static_cast<cudaStream_t>(stream));
}

}  // namespace eightfold
