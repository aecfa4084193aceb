// Sums over the threads of a block, and of the partial sums that blocks leave: both in an order that the sizes alone decide.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/dependent_launch.cuh"
#include "quant/tile.cuh"

namespace eightfold::quant {

constexpr int kMostSumThreads = 512;

// Sums of v over the block, the same bits in all threads. `partials` may be reused after the next barrier.
template <int kCount>
__device__ __forceinline__ void block_totals(float (&v)[kCount], float (&partials)[kCount][kMostSumThreads / 32]) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
#pragma unroll
    for (int r = 0; r < kCount; ++r) v[r] += __shfl_xor_sync(kWholeWarp, v[r], mask);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int r = 0; r < kCount; ++r) partials[r][threadIdx.x / 32] = v[r];
  }
  __syncthreads();
  // A tree over sixteen warps; those that are not there count as zeros.
  const int lane = threadIdx.x % 32, warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
  for (int r = 0; r < kCount; ++r) v[r] = lane < warps ? partials[r][lane] : 0.0f;
#pragma unroll
  for (int mask = 8; mask > 0; mask /= 2)
#pragma unroll
    for (int r = 0; r < kCount; ++r) v[r] += __shfl_xor_sync(kWholeWarp, v[r], mask);
#pragma unroll
  for (int r = 0; r < kCount; ++r) v[r] = __shfl_sync(kWholeWarp, v[r], 0);
}

// Partial sums [set][run][col], the runs of a set `run_stride` apart, sets `set_stride`.
struct PartialSums {
  const float* data;
  int64_t sets, set_stride, runs, run_stride, cols;
};

// Each of 32 slices, or of as many as there are runs, sums its share of the runs in order, then the slices are summed in order. Store is
// called with (set, col, sum).
constexpr int kMostSlices = 32;

template <class Store>
__global__ void __launch_bounds__(32 * kMostSlices) fold_runs_kernel(const PartialSums sums, const Store store) {
  __shared__ float slices[kMostSlices][32];
  const int64_t across = (sums.cols + 31) / 32, set = blockIdx.x / across, col = blockIdx.x % across * 32 + threadIdx.x % 32;
  const int slice = threadIdx.x / 32, count = blockDim.x / 32;
  const int64_t share = (sums.runs + count - 1) / count;
  const int64_t begin = slice * share, end = begin + share < sums.runs ? begin + share : sums.runs;
  wait_for_earlier_kernels();
  float sum = 0.0f;
  if (col < sums.cols) {
    const float* from = sums.data + set * sums.set_stride + col;
#pragma unroll 8
    for (int64_t run = begin; run < end; ++run) sum += __ldcg(from + run * sums.run_stride);
  }
  slices[slice][threadIdx.x % 32] = sum;
  __syncthreads();
  if (slice > 0 || col >= sums.cols) return;
#pragma unroll 8
  for (int s = 1; s < count; ++s) sum += slices[s][threadIdx.x];
  store(set, col, sum);
}

// Launched while the kernel that leaves the sums still runs: that one calls let_next_kernel_start().
template <class Store>
void fold_runs(const PartialSums& sums, const Store& store, cudaStream_t stream) {
  const int slices = static_cast<int>(std::clamp<int64_t>(sums.runs, 1, kMostSlices));
  launch_kernel(true, "fold_runs_kernel", fold_runs_kernel<Store>, sums.sets * ((sums.cols + 31) / 32), 32 * slices, 0, stream, sums,
                store);
}

}  // namespace eightfold::quant
