// The loop of fp8_gemm_small_sm90.cu, which says how it works. What becomes of a tile's results is an epilogue's affair, an argument of the
// kernel:
//
//   prefetch(column, width, lane)        by a warp, before the kernels ahead have ended: hints only
//   wanted(row, rows, lane)              asked once, by whole warps: whether anybody wants results of these rows; if not, nothing is loaded
//   take(acc, row, column, end, lane)    by whole warps: 64 rows of a tile. Register 4 * i + 2 * h + c of a lane is row row + 8 * h, column
//                                        column + 8 * i + 2 * (lane % 4) + c; columns from `end` on are none, nor are rows past the last
//
// Everything is in an unnamed namespace, so that sources which include this share no names.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/barrier.cuh"
#include "core/cuda_check.h"
#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "core/tma.cuh"
#include "core/tma_stream.cuh"
#include "core/wgmma.cuh"
#include "gemm/fp8_gemm.h"
#include "gemm/fp8_gemm_maps.h"
#include "gemm/fp8_gemm_small.h"

namespace eightfold {
namespace {

constexpr int kStepK = kFp8GemmStepK;
constexpr int kAtomBytes = 1024;  // alignment of a swizzled tile
constexpr int kTeamThreads = 128, kTeamRows = 64;

// A team is a math warpgroup with 64 rows of a. A block's part of b is a multiple of kPartUnit rows.
template <int kWidth, int kTeamCount, int kPartUnit = 8>
struct Config {
  static constexpr int kTileN = kWidth, kTeams = kTeamCount, kUnit = kPartUnit, kRows = kTeams * kTeamRows;
  static constexpr int kBBytes = kTileN * kStepK;
  static constexpr int kScaleBytes = kTeams * kTeamRows * 4;
  static constexpr int kThreads = kTeams * kTeamThreads + 64;
  static constexpr int kSets = kTileN <= 48 ? 4 : kTileN <= 64 ? 3 : 2;  // of partial sums; more would not fit the registers
  static constexpr int kLeastSteps = kSets - 1;
  static_assert(kBBytes % kAtomBytes == 0, "swizzled tiles are whole atoms");
};

struct KernelArgs {
  const float* a_scales;
  const float* b_scales;
  const uint8_t* b;
  int64_t ld_a_scales, ld_b_scales, ldb;
  int32_t n;
  uint32_t least, more;  // units of b: each block has `least` of them, the first `more` blocks one more
  uint32_t narrow_rows;  // of b in the second of its maps, for tiles that need no more
  int32_t steps;         // ceil(k / 128)
  uint32_t halves;       // 2: neighbours have the same rows of b, and of a the first and the last rows
  uint32_t rows;         // of a in a stage
  uint32_t stages;
  uint32_t settled;         // b may be read while the kernels ahead run
  uint32_t ahead_clocks;    // then from one stage to the next
  uint32_t ahead_bytes;     // of each row of the first tile of b, asked for before the kernels ahead have ended
  uint32_t scale_bytes[2];  // of a's scales for 128 of K, in each half
  int32_t scale_rows;       // of b_scales

  // Offsets in shared memory: each array holds all stages. a comes first: the rows that are not loaded are read past its end.
  __device__ __forceinline__ uint32_t a_bytes() const { return rows * kStepK; }
  __device__ __forceinline__ uint32_t b_at() const { return stages * a_bytes(); }
  __device__ __forceinline__ uint32_t half() const { return halves == 2 ? blockIdx.x % 2 : 0; }
};

// The rows of b that a block multiplies.
struct Part {
  int32_t begin, end;
};

template <class C>
__device__ __forceinline__ Part part_of(const KernelArgs& args) {
  const uint32_t block = args.halves == 2 ? blockIdx.x / 2 : blockIdx.x, begin = block * args.least + min(block, args.more);
  const int32_t end = static_cast<int32_t>(C::kUnit * (begin + args.least + (block < args.more ? 1 : 0)));
  return {static_cast<int32_t>(C::kUnit * begin), C::kUnit == 8 ? end : min(end, args.n)};
}

struct Barriers {
  uint64_t full[kFp8GemmSmallStages], empty[kFp8GemmSmallStages];
};

struct Maps {
  CUtensorMap a, b, narrow_b;
};

// A tile of b on its way to a stage.
template <class C>
struct CodesOfB {
  const CUtensorMap* map;
  uint32_t bytes;
  int32_t row;
  uint64_t policy = l2_evict_first();  // two blocks with halves of a read b at about the same time

  __device__ __forceinline__ CodesOfB(const Maps& maps, const KernelArgs& args, const Part& part, int32_t row) : row(row) {
    const bool narrow = part.end - row <= static_cast<int32_t>(args.narrow_rows);
    map = narrow ? &maps.narrow_b : &maps.b;
    bytes = narrow ? args.narrow_rows * kStepK : C::kBBytes;
  }
  __device__ __forceinline__ void load(const KernelArgs& args, uint32_t shared, uint32_t stage, uint32_t barrier, int32_t k) const {
    tma_load_2d_policy(shared + args.b_at() + stage * C::kBBytes, map, barrier, k, row, policy);
  }
};

// Where b is settled: its codes for every stage of the ring, while the kernels ahead run; until those have ended no faster than device
// memory gives them, as what those kernels ask for waits in the same queues.
template <class C>
__device__ __forceinline__ void fill_ring(const Maps& maps, const KernelArgs& args, uint32_t shared, uint32_t full,
                                          const volatile uint32_t& others_ended) {
  const Part part = part_of<C>(args);
  const int64_t begin = clock64();
  uint32_t stage = 0;
  for (int32_t row = part.begin; row < part.end; row += C::kTileN) {
    const CodesOfB<C> b(maps, args, part, row);
    for (int32_t k = 0; k < args.steps * kStepK; k += kStepK, ++stage) {
      if (stage == args.stages) return;
      while (clock64() - begin < stage * args.ahead_clocks && !others_ended) {
      }
      barrier_arrive_expect(full + 8 * stage, b.bytes);
      b.load(args, shared, stage, full + 8 * stage, k);
    }
  }
}

template <class C>
__device__ __forceinline__ void produce(const Maps& maps, const KernelArgs& args, uint32_t shared, uint32_t full, uint32_t empty) {
  const uint32_t half = args.half(), a_bytes = args.a_bytes(), scale_bytes = args.scale_bytes[half];
  const uint32_t scales_at = shared + args.b_at() + args.stages * C::kBBytes;
  const int32_t a_row = static_cast<int32_t>(C::kRows * half);
  const float* a_scales = args.a_scales + a_row;
  const Part part = part_of<C>(args);

  Ring at;
  uint32_t filled = args.settled ? args.stages : 0;  // stages that fill_ring() sees to
  for (int32_t row = part.begin; row < part.end; row += C::kTileN) {
    const CodesOfB<C> b(maps, args, part, row);
    const float* scales = a_scales;
    for (int32_t k = 0; k < args.steps * kStepK; k += kStepK, scales += args.ld_a_scales, at.advance(args.stages)) {
      const uint32_t barrier = full + 8 * at.stage;
      barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
      if (filled > 0) {
        --filled;
        barrier_arrive_expect(barrier, a_bytes + scale_bytes);
      } else {
        if (args.settled) barrier_arrive(barrier);
        barrier_arrive_expect(barrier, b.bytes + a_bytes + scale_bytes);
        b.load(args, shared, at.stage, barrier, k);
      }
      tma_load_2d(shared + at.stage * a_bytes, &maps.a, barrier, k, a_row);
      bulk_load(scales_at + at.stage * C::kScaleBytes, scales, scale_bytes, barrier);
    }
    for (int32_t step = args.steps; step < C::kLeastSteps; ++step, at.advance(args.stages)) {  // empty stages
      barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
      barrier_arrive(full + 8 * at.stage);
    }
  }
  let_next_kernel_start();  // device memory has all this block's requests
}

template <int kValue>
using Index = std::integral_constant<int, kValue>;

// b's scales for 32 steps, one a lane: of the group of 128 rows that holds the tile's first column, and of the next one.
struct LaneScales {
  float near = 0.0f, far = 0.0f;
};

__device__ __forceinline__ LaneScales load_b_scales(const KernelArgs& args, int32_t row, int32_t step, uint32_t lane) {
  LaneScales scales;
  const int32_t group = row / 128, at = step + static_cast<int32_t>(lane);
  if (at < args.steps) {
    scales.near = __ldcg(args.b_scales + min(group, args.scale_rows - 1) * args.ld_b_scales + at);
    scales.far = __ldcg(args.b_scales + min(group + 1, args.scale_rows - 1) * args.ld_b_scales + at);
  }
  return scales;
}

// Into the L2 cache: by one thread the first codes of the block's first tile (of two blocks that share it, the second the next ones), ...
template <class C>
__device__ __forceinline__ void prefetch_first_codes(const KernelArgs& args) {
  const Part part = part_of<C>(args);
  const uint8_t* at = args.b + part.begin * args.ldb + args.half() * args.ahead_bytes;
  for (int32_t rows = min(part.end - part.begin, C::kTileN); rows > 0; --rows, at += args.ldb) bulk_prefetch_l2(at, args.ahead_bytes);
}

// ... by one warp its scales.
template <class C>
__device__ __forceinline__ void prefetch_first_scales(const KernelArgs& args, uint32_t lane) {
  constexpr int32_t kLine = 32;  // floats
  const int32_t index = static_cast<int32_t>(lane);
  const int32_t group = min(part_of<C>(args).begin / 128 + index % 2, args.scale_rows - 1);
  if (index / 2 * kLine < args.steps) prefetch_l2(args.b_scales + group * args.ld_b_scales + index / 2 * kLine);
}

// A lane's scales for one step and row block: of its two rows times b's near or far one.
struct StepScales {
  float upper, lower, far_upper, far_lower;
};

// acc += partial * scale. Blocks of 8 columns from `split` on lie in the far group.
template <class C>
__device__ __forceinline__ void promote(float (&acc)[C::kTileN / 2], const float (&partial)[C::kTileN / 2], const StepScales& s,
                                        int split) {
#pragma unroll
  for (int j = 0; j < C::kTileN / 8; ++j) {
    const bool far = j >= split;
    const float upper = far ? s.far_upper : s.upper, lower = far ? s.far_lower : s.lower;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      acc[4 * j + c] = fmaf(partial[4 * j + c], upper, acc[4 * j + c]);
      acc[4 * j + 2 + c] = fmaf(partial[4 * j + 2 + c], lower, acc[4 * j + 2 + c]);
    }
  }
}

template <class C, class Epilogue>
__device__ __forceinline__ void multiply(const KernelArgs& args, const Epilogue& epilogue, const uint8_t* memory, uint32_t shared,
                                         uint32_t full, uint32_t empty) {
  constexpr int kCount = C::kTileN / 2;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t team = warp_uniform(threadIdx.x / kTeamThreads), lane_row = threadIdx.x / 32 * 16 + lane / 4;  // its upper row
  const uint32_t a_at = shared + team * kTeamRows * kStepK, b_at = args.b_at();
  const Part part = part_of<C>(args);
  const float* a_scales = reinterpret_cast<const float*>(memory + b_at + args.stages * C::kBBytes) + lane_row;

  Ring asked, done;  // the stage whose products start next, and the one whose products are promoted next
  LaneScales b_scales, next_b_scales;
  next_b_scales = load_b_scales(args, part.begin, 0, lane);
  for (int32_t column = part.begin; column < part.end; column += C::kTileN) {
    const int split = (128 - column % 128) / 8;

    float acc[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) acc[i] = 0.0f;

    // Partial sums of a step: started, ...
    auto start = [&](float (&partial)[kCount]) __attribute__((always_inline)) {
      barrier_wait(full + 8 * asked.stage, asked.parity);
      const uint64_t a = wgmma_operand(a_at + asked.stage * args.a_bytes());
      const uint64_t b = wgmma_operand(shared + b_at + asked.stage * C::kBBytes);
      pin_registers(partial);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStepK; k += 32) {
        Wgmma<C::kTileN>::multiply(partial, wgmma_operand_offset(a, k), wgmma_operand_offset(b, k), k > 0);
      }
      wgmma_commit();
      asked.advance(args.stages);
    };
    // ... their scales read while the tensor core works, ...
    int32_t step = 0;
    auto read_scales = [&]() __attribute__((always_inline)) {
      if (step % 32 == 0) {
        b_scales = next_b_scales;
        const bool last = step + 32 >= args.steps;
        next_b_scales = load_b_scales(args, last ? column + C::kTileN : column, last ? 0 : step + 32, lane);
      }
      const float* at = a_scales + done.stage * (C::kScaleBytes / 4);
      const float upper = at[0], lower = at[8];
      const float near = __shfl_sync(0xFFFFFFFFu, b_scales.near, step % 32);
      const float far = __shfl_sync(0xFFFFFFFFu, b_scales.far, step % 32);
      return StepScales{upper * near, lower * near, upper * far, lower * far};
    };
    // ... and, once the products have arrived, promoted. The stage goes back first.
    auto finish = [&](float (&partial)[kCount], const StepScales& scales) __attribute__((always_inline)) {
      pin_registers(partial);
      __syncwarp();  // every lane has read the stage
      if (lane == 0) barrier_arrive(empty + 8 * done.stage);
      done.advance(args.stages);
      if (C::kLeastSteps == 1 || step < args.steps) promote<C>(acc, partial, scales, split);
      ++step;
    };

    // Products go through the sets in turn, kSets - 1 of them under way. No branch lies between one's start and the next wait.
    auto run = [&]() __attribute__((always_inline)) {
      constexpr int kUnderWay = C::kSets - 1;
      float partial[C::kSets][kCount];
#pragma unroll
      for (int i = 0; i < kUnderWay; ++i) start(partial[i]);
      auto turn = [&](auto set) __attribute__((always_inline)) {
        constexpr int kSet = set, kNew = (kSet + kUnderWay) % C::kSets;
        if (step == max(args.steps, C::kLeastSteps) - kUnderWay) {  // all are started
          wgmma_wait_all();
#pragma unroll
          for (int j = kSet; j < kSet + kUnderWay; ++j) finish(partial[j % C::kSets], read_scales());
          return false;
        }
        start(partial[kNew]);
        const StepScales scales = read_scales();
        wgmma_wait<kUnderWay>();
        finish(partial[kSet], scales);
        return true;
      };
      while (turn(Index<0>{}) && turn(Index<1>{})) {
        if constexpr (C::kSets > 2) {
          if (!turn(Index<2>{})) return;
        }
        if constexpr (C::kSets > 3) {
          if (!turn(Index<3>{})) return;
        }
      }
    };
    if (args.steps > 0) run();

    epilogue.take(acc, static_cast<int32_t>(C::kRows * args.half() + lane_row), column, part.end, lane);
    __syncwarp();  // the next tile's matrix instructions want whole warps
  }
}

template <class C, class Epilogue>
__global__ void __launch_bounds__(C::kThreads, C::kTeams == 1 ? 2 : 1)
    fp8_gemm_small_kernel(const __grid_constant__ Maps maps, const __grid_constant__ KernelArgs args,
                          const __grid_constant__ Epilogue epilogue) {
  extern __shared__ uint8_t unaligned[];
  __shared__ Barriers barriers;
  __shared__ volatile uint32_t others_ended;  // the kernels ahead
  uint8_t* memory = unaligned + (-shared_address(unaligned) & (kAtomBytes - 1));
  const uint32_t shared = shared_address(memory), full = shared_address(barriers.full), empty = shared_address(barriers.empty);
  const uint32_t warp = warp_uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const bool producer = warp == 4 * C::kTeams, filler = warp == 4 * C::kTeams + 1;

  if (producer && args.steps > 0 && elect_lane()) {  // without steps the maps are not filled in
    tma_prefetch_map(&maps.b);
    tma_prefetch_map(&maps.narrow_b);
    tma_prefetch_map(&maps.a);
  }
  if (warp == 3) {
    prefetch_first_scales<C>(args, lane);
    epilogue.prefetch(part_of<C>(args).begin, C::kTileN, lane);
  }
  if (warp < 2 && elect_lane()) {
    const uint32_t arrivals = warp == 0 ? 1 + args.settled : 4 * C::kTeams;  // the producer's, the filler's; one lane's of each math warp
    for (uint32_t stage = 0; stage < args.stages; ++stage) barrier_init((warp == 0 ? full : empty) + 8 * stage, arrivals);
    barrier_init_fence();
  }
  if (threadIdx.x == 0) others_ended = 0;
  __syncthreads();

  const auto wanted = [&] { return epilogue.wanted(static_cast<int32_t>(C::kRows * args.half()), C::kRows, lane); };
  if (filler) {
    if (args.settled && elect_lane()) fill_ring<C>(maps, args, shared, full, others_ended);
  } else if (producer) {
    if (args.steps == 0) return;
    if (!args.settled && args.ahead_bytes > 0 && elect_lane()) prefetch_first_codes<C>(args);
    wait_for_earlier_kernels();
    others_ended = 1;
    if (wanted() && elect_lane()) produce<C>(maps, args, shared, full, empty);
  } else {
    wait_for_earlier_kernels();
    if (wanted()) multiply<C>(args, epilogue, memory, shared, full, empty);
  }
}

// The operands, sizes and strides of `args`; its result is the epilogue's.
template <class C, class Epilogue>
void launch_fp8_gemm_small(const Fp8GemmArgs& args, const Epilogue& epilogue, const Fp8GemmSmallPlan& plan, int device,
                           cudaStream_t stream) {
  constexpr auto kernel = fp8_gemm_small_kernel<C, Epilogue>;
  allow_shared_memory<kernel>(kFp8GemmSmallShared, device, "fp8_gemm: reserving shared memory (this kernel needs a Hopper GPU)");

  const int64_t parts = plan.grid / plan.halves, units = (args.n + C::kUnit - 1) / C::kUnit, least = units / parts * C::kUnit;
  KernelArgs kernel_args{};
  kernel_args.a_scales = args.a_scales;
  kernel_args.b_scales = args.b_scales;
  kernel_args.b = args.b;
  kernel_args.ld_a_scales = args.ld_a_scales;
  kernel_args.ld_b_scales = args.ld_b_scales;
  kernel_args.ldb = args.ldb;
  kernel_args.n = static_cast<int32_t>(args.n);
  kernel_args.least = static_cast<uint32_t>(units / parts);
  kernel_args.more = static_cast<uint32_t>(units % parts);
  kernel_args.narrow_rows = static_cast<uint32_t>(least - (least - 1) / C::kTileN * C::kTileN);
  kernel_args.steps = static_cast<int32_t>((args.k + kStepK - 1) / kStepK);
  kernel_args.halves = static_cast<uint32_t>(plan.halves);
  kernel_args.rows = static_cast<uint32_t>(plan.rows);
  kernel_args.settled = args.settled && kernel_args.steps >= C::kLeastSteps ? 1 : 0;
  kernel_args.stages = static_cast<uint32_t>(fp8_gemm_small_stages(plan, args.n, args.k, kernel_args.settled));
  kernel_args.ahead_clocks = static_cast<uint32_t>(C::kBBytes / fp8_gemm_small_ahead_rate(plan.rows));
  kernel_args.ahead_bytes =
      static_cast<uint32_t>(std::min<int64_t>(kFp8GemmSmallAhead / C::kTileN / 128 * 128, args.k / plan.halves / 16 * 16));
  const int64_t block_rows = plan.halves == 2 ? C::kRows : std::max<int64_t>(args.m, 1);
  const auto scale_bytes = [&](int64_t rows) { return static_cast<uint32_t>((rows + 3) / 4 * 16); };
  kernel_args.scale_bytes[0] = scale_bytes(std::min(args.m, block_rows));
  kernel_args.scale_bytes[1] = scale_bytes(std::max<int64_t>(args.m - block_rows, 0));
  kernel_args.scale_rows = static_cast<int32_t>((args.n + 127) / 128);

  Maps maps{};  // unused when k is 0
  if (kernel_args.steps > 0) {
    maps.a = fp8_gemm_codes_map(args.a, args.m, args.k, args.lda, plan.rows);
    maps.b = fp8_gemm_codes_map(args.b, args.n, args.k, args.ldb, C::kTileN);
    const int narrow = static_cast<int>(kernel_args.narrow_rows);
    maps.narrow_b = narrow == C::kTileN ? maps.b : fp8_gemm_codes_map(args.b, args.n, args.k, args.ldb, narrow);
  }

  cudaLaunchAttribute attributes[] = {early_start()};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid);
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = kFp8GemmSmallShared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, maps, kernel_args, epilogue), "fp8_gemm: launching the kernel");
}

}  // namespace
}  // namespace eightfold
