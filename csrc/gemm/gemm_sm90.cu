// bf16 products on Hopper whose rows do not depend on each other: every output is one chain of wgmma over K from its beginning, 16 at a
// time, whatever the tile.
//
//   work       tiles of 64, 128 or 256 rows by 128 columns, rows first: a stays in the L2 cache, b comes from memory once
//   producer   one thread keeps a ring of stages (64 of K) full, also for the next tile
//   math       a warpgroup has 64 or 128 of the rows; results leave from registers
//
// Floor: at many rows 4,096 FLOP a clock and multiprocessor; at few, b's bytes.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "core/barrier.cuh"
#include "core/cuda_check.h"
#include "core/device.h"
#include "core/launch.cuh"
#include "core/quad.cuh"
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

struct Args {
  void* out;
  int64_t ld;
  int32_t m, n, steps, tiles_m, tiles;
  bool bf16;
};

template <class C>
__device__ __forceinline__ void produce(const Args& args, const CUtensorMap* a, const CUtensorMap* b, uint32_t shared) {
  RingPosition<C::kStages> at;
  for (int32_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    const int32_t row = tile % args.tiles_m * C::kTileM, column = tile / args.tiles_m * kTileN;
    for (int32_t step = 0; step < args.steps; ++step, at.advance()) {
      const uint32_t full = shared + C::kFull + 8 * at.stage, to = shared + at.stage * C::kStageBytes;
      barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
      barrier_arrive_expect(full, C::kStageBytes);
      tma_load_2d(to, a, full, step * kStepK, row);
      tma_load_2d(to + C::kABytes, b, full, step * kStepK, column);
    }
  }
}

// A block of 64 rows from `row` on.
__device__ __forceinline__ void store_block(const Args& args, const float (&sums)[kTileN / 2], int32_t row, int32_t column) {
  const int32_t lane = threadIdx.x % 32, quarter = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t r = row + 16 * (threadIdx.x / 32 % 4) + lane / 4 + 8 * h;
    const bool exists = r < args.m;
    if (args.bf16) {
      __nv_bfloat16* to = static_cast<__nv_bfloat16*>(args.out) + r * args.ld;
#pragma unroll
      for (int i = 0; i < kTileN / 8; i += 4) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = pack_bf16(sums[4 * (i + j) + 2 * h], sums[4 * (i + j) + 2 * h + 1]);
        transpose_quad(words, quarter);
        const int32_t at = column + 8 * (i + quarter);
        if (exists && at < args.n) *reinterpret_cast<uint4*>(to + at) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    } else {
      float* to = static_cast<float*>(args.out) + r * args.ld;
#pragma unroll
      for (int i = 0; i < kTileN / 8; ++i) {
        const int32_t at = column + 8 * i + 2 * quarter;
        if (exists && at < args.n) *reinterpret_cast<float2*>(to + at) = make_float2(sums[4 * i + 2 * h], sums[4 * i + 2 * h + 1]);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void multiply(const Args& args, uint32_t shared, int32_t group) {
  RingPosition<C::kStages> at;
  for (int32_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    float sums[C::kBlocks][kTileN / 2];
    uint32_t before = 0;  // the stage whose products may still be under way
    for (int32_t step = 0; step < args.steps; ++step) {
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
    const int32_t row = tile % args.tiles_m * C::kTileM + group * C::kBlocks * 64, column = tile / args.tiles_m * kTileN;
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) store_block(args, sums[block], row + 64 * block, column);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, const __grid_constant__ Args args) {
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
  const int32_t group = static_cast<int32_t>(warp_uniform(threadIdx.x / 128));
  if (group == C::kGroups) {
    warpgroup_give_registers<C::kProducerRegisters>();
    if (warp_uniform(threadIdx.x / 32 % 4) == 0 && elect_lane()) produce<C>(args, &a, &b, shared);
  } else {
    warpgroup_take_registers<C::kMathRegisters>();
    multiply<C>(args, shared, group);
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

template <class C>
void launch(const GemmArgs& op, cudaStream_t stream) {
  constexpr auto kernel = gemm_kernel<C>;
  const int device = current_device();
  allow_shared_memory<kernel>(C::kBytes, device, "gemm: reserving shared memory (this kernel needs a Hopper GPU)");
  const int64_t tiles_m = (op.m + C::kTileM - 1) / C::kTileM, tiles = tiles_m * ((op.n + kTileN - 1) / kTileN);
  const Args args{op.out,
                  op.ldo,
                  static_cast<int32_t>(op.m),
                  static_cast<int32_t>(op.n),
                  static_cast<int32_t>((op.k + kStepK - 1) / kStepK),
                  static_cast<int32_t>(tiles_m),
                  static_cast<int32_t>(tiles),
                  op.out_type == DType::bf16};
  const int grid = static_cast<int>(std::min<int64_t>(tiles, multiprocessors(device)));
  kernel<<<grid, C::kThreads, C::kBytes, stream>>>(operand_map(op.a, op.m, op.k, op.lda, C::kTileM),
                                                   operand_map(op.b, op.n, op.k, op.ldb, kTileN), args);
  check_launch("gemm_kernel");
}

}  // namespace

void gemm_sm90(const GemmArgs& op, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (op.m == 0 || op.n == 0) return;
  if (op.k == 0) {
    const int64_t bytes = op.out_type == DType::bf16 ? 2 : 4;
    cuda_check(cudaMemset2DAsync(op.out, op.ldo * bytes, 0, op.n * bytes, op.m, s), "gemm: clearing the result");
    return;
  }
  if (op.m <= 64) return launch<Config<1, 1>>(op, s);
  if (op.m <= 512) return launch<Config<2, 1>>(op, s);
  launch<Config<2, 2>>(op, s);
}

}  // namespace eightfold
