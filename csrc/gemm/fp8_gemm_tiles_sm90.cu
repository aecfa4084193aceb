// Products too small for pairs of large tiles (fp8_gemm_pairs_sm90.cu): a persistent, warp-specialised kernel of single blocks.
//
//   producer warpgroup   one thread walks the block's tiles and, for each 128 of K, has the copy engine bring the codes of a
//                        [64, 128] and of b [tile n, 128] and their scales into a ring of stages in shared memory.
//   math warpgroup       for each stage: multiply, wait, promote (fp8_gemm_sm90.cu), give the stage back. Then bias, rounding, stores.
#include <cuda.h>
#include <cuda_runtime.h>

#include "core/barrier.cuh"
#include "core/cuda_check.h"
#include "core/device.h"
#include "core/tma.cuh"
#include "core/wgmma.cuh"
#include "gemm/fp8_gemm_epilogue.cuh"
#include "gemm/fp8_gemm_launch.h"
#include "gemm/fp8_gemm_maps.h"

namespace eightfold {
namespace {

constexpr int kStepK = kFp8GemmStepK;
constexpr int kTileM = 64;
constexpr int kSharedBytes = 232448;  // what a block may ask for on Hopper
constexpr int kAtomBytes = 1024;      // alignment of a swizzled tile

template <int kTileN_, bool kColumnScales_>
struct Config {
  static constexpr int kTileN = kTileN_, kStages = kTileN == 128 ? 8 : 14;
  static constexpr bool kColumnScales = kColumnScales_;
  static constexpr int kThreads = 256;

  static constexpr int kABytes = kTileM * kStepK, kBBytes = kTileN * kStepK;
  static constexpr int kAScaleBytes = kTileM * 4, kBScaleBytes = kColumnScales ? kTileN * 4 : 0;
  static constexpr int kStageBytes = kABytes + kBBytes + kAScaleBytes + kBScaleBytes;

  // Offsets in shared memory: each array holds all stages.
  static constexpr int kB = kStages * kABytes, kAScales = kB + kStages * kBBytes, kBScales = kAScales + kStages * kAScaleBytes;
  static constexpr int kFull = kBScales + kStages * kBScaleBytes, kEmpty = kFull + kStages * 8;
  static constexpr int kBytes = kEmpty + kStages * 8 + kAtomBytes;  // the last to align the start

  static_assert(kBytes <= kSharedBytes, "stages exceed shared memory");
  static_assert(kABytes % kAtomBytes == 0 && kBBytes % kAtomBytes == 0, "swizzled tiles are whole atoms");
  static_assert(kAScaleBytes % 128 == 0 && kBScaleBytes % 128 == 0, "the copy engine writes to 128-byte boundaries");
  static_assert(128 % kTileN == 0, "a tile lies inside one group of 128 rows of b");
};

struct KernelArgs {
  GemmOutput output;
  const float* b_scales;
  int64_t ld_b_scales;
  uint32_t tiles_m, tiles_n;
  int32_t steps;  // ceil(k / 128)
};

struct TileAt {
  int32_t m, n;
};

// Bands of 8 tile rows, walked along n: blocks that run together share rows of a and of b in the L2 cache.
__device__ __forceinline__ TileAt tile_at(uint32_t index, uint32_t tiles_m, uint32_t tiles_n) {
  constexpr uint32_t kBand = 8;
  const uint32_t band = index / (kBand * tiles_n), rest = index % (kBand * tiles_n);
  const uint32_t rows = min(kBand, tiles_m - band * kBand);
  return {static_cast<int32_t>(band * kBand + rest % rows), static_cast<int32_t>(rest / rows)};
}

template <class C>
__device__ __forceinline__ void produce(const CUtensorMap* a, const CUtensorMap* b, const CUtensorMap* a_scales,
                                        const CUtensorMap* b_scales, const KernelArgs& args, uint32_t shared) {
  if (args.steps == 0) return;  // the maps are not filled in
  tma_prefetch_map(a);
  tma_prefetch_map(b);
  tma_prefetch_map(a_scales);
  if constexpr (C::kColumnScales) tma_prefetch_map(b_scales);

  RingPosition<C::kStages> at;
  const uint32_t tiles = args.tiles_m * args.tiles_n;
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const TileAt tile = tile_at(index, args.tiles_m, args.tiles_n);
    const int32_t row = tile.m * kTileM, column = tile.n * C::kTileN;
    for (int32_t step = 0; step < args.steps; ++step, at.advance()) {
      const uint32_t full = shared + C::kFull + 8 * at.stage;
      barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
      barrier_arrive_expect(full, C::kStageBytes);
      tma_load_2d(shared + at.stage * C::kABytes, a, full, step * kStepK, row);
      tma_load_2d(shared + C::kB + at.stage * C::kBBytes, b, full, step * kStepK, column);
      tma_load_2d(shared + C::kAScales + at.stage * C::kAScaleBytes, a_scales, full, row, step);
      if constexpr (C::kColumnScales) {
        tma_load_2d(shared + C::kBScales + at.stage * C::kBScaleBytes, b_scales, full, column, step);
      }
    }
  }
}

// The scales of one step for a lane's two rows and, where b has a scale per column, its columns.
template <class C>
struct StepScales {
  float upper, lower;                                    // of a
  float2 columns[C::kColumnScales ? C::kTileN / 8 : 1];  // of b
};

// acc += partial * (a's scale * b's scale); `b_scale` is the tile's one scale of b where it has one.
template <class C>
__device__ __forceinline__ void promote(float (&acc)[C::kTileN / 2], const float (&partial)[C::kTileN / 2], const StepScales<C>& scales,
                                        float b_scale) {
  float upper = scales.upper * b_scale, lower = scales.lower * b_scale;
#pragma unroll
  for (int j = 0; j < C::kTileN / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if constexpr (C::kColumnScales) {
        upper = scales.upper * (c == 0 ? scales.columns[j].x : scales.columns[j].y);
        lower = scales.lower * (c == 0 ? scales.columns[j].x : scales.columns[j].y);
      }
      acc[4 * j + c] = fmaf(partial[4 * j + c], upper, acc[4 * j + c]);
      acc[4 * j + 2 + c] = fmaf(partial[4 * j + 2 + c], lower, acc[4 * j + 2 + c]);
    }
  }
}

template <class C>
__device__ __forceinline__ void multiply(const KernelArgs& args, const uint8_t* memory, uint32_t shared) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t lane_row = threadIdx.x / 32 % 4 * 16 + lane / 4;  // the lane's upper row among 64
  const float* a_scales = reinterpret_cast<const float*>(memory + C::kAScales) + lane_row;
  const float* b_scales = reinterpret_cast<const float*>(memory + C::kBScales) + 2 * (lane % 4);

  RingPosition<C::kStages> at;
  const uint32_t tiles = args.tiles_m * args.tiles_n;
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const TileAt tile = tile_at(index, args.tiles_m, args.tiles_n);
    const int64_t row = static_cast<int64_t>(tile.m) * kTileM, column = static_cast<int64_t>(tile.n) * C::kTileN;

    float acc[C::kTileN / 2];
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; ++i) acc[i] = 0.0f;

    // One group of 128 rows of b holds the tile: one scale a step, the next one fetched while this step multiplies.
    const float* b_scale_at = args.b_scales + column / 128 * args.ld_b_scales;
    float next_b_scale = 0.0f;
    if constexpr (!C::kColumnScales) next_b_scale = args.steps > 0 ? __ldg(b_scale_at) : 0.0f;
    for (int32_t step = 0; step < args.steps; ++step, at.advance()) {
      const float b_scale = next_b_scale;
      if constexpr (!C::kColumnScales) {
        if (step + 1 < args.steps) next_b_scale = __ldg(++b_scale_at);
      }
      barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);

      const uint64_t a = wgmma_operand(shared + at.stage * C::kABytes);
      const uint64_t b = wgmma_operand(shared + C::kB + at.stage * C::kBBytes);
      float partial[C::kTileN / 2];
      pin_registers(partial);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStepK; k += 32) {
        Wgmma<C::kTileN>::multiply(partial, wgmma_operand_offset(a, k), wgmma_operand_offset(b, k), k > 0);
      }
      wgmma_commit();
      StepScales<C> scales;  // read while the tensor core works
      scales.upper = a_scales[at.stage * kTileM];
      scales.lower = a_scales[at.stage * kTileM + 8];
      if constexpr (C::kColumnScales) {
#pragma unroll
        for (int j = 0; j < C::kTileN / 8; ++j) {
          scales.columns[j] = *reinterpret_cast<const float2*>(b_scales + at.stage * C::kTileN + 8 * j);
        }
      }
      wgmma_wait_all();
      pin_registers(partial);

      __syncwarp();  // every lane has read the stage
      if (lane == 0) barrier_arrive(shared + C::kEmpty + 8 * at.stage);
      promote<C>(acc, partial, scales, b_scale);
    }

    if constexpr (C::kColumnScales) {
      if (args.output.accumulate && args.output.type == DType::bf16) add_tile_bf16(args.output, acc, row + lane_row, column, lane);
    }
    store_tile(args.output, acc, row + lane_row, column, lane);
    __syncwarp();  // the next tile's matrix instructions want whole warps
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    fp8_gemm_tiles_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                          const __grid_constant__ CUtensorMap a_scales, const __grid_constant__ CUtensorMap b_scales,
                          const __grid_constant__ KernelArgs args) {
  extern __shared__ uint8_t unaligned[];
  uint8_t* memory = unaligned + (-shared_address(unaligned) & (kAtomBytes - 1));
  const uint32_t shared = shared_address(memory);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(shared + C::kFull + 8 * stage, 1);
      barrier_init(shared + C::kEmpty + 8 * stage, 4);  // one lane of each math warp
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warp_uniform(threadIdx.x / 128) == 0) return multiply<C>(args, memory, shared);
  if (warp_uniform(threadIdx.x / 32 % 4) == 0 && elect_lane()) produce<C>(&a, &b, &a_scales, &b_scales, args, shared);
}

template <class C>
void launch(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  allow_shared_memory<fp8_gemm_tiles_kernel<C>>(C::kBytes, device, "fp8_gemm: reserving shared memory (this kernel needs a Hopper GPU)");

  const int64_t steps = (args.k + kStepK - 1) / kStepK;
  CUtensorMap a{}, b{}, a_scales{}, b_scales{};  // unused when k is 0
  if (steps > 0) {
    a = fp8_gemm_codes_map(args.a, args.m, args.k, args.lda, kTileM);
    b = fp8_gemm_codes_map(args.b, args.n, args.k, args.ldb, C::kTileN);
    a_scales = fp8_gemm_scales_map(args.a_scales, args.m, steps, args.ld_a_scales, kTileM);
    if (C::kColumnScales) b_scales = fp8_gemm_scales_map(args.b_scales, args.n, steps, args.ld_b_scales, C::kTileN);
  }

  KernelArgs kernel_args;
  kernel_args.output = gemm_output(args);
  kernel_args.b_scales = args.b_scales;
  kernel_args.ld_b_scales = args.ld_b_scales;
  kernel_args.tiles_m = static_cast<uint32_t>(plan.tiles_m);
  kernel_args.tiles_n = static_cast<uint32_t>(plan.tiles_n);
  kernel_args.steps = static_cast<int32_t>(steps);
  fp8_gemm_tiles_kernel<C><<<plan.grid, C::kThreads, C::kBytes, stream>>>(a, b, a_scales, b_scales, kernel_args);
  cuda_check(cudaGetLastError(), "fp8_gemm: launching the kernel");
}

}  // namespace

void fp8_gemm_tiles_sm90(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  if (args.b_group_rows == 1) {
    return plan.tile_n == 128 ? launch<Config<128, true>>(args, plan, device, stream)
                              : launch<Config<32, true>>(args, plan, device, stream);
  }
  return plan.tile_n == 128 ? launch<Config<128, false>>(args, plan, device, stream)
                            : launch<Config<32, false>>(args, plan, device, stream);
}

}  // namespace eightfold
