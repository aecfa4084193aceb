// The product of fp8_gemm.h for at most 128 rows of a: a stream of b's codes with a little arithmetic beside it.
//
//   floor     n * k bytes of codes at the rate of device memory; a and out are small beside them. 16 MB is 5.5 us, so the start and
//             the end of a kernel count as much as its loop.
//   block     one tile of `width` rows of b at a time and 64 rows of a, the matrix instruction's fixed side (above 64 rows two
//             neighbours have a tile together, half of a each); the width of b is its free one. The width is chosen so that whole waves of
//             tiles load all multiprocessors alike. Only the rows that a has are loaded; the others are whatever shared memory holds, and
//             so are their results, which nobody stores.
//   producer  one thread brings 128 of K a stage into a ring: b's codes, read once; a's codes, from the L2 cache, in shares that
//             each block of a cluster sends to all when a is large; a's scales.
//   math      one warpgroup. For each stage: 4 wgmma (32 of K each) from zero into one of two or four sets of registers,
//             while the oldest set is promoted: acc += partial * (sa * sb). The tensor core always has the next products queued,
//             so a stage costs no round trip. The same operations in the same order as the large kernel's (fp8_gemm_sm90.cu), so the
//             same bits.
//   overlap   the next kernel's blocks start where they find room once this one's last loads are asked for: they set up their
//             barriers, ask the L2 cache for the first codes of b, and wait for this kernel's end. A block takes all of a
//             multiprocessor's shared memory, for loads under way: two blocks with half each, which overlap sooner, were slower.
//
// The tail of K arrives as zero codes with valid scales: it adds 0 * scale, which is NaN exactly when the block's scale is.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "core/barrier.cuh"
#include "core/cluster.cuh"
#include "core/cuda_check.h"
#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "core/tma.cuh"
#include "core/tma_stream.cuh"
#include "core/wgmma.cuh"
#include "core/wgmma_narrow.cuh"
#include "gemm/fp8_gemm_epilogue.cuh"
#include "gemm/fp8_gemm_launch.h"
#include "gemm/fp8_gemm_maps.h"
#include "gemm/fp8_gemm_small.h"

namespace eightfold {
namespace {

constexpr int kStepK = kFp8GemmStepK;
constexpr int kAtomBytes = 1024;  // alignment of a swizzled tile
constexpr int kScaleBytes = 64 * 4;
constexpr int kMathWarps = 4;
constexpr int kThreads = 32 * (kMathWarps + 1);
constexpr int kMaxStages = 24;
constexpr int kSharedBytes = 231424;  // dynamic
constexpr int kAheadBytes = 32768;    // of b's codes that a block asks the L2 cache for while it waits for the kernels ahead

template <int kWidth>
struct Config {
  static constexpr int kTileN = kWidth;
  static constexpr int kBBytes = kTileN * kStepK;
  static constexpr bool kTwoScales = 128 % kTileN != 0;  // a tile may reach into a second group of 128 rows of b
  static constexpr int kSets = kTileN <= 56 ? 4 : 2;     // of partial sums; more would not fit the registers
  static constexpr int kLeastSteps = kSets - 1;
  static_assert(kBBytes % kAtomBytes == 0, "swizzled tiles are whole atoms");
};

struct KernelArgs {
  GemmOutput output;
  const float* a_scales;
  const float* b_scales;
  int64_t ld_a_scales, ld_b_scales;
  uint32_t tiles;    // of b, a multiple of the cluster
  int32_t steps;     // ceil(k / 128)
  uint32_t cluster;  // blocks that share loads
  uint32_t halves;   // 2: neighbours in a cluster have the same tile and 64 rows of a each
  uint32_t rows;     // of a in a stage
  uint32_t stages;
  int32_t ahead;            // steps whose codes of b are asked for before the kernels ahead have ended
  uint32_t scale_bytes[2];  // of a's scales for 128 of K, in each half
  int32_t scale_rows;       // of b_scales

  // Offsets in shared memory: each array holds all stages. a comes first: the rows that are not loaded are read past its end.
  __device__ __forceinline__ uint32_t a_bytes() const { return rows * kStepK; }
  __device__ __forceinline__ uint32_t b_at() const { return stages * a_bytes(); }
  __device__ __forceinline__ uint32_t half() const { return halves == 2 ? blockIdx.x % 2 : 0; }
  __device__ __forceinline__ uint32_t first_tile() const { return blockIdx.x / halves; }
  __device__ __forceinline__ uint32_t tile_stride() const { return gridDim.x / halves; }
};

struct Ring {
  uint32_t stage = 0, parity = 0;

  __device__ __forceinline__ void advance(uint32_t stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Barriers {
  uint64_t full[kMaxStages], empty[kMaxStages];
};

template <class C>
__device__ __forceinline__ void produce(const CUtensorMap* a, const CUtensorMap* b, const KernelArgs& args, uint32_t shared, uint32_t full,
                                        uint32_t empty) {
  const uint64_t once = l2_evict_first();
  const uint32_t rank = args.cluster > 1 ? cluster_rank() : 0, half = args.half();
  // This block's share of a: for the blocks of its half, every halves-th of the cluster. Of b: for the two of its tile.
  const uint32_t sharers = args.cluster / args.halves, share_rows = args.rows / sharers, a_from = rank / args.halves * share_rows;
  const uint32_t everyone = (1u << args.cluster) - 1;
  const auto a_blocks = static_cast<uint16_t>((args.halves == 2 ? 0x5555u << half : 0xFFFFu) & everyone);
  const auto b_blocks = static_cast<uint16_t>(3u << (rank & ~1u));
  const uint32_t a_bytes = args.a_bytes(), b_from = half * (C::kTileN / 2);
  const uint32_t b_at = shared + args.b_at(), scales_at = b_at + args.stages * C::kBBytes;
  const uint32_t bytes = a_bytes + C::kBBytes + args.scale_bytes[half];
  const float* a_scales = args.a_scales + 64 * half;

  Ring at;
  for (uint32_t tile = args.first_tile(); tile < args.tiles; tile += args.tile_stride()) {
    for (int32_t step = 0; step < args.steps; ++step, at.advance(args.stages)) {
      const uint32_t barrier = full + 8 * at.stage;
      barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
      barrier_arrive_expect(barrier, bytes);
      const uint32_t a_to = shared + at.stage * a_bytes, b_to = b_at + at.stage * C::kBBytes;
      const int32_t k = step * kStepK, column = tile * C::kTileN;
      if (args.halves == 2) {
        tma_load_2d_multicast_policy(b_to + b_from * kStepK, b, barrier, k, column + b_from, b_blocks, once);
      } else {
        tma_load_2d_policy(b_to, b, barrier, k, column, once);
      }
      if (sharers > 1) {
        tma_load_2d_multicast(a_to + a_from * kStepK, a, barrier, k, 64 * half + a_from, a_blocks);
      } else {
        tma_load_2d(a_to, a, barrier, k, 64 * half);
      }
      bulk_load(scales_at + at.stage * kScaleBytes, a_scales + step * args.ld_a_scales, args.scale_bytes[half], barrier);
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

template <class C>
__device__ __forceinline__ LaneScales load_b_scales(const KernelArgs& args, uint32_t tile, int32_t step, uint32_t lane) {
  LaneScales scales;
  const int32_t group = static_cast<int32_t>(tile * C::kTileN / 128), at = step + static_cast<int32_t>(lane);
  if (tile < args.tiles && at < args.steps) {
    scales.near = __ldcg(args.b_scales + min(group, args.scale_rows - 1) * args.ld_b_scales + at);
    if (C::kTwoScales) scales.far = __ldcg(args.b_scales + min(group + 1, args.scale_rows - 1) * args.ld_b_scales + at);
  }
  return scales;
}

// Into the L2 cache: b's scales and the bias of the block's first tile. Two warps of threads are enough.
template <class C>
__device__ __forceinline__ void prefetch_first_scales(const KernelArgs& args) {
  constexpr int32_t kLine = 32;  // floats
  const int32_t column = static_cast<int32_t>(args.first_tile()) * C::kTileN, thread = static_cast<int32_t>(threadIdx.x) - 32;
  const int32_t group = min(column / 128 + thread % 2, args.scale_rows - 1), at = thread / 2 * kLine;
  if (at < args.steps) prefetch_l2(args.b_scales + group * args.ld_b_scales + at);
  const GemmOutput& o = args.output;
  const int32_t bytes = o.bias_type == DType::f32 ? 4 : 2, biased = column + thread * kLine;
  if (o.bias != nullptr && thread * kLine < C::kTileN && biased < o.n)
    prefetch_l2(static_cast<const uint8_t*>(o.bias) + biased * int64_t{bytes});
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
    const bool far = C::kTwoScales && j >= split;
    const float upper = far ? s.far_upper : s.upper, lower = far ? s.far_lower : s.lower;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      acc[4 * j + c] = fmaf(partial[4 * j + c], upper, acc[4 * j + c]);
      acc[4 * j + 2 + c] = fmaf(partial[4 * j + 2 + c], lower, acc[4 * j + 2 + c]);
    }
  }
}

__device__ __forceinline__ float bias_at(const GemmOutput& o, int32_t column) {
  const int32_t at = min(column, o.n - 1);
  return o.bias_type == DType::f32 ? static_cast<const float*>(o.bias)[at]
                                   : __bfloat162float(static_cast<const __nv_bfloat16*>(o.bias)[at]);
}

// Writes 64 rows of a tile; `row` is the lane's upper row. Four lanes hold 32 columns of a row as words of two; traded among
// them, each writes 16 bytes. All lanes of a warp call it.
template <int kCount>
__device__ __forceinline__ void write_tile(const GemmOutput& o, float (&acc)[kCount], int32_t row, int32_t column, uint32_t lane) {
  constexpr int kColumnBlocks = kCount / 4;
  if (o.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float value = bias_at(o, column + 8 * j + 2 * static_cast<int32_t>(lane % 4) + c);
        acc[4 * j + c] += value;
        acc[4 * j + 2 + c] += value;
      }
    }
  }
  if (o.type == DType::f32) return store_f32(o, acc, row, column, lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + 8 * half;
#pragma unroll
    for (int first = 0; first < kColumnBlocks; first += 4) {
      uint32_t w[4] = {};
#pragma unroll
      for (int j = 0; j < 4 && first + j < kColumnBlocks; ++j) {
        w[j] = pack_bf16(acc[4 * (first + j) + 2 * half], acc[4 * (first + j) + 2 * half + 1]);
      }
      transpose_quad(w, lane);
      const int block = first + static_cast<int>(lane % 4);
      const int64_t at = column + 8 * block;
      if (r >= o.m || at >= o.n || block >= kColumnBlocks) continue;
      __nv_bfloat16* out = static_cast<__nv_bfloat16*>(o.out) + r * o.ld + at;
      *reinterpret_cast<uint4*>(out) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

template <class C>
__device__ __forceinline__ void multiply(const KernelArgs& args, const uint8_t* memory, uint32_t shared, uint32_t full, uint32_t empty) {
  constexpr int kCount = C::kTileN / 2;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t lane_row = threadIdx.x / 32 * 16 + lane / 4;  // the lane's upper row among 64
  const uint32_t b_at = args.b_at();
  const float* a_scales = reinterpret_cast<const float*>(memory + b_at + args.stages * C::kBBytes) + lane_row;

  Ring asked, done;  // the stage whose products start next, and the one whose products are promoted next
  LaneScales b_scales, next_b_scales;
  if (args.steps > 0) next_b_scales = load_b_scales<C>(args, args.first_tile(), 0, lane);
  for (uint32_t tile = args.first_tile(); tile < args.tiles; tile += args.tile_stride()) {
    const int32_t column = static_cast<int32_t>(tile) * C::kTileN;
    const int split = (128 - column % 128) / 8;

    float acc[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) acc[i] = 0.0f;

    // Partial sums of a step: started, ...
    auto start = [&](float (&partial)[kCount]) __attribute__((always_inline)) {
      barrier_wait(full + 8 * asked.stage, asked.parity);
      const uint64_t a = wgmma_operand(shared + asked.stage * args.a_bytes());
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
        next_b_scales = load_b_scales<C>(args, last ? tile + args.tile_stride() : tile, last ? 0 : step + 32, lane);
      }
      const float* at = a_scales + done.stage * (kScaleBytes / 4);
      const float upper = at[0], lower = at[8];
      const float near = __shfl_sync(0xFFFFFFFFu, b_scales.near, step % 32);
      const float far = C::kTwoScales ? __shfl_sync(0xFFFFFFFFu, b_scales.far, step % 32) : 0.0f;
      return StepScales{upper * near, lower * near, upper * far, lower * far};
    };
    // ... and, once the products have arrived, promoted. The stage goes back first.
    auto finish = [&](float (&partial)[kCount], const StepScales& scales) __attribute__((always_inline)) {
      pin_registers(partial);
      __syncwarp();  // every lane has read the stage
      const uint32_t barrier = empty + 8 * done.stage;
      if (args.cluster == 1) {
        if (lane == 0) barrier_arrive(barrier);
      } else if (lane < args.cluster) {
        cluster_barrier_arrive(cluster_address(barrier, lane));
      }
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
        if constexpr (C::kSets == 4) {
          if (!turn(Index<2>{}) || !turn(Index<3>{})) return;
        }
      }
    };
    if (args.steps > 0) run();

    write_tile(args.output, acc, static_cast<int32_t>(64 * args.half() + lane_row), column, lane);
    __syncwarp();  // the next tile's matrix instructions want whole warps
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    fp8_gemm_small_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                          const __grid_constant__ KernelArgs args) {
  extern __shared__ uint8_t unaligned[];
  __shared__ Barriers barriers;
  uint8_t* memory = unaligned + (-shared_address(unaligned) & (kAtomBytes - 1));
  const uint32_t shared = shared_address(memory), full = shared_address(barriers.full), empty = shared_address(barriers.empty);
  const bool producer = warp_uniform(threadIdx.x / 32) == kMathWarps;

  if (producer) {
    if (elect_lane() && args.steps > 0) {  // else the maps are not filled in
      tma_prefetch_map(&b);
      tma_prefetch_map(&a);
      const uint32_t b_from = args.half() * (C::kTileN / 2);  // the map's box is what a block loads
      for (int32_t step = 0; step < args.ahead; ++step) tma_prefetch_2d(&b, step * kStepK, args.first_tile() * C::kTileN + b_from);
    }
    __syncwarp();
  } else if (threadIdx.x >= 32) {
    prefetch_first_scales<C>(args);
  } else if (threadIdx.x == 0) {
    for (uint32_t stage = 0; stage < args.stages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, kMathWarps * args.cluster);  // one lane of each math warp of the cluster
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (args.cluster > 1) cluster_meet();
  wait_for_earlier_kernels();

  if (producer) {
    if (args.steps > 0 && elect_lane()) produce<C>(&a, &b, args, shared, full, empty);
    __syncwarp();
  } else {
    multiply<C>(args, memory, shared, full, empty);
  }
  // The other block arrives at this one's barriers until it has read its last stage; ordered, or such an arrival could come after the end.
  if (args.cluster > 1) cluster_sync();
}

template <class C>
void launch(const Fp8GemmArgs& args, const Fp8GemmSmallPlan& plan, int device, cudaStream_t stream) {
  constexpr auto kernel = fp8_gemm_small_kernel<C>;
  allow_shared_memory<kernel>(kSharedBytes, device, "fp8_gemm: reserving shared memory (this kernel needs a Hopper GPU)");

  KernelArgs kernel_args{};
  kernel_args.output = gemm_output(args);
  kernel_args.a_scales = args.a_scales;
  kernel_args.b_scales = args.b_scales;
  kernel_args.ld_a_scales = args.ld_a_scales;
  kernel_args.ld_b_scales = args.ld_b_scales;
  kernel_args.tiles = static_cast<uint32_t>(plan.tiles);
  kernel_args.steps = static_cast<int32_t>((args.k + kStepK - 1) / kStepK);
  kernel_args.cluster = static_cast<uint32_t>(plan.cluster);
  kernel_args.halves = static_cast<uint32_t>(plan.halves);
  kernel_args.rows = static_cast<uint32_t>(plan.rows);
  const uint32_t stage_bytes = kernel_args.rows * kStepK + C::kBBytes + kScaleBytes;
  kernel_args.stages = std::min<uint32_t>(kMaxStages, (kSharedBytes - kAtomBytes) / stage_bytes);
  kernel_args.ahead = std::min(kernel_args.steps, kAheadBytes / C::kBBytes);
  const auto scale_bytes = [&](int64_t rows) { return static_cast<uint32_t>((rows + 3) / 4 * 16); };
  kernel_args.scale_bytes[0] = scale_bytes(std::min<int64_t>(args.m, 64));
  kernel_args.scale_bytes[1] = scale_bytes(std::max<int64_t>(args.m - 64, 0));
  kernel_args.scale_rows = static_cast<int32_t>((args.n + 127) / 128);

  CUtensorMap a{}, b{};  // unused when k is 0
  if (kernel_args.steps > 0) {
    a = fp8_gemm_codes_map(args.a, args.m, args.k, args.lda, plan.rows * plan.halves / plan.cluster);
    b = fp8_gemm_codes_map(args.b, args.n, args.k, args.ldb, C::kTileN / plan.halves);
  }

  cudaLaunchAttribute attributes[2] = {};
  attributes[0] = early_start();
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = plan.cluster > 1 ? 2 : 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, a, b, kernel_args), "fp8_gemm: launching the kernel");
}

}  // namespace

void fp8_gemm_small_sm90(const Fp8GemmArgs& args, int device, cudaStream_t s) {
  const Fp8GemmSmallPlan plan = fp8_gemm_small_plan(args.m, args.n, args.k, multiprocessors(device));
  switch (plan.width) {
    case 112: return launch<Config<112>>(args, plan, device, s);
    case 96: return launch<Config<96>>(args, plan, device, s);
    case 80: return launch<Config<80>>(args, plan, device, s);
    case 64: return launch<Config<64>>(args, plan, device, s);
    case 56: return launch<Config<56>>(args, plan, device, s);
    case 48: return launch<Config<48>>(args, plan, device, s);
    case 40: return launch<Config<40>>(args, plan, device, s);
    default: return launch<Config<32>>(args, plan, device, s);
  }
}

}  // namespace eightfold
