// The loop of gemm_sm90.cu, which says how it works. What becomes of a tile's results is an epilogue's affair, an argument of the kernel:
//
//   wanted(row, rows, lane)              asked once, by whole warps: whether anybody wants results of these rows; if not, nothing is loaded
//   take(sums, row, column, end, lane)   by whole warps: 64 rows of a tile. Register 4 * i + 2 * h + c of a lane is row row + 8 * h, column
//                                        column + 8 * i + 2 * (lane % 4) + c; columns from `end` on are none, nor are rows past the last
//
// Everything is in an unnamed namespace, so that sources which include this share no names.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "core/barrier.cuh"
#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "core/tensor_map.h"
#include "core/tma.cuh"
#include "core/wgmma.cuh"
#include "gemm/gemm.h"

namespace eightfold {
namespace {

constexpr int kTileN = 128, kStepK = 64;  // 64 of K: one swizzled row of 128 bytes

// kBlocks: 64-row blocks of a math warpgroup.
template <int kGroups_, int kBlocks_>
struct Config {
  static constexpr int kGroups = kGroups_, kBlocks = kBlocks_, kTileM = 64 * kGroups * kBlocks;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kProducerRegisters = 40, kMathRegisters = kGroups == 2 ? 232 : 200;
  static constexpr int kABytes = kTileM * 128, kBBytes = kTileN * 128, kStageBytes = kABytes + kBBytes;
  static constexpr int kStages = std::min(8, 224 * 1024 / kStageBytes);
  static constexpr int kFull = kStages * kStageBytes, kEmpty = kFull + 8 * kStages, kBytes = kEmpty + 8 * kStages;
  static_assert(kBytes <= 232448);
};

struct Tiles {
  int32_t m, n, steps, tiles_m, count;
};

template <class C>
__device__ __forceinline__ void produce(const Tiles& tiles, const CUtensorMap* a, const CUtensorMap* b, uint32_t shared) {
  RingPosition<C::kStages> at;
  for (int32_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const int32_t row = tile % tiles.tiles_m * C::kTileM, column = tile / tiles.tiles_m * kTileN;
    for (int32_t step = 0; step < tiles.steps; ++step, at.advance()) {
      const uint32_t full = shared + C::kFull + 8 * at.stage, to = shared + at.stage * C::kStageBytes;
      barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
      barrier_arrive_expect(full, C::kStageBytes);
      tma_load_2d(to, a, full, step * kStepK, row);
      tma_load_2d(to + C::kABytes, b, full, step * kStepK, column);
    }
  }
}

template <class C, class Epilogue>
__device__ __forceinline__ void multiply(const Tiles& tiles, const Epilogue& epilogue, uint32_t shared, int32_t group) {
  RingPosition<C::kStages> at;
  for (int32_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    float sums[C::kBlocks][kTileN / 2];
    uint32_t before = 0;  // the stage whose products may still be under way
    for (int32_t step = 0; step < tiles.steps; ++step) {
      barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
      const uint32_t stage = shared + at.stage * C::kStageBytes;
#pragma unroll
      for (int block = 0; block < C::kBlocks; ++block) pin_registers(sums[block]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2 * kStepK; k += 32) {
        const uint64_t b = wgmma_operand(stage + C::kABytes + k);
#pragma unroll
        for (int block = 0; block < C::kBlocks; ++block)
          WgmmaBf16<kTileN>::multiply(sums[block], wgmma_operand(stage + (group * C::kBlocks + block) * 8192 + k), b, step > 0 || k > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared + C::kEmpty + 8 * before);
      }
      before = at.stage;
      at.advance();
    }
    wgmma_wait_all();
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) pin_registers(sums[block]);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(shared + C::kEmpty + 8 * before);
    const uint32_t lane = threadIdx.x % 32;
    const int32_t row = tile % tiles.tiles_m * C::kTileM + group * C::kBlocks * 64 + 16 * (threadIdx.x / 32 % 4) + lane / 4;
    const int32_t column = tile / tiles.tiles_m * kTileN;
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) epilogue.take(sums[block], row + 64 * block, column, tiles.n, lane);
  }
}

template <class C, class Epilogue>
__global__ void __launch_bounds__(C::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, const __grid_constant__ Tiles tiles,
                const __grid_constant__ Epilogue epilogue) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(shared + C::kFull + 8 * i, 1);
      barrier_init(shared + C::kEmpty + 8 * i, 4 * C::kGroups);
    }
    barrier_init_fence();
  } else if (threadIdx.x == 32) {
    tma_prefetch_map(&a);
    tma_prefetch_map(&b);
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (!epilogue.wanted(0, tiles.m, threadIdx.x % 32)) return;  // the same for all threads
  const int32_t group = static_cast<int32_t>(warp_uniform(threadIdx.x / 128));
  if (group == C::kGroups) {
    warpgroup_give_registers<C::kProducerRegisters>();
    if (warp_uniform(threadIdx.x / 32 % 4) == 0 && elect_lane()) produce<C>(tiles, &a, &b, shared);
  } else {
    warpgroup_take_registers<C::kMathRegisters>();
    multiply<C>(tiles, epilogue, shared, group);
  }
}

CUtensorMap operand_map(const void* data, int64_t rows, int64_t k, int64_t ld, int box_rows) {
  return encode_tensor_map({data,
                            {k, rows},
                            {0, 2 * ld},
                            {kStepK, static_cast<uint32_t>(box_rows)},
                            CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                            2,
                            CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B});
}

// The operands, sizes and strides of `op`; its result is the epilogue's. early: all that `wanted` reads was there before the kernel ahead.
template <class C, class Epilogue>
void launch_gemm(bool early, const GemmArgs& op, const Epilogue& epilogue, cudaStream_t stream) {
  constexpr auto kernel = gemm_kernel<C, Epilogue>;
  const int device = current_device();
  allow_shared_memory<kernel>(C::kBytes, device, "gemm: reserving shared memory (this kernel needs a Hopper GPU)");
  const int64_t tiles_m = (op.m + C::kTileM - 1) / C::kTileM, count = tiles_m * ((op.n + kTileN - 1) / kTileN);
  const Tiles tiles{static_cast<int32_t>(op.m), static_cast<int32_t>(op.n), static_cast<int32_t>((op.k + kStepK - 1) / kStepK),
                    static_cast<int32_t>(tiles_m), static_cast<int32_t>(count)};
  const int grid = static_cast<int>(std::min<int64_t>(count, multiprocessors(device)));
  launch_kernel(early, "gemm_kernel", kernel, grid, C::kThreads, C::kBytes, stream, operand_map(op.a, op.m, op.k, op.lda, C::kTileM),
                operand_map(op.b, op.n, op.k, op.ldb, kTileN), tiles, epilogue);
}

}  // namespace
}  // namespace eightfold
