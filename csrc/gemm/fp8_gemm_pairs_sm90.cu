// Large products on Hopper: a persistent, warp-specialised kernel of block pairs.
//
//   pairs                two blocks on neighbouring multiprocessors take tiles that share rows of a (or of b): each fetches half
//                        of the shared operand and the copy engine hands it to both, which cuts the reads from L2 by a third.
//   producer warpgroup   one thread walks the block's tiles and, for each 128 of K, has the copy engine bring codes and scales
//                        into a ring of stages. A stage is free when the math warps of both blocks have read it.
//   math warpgroups      two or three share the tile's rows. For each stage: 4 wgmma (32 of K each) from zero into `partial`, wait,
//                        acc += partial * (sa * sb) in fp32, give the stage back.
//   results              leave warp by warp while the tensor cores are already at the next tile.
//
// The order of additions is fp8_gemm_sm90.cu's.
#include <cuda.h>
#include <cuda_runtime.h>

#include "core/barrier.cuh"
#include "core/cluster.cuh"
#include "core/cuda_check.h"
#include "core/device.h"
#include "core/memory.cuh"
#include "core/tma.cuh"
#include "core/wgmma.cuh"
#include "gemm/fp8_gemm_epilogue.cuh"
#include "gemm/fp8_gemm_launch.h"
#include "gemm/fp8_gemm_maps.h"

namespace eightfold {
namespace {

constexpr int kStepK = kFp8GemmStepK;
constexpr int kSharedBytes = 232448;  // what a block may ask for on Hopper
constexpr int kAtomBytes = 1024;      // alignment of a swizzled tile
constexpr int kTileN = 128;

// kBlocks: 64-row blocks of a math warpgroup; kPartials: products under way at once in a warpgroup.
template <int kMathGroups_, int kBlocks_, int kPartials_, bool kColumnScales_>
struct Config {
  static constexpr int kMathGroups = kMathGroups_, kBlocks = kBlocks_, kPartials = kPartials_;
  static constexpr bool kColumnScales = kColumnScales_;
  static constexpr int kTileM = 64 * kBlocks * kMathGroups;
  static constexpr int kThreads = 128 * (kMathGroups + 1);
  static constexpr int kProducerRegisters = kMathGroups == 2 ? 40 : 32;
  static constexpr int kMathRegisters = kMathGroups == 2 ? 232 : 160;

  static constexpr int kABytes = kTileM * kStepK, kBBytes = kTileN * kStepK;
  static constexpr int kAScaleBytes = kTileM * 4, kBScaleBytes = kColumnScales ? kTileN * 4 : 0;
  static constexpr int kStageBytes = kABytes + kBBytes + kAScaleBytes + kBScaleBytes;
  // Room in which a warp turns finished registers into rows. Little, because stages are worth more.
  static constexpr int kWarpStaging = kMathGroups == 3 ? 1024 : 2048;
  static constexpr int kStaging = 4 * kMathGroups * kWarpStaging;
  static constexpr int kStages = (kSharedBytes - kStaging - 256) / kStageBytes;  // less room for barriers

  static constexpr int kB = kStages * kABytes, kOut = kB + kStages * kBBytes, kAScales = kOut + kStaging;
  static constexpr int kBScales = kAScales + kStages * kAScaleBytes;
  static constexpr int kFull = kBScales + kStages * kBScaleBytes, kEmpty = kFull + kStages * 8;
  static constexpr int kBytes = kEmpty + kStages * 8;

  static_assert(kBytes <= kSharedBytes && kStages >= 3);
};

struct KernelArgs {
  GemmOutput output;
  const float* b_scales;
  int64_t ld_b_scales;
  uint32_t tiles_m, tiles_n, pairs;
  int32_t steps;  // ceil(k / 128), at least 1
  bool share_a;   // a pair's tiles are neighbours along n and share rows of a; else along m, and share rows of b
};

struct TileAt {
  int32_t m, n;
};

// Bands of 8 tile rows, walked along n: blocks that run together share rows of a and of b in the L2 cache.
__device__ __forceinline__ TileAt tile_at(uint32_t pair, const KernelArgs& args, uint32_t rank) {
  const uint32_t rows = args.share_a ? args.tiles_m : (args.tiles_m + 1) / 2,
                 columns = args.share_a ? (args.tiles_n + 1) / 2 : args.tiles_n;
  const uint32_t height = args.share_a ? 8 : 4;
  const uint32_t band = pair / (height * columns), rest = pair % (height * columns);
  const uint32_t in_band = min(height, rows - band * height);
  const uint32_t m = band * height + rest % in_band, n = rest / in_band;
  return {static_cast<int32_t>(args.share_a ? m : 2 * m + rank), static_cast<int32_t>(args.share_a ? 2 * n + rank : n)};
}

struct Maps {
  const CUtensorMap *a, *b, *a_scales, *b_scales;
};

template <class C>
__device__ __forceinline__ void produce(const Maps& maps, const KernelArgs& args, uint32_t shared, uint32_t rank) {
  tma_prefetch_map(maps.a);
  tma_prefetch_map(maps.b);
  tma_prefetch_map(maps.a_scales);
  if constexpr (C::kColumnScales) tma_prefetch_map(maps.b_scales);

  constexpr uint16_t kBoth = 3;
  RingPosition<C::kStages> at;
  for (uint32_t pair = blockIdx.x / 2; pair < args.pairs; pair += gridDim.x / 2) {
    const TileAt tile = tile_at(pair, args, rank);
    const int32_t row = tile.m * C::kTileM, column = tile.n * kTileN;
    for (int32_t step = 0; step < args.steps; ++step, at.advance()) {
      const uint32_t full = shared + C::kFull + 8 * at.stage;
      const uint32_t a = shared + at.stage * C::kABytes, b = shared + C::kB + at.stage * C::kBBytes;
      const int32_t k = step * kStepK;
      barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
      barrier_arrive_expect(full, C::kStageBytes);
      if (args.share_a) {
        tma_load_2d_multicast(a + rank * (C::kABytes / 2), maps.a, full, k, row + static_cast<int32_t>(rank) * (C::kTileM / 2), kBoth);
        tma_load_2d(b, maps.b, full, k, column);
      } else {
        tma_load_2d(a, maps.a, full, k, row);
        tma_load_2d_multicast(b + rank * (C::kBBytes / 2), maps.b, full, k, column + static_cast<int32_t>(rank) * (kTileN / 2), kBoth);
      }
      tma_load_2d(shared + C::kAScales + at.stage * C::kAScaleBytes, maps.a_scales, full, row, step);
      if constexpr (C::kColumnScales) {
        tma_load_2d(shared + C::kBScales + at.stage * C::kBScaleBytes, maps.b_scales, full, column, step);
      }
    }
  }
}

// b's scales of the block's tiles, step by step, where a tile has one: each lane holds one of the next 32 steps', and the 32 after
// those are on their way.
template <class C>
struct TileScales {
  const KernelArgs& args;
  const uint32_t rank, lane;
  float now, upcoming;
  int32_t step = 0;  // of the scale that next() returns
  uint32_t upcoming_pair;
  int32_t upcoming_step = 0;

  __device__ __forceinline__ TileScales(const KernelArgs& args, uint32_t rank, uint32_t lane)
      : args(args), rank(rank), lane(lane), upcoming_pair(blockIdx.x / 2) {
    fetch();
    now = upcoming;
    advance();
  }
  __device__ __forceinline__ void fetch() {
    if (C::kColumnScales || upcoming_pair >= args.pairs) return;
    const int32_t n = min(tile_at(upcoming_pair, args, rank).n, static_cast<int32_t>(args.tiles_n) - 1);
    const int32_t at = min(upcoming_step + static_cast<int32_t>(lane), args.steps - 1);
    upcoming = load_read_only(args.b_scales + n * args.ld_b_scales + at);
  }
  __device__ __forceinline__ void advance() {
    upcoming_step += 32;
    if (upcoming_step >= args.steps) {
      upcoming_step = 0;
      upcoming_pair += gridDim.x / 2;
    }
    fetch();
  }
  __device__ __forceinline__ float next() {
    if constexpr (C::kColumnScales) return 1.0f;
    const float scale = __shfl_sync(0xFFFFFFFFu, now, step);
    ++step;
    if (step % 32 == 0 || step == args.steps) {
      if (step == args.steps) step = 0;
      now = upcoming;
      advance();
    }
    return scale;
  }
};

// A math warpgroup.
template <class C>
struct Math {
  using Tile = float[kTileN / 2];

  const KernelArgs& args;
  const uint32_t shared, rank, group, lane;
  const uint32_t lane_row;  // the lane's upper row among 64
  const float* a_scales;
  const float* b_scales;
  const uint32_t empty;  // of the first stage, in block `lane` of the pair

  __device__ __forceinline__ Math(const KernelArgs& args, const uint8_t* memory, uint32_t shared, uint32_t rank, uint32_t group)
      : args(args),
        shared(shared),
        rank(rank),
        group(group),
        lane(in_register(threadIdx.x % 32)),
        lane_row(threadIdx.x / 32 % 4 * 16 + lane / 4),
        a_scales(reinterpret_cast<const float*>(memory + C::kAScales) + group * 64 * C::kBlocks + lane_row),
        b_scales(reinterpret_cast<const float*>(memory + C::kBScales) + 2 * (lane % 4)),
        empty(cluster_address(shared + C::kEmpty, lane % 2)) {}

  __device__ __forceinline__ void wait(const RingPosition<C::kStages>& at) const {
    barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
  }

  struct Operands {
    uint64_t a, b;
  };
  __device__ __forceinline__ Operands operands(uint32_t stage) const {
    return {wgmma_operand(shared + stage * C::kABytes + group * C::kBlocks * 64 * kStepK),
            wgmma_operand(shared + C::kB + stage * C::kBBytes)};
  }

  __device__ __forceinline__ void start(Tile& partial, const Operands& at, int block) const {
    const uint64_t a = wgmma_operand_offset(at.a, block * 64 * kStepK);
    pin_registers(partial);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStepK; k += 32) {
      Wgmma<kTileN>::multiply(partial, wgmma_operand_offset(a, k), wgmma_operand_offset(at.b, k), k > 0);
    }
    wgmma_commit();
  }

  // a's scales of the lane's two rows, times b's where the tile has one.
  struct Rows {
    float scales[2];
  };
  __device__ __forceinline__ Rows row_scales(uint32_t stage, int block, float b_scale) const {
    const float* at = a_scales + stage * C::kTileM + 64 * block;
    Rows rows{{at[0], at[8]}};
    if constexpr (!C::kColumnScales) {
      rows.scales[0] *= b_scale;
      rows.scales[1] *= b_scale;
    }
    pin_registers(rows.scales);
    return rows;
  }

  // Both blocks of the pair may overwrite the stage.
  __device__ __forceinline__ void release(uint32_t stage) const {
    __syncwarp();
    if (lane < 2) cluster_barrier_arrive(empty + 8 * stage);
  }

  // acc += partial * (a's scale * b's scale). Where b has one scale for the tile, `rows` holds the products already.
  __device__ __forceinline__ void promote(Tile& acc, const Tile& partial, const Rows& rows, uint32_t stage) const {
    const float2* columns = reinterpret_cast<const float2*>(b_scales + stage * kTileN);
#pragma unroll
    for (int j = 0; j < kTileN / 8; ++j) {
      float2 column = make_float2(0.0f, 0.0f);
      if constexpr (C::kColumnScales) column = columns[4 * j];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float s = c == 0 ? column.x : column.y;
        acc[4 * j + c] = fmaf(partial[4 * j + c], C::kColumnScales ? rows.scales[0] * s : rows.scales[0], acc[4 * j + c]);
        acc[4 * j + 2 + c] = fmaf(partial[4 * j + 2 + c], C::kColumnScales ? rows.scales[1] * s : rows.scales[1], acc[4 * j + 2 + c]);
      }
    }
  }

  // Writes a finished block of 64 rows and clears it.
  __device__ __forceinline__ void finish(Tile& acc, TileAt tile, int block) const {
    const int32_t row = tile.m * C::kTileM + (group * C::kBlocks + block) * 64, column = tile.n * kTileN;
    const uint32_t warp = warp_uniform(threadIdx.x / 32);
    store_rows<C::kWarpStaging>(args.output, acc, shared + C::kOut + warp * C::kWarpStaging, row + warp % 4 * 16, column, lane);
#pragma unroll
    for (int i = 0; i < kTileN / 2; ++i) acc[i] = 0.0f;
  }

  // One product under way: the other warpgroups' products fill the tensor cores while this one promotes. What else there is to do is
  // done while a product is under way: reading scales, writing a finished block of results. So the path from one product to the
  // next is the promotion alone, and the loop inside a tile stays lean.
  __device__ __forceinline__ void run_alternating() const {
    Tile acc[C::kBlocks];
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < kTileN / 2; ++i) acc[block][i] = 0.0f;
    }
    if (blockIdx.x / 2 >= args.pairs) return;
    RingPosition<C::kStages> at;
    TileScales<C> b_scales_of(args, rank, lane);
    float b_scale = b_scales_of.next();
    TileAt finished{};
    bool unwritten = false;
    bool ready = false;  // whether the step at `at` was seen to be there
    Operands next = operands(at.stage);

    // behind(block): what else to do while a block's products are under way.
    auto advance = [&](auto behind) __attribute__((always_inline)) {
      const uint32_t stage = at.stage;
      const Operands now = next;
      if (!ready) wait(at);
      at.advance();
#pragma unroll
      for (int block = 0; block < C::kBlocks; ++block) {
        const bool last = block == C::kBlocks - 1;
        Tile partial;
        start(partial, now, block);
        const Rows rows = row_scales(stage, block, b_scale);
        if (last) b_scale = b_scales_of.next();
        behind(block);
        wgmma_wait_all();
        pin_registers(partial);
        if (!C::kColumnScales && last) release(stage);
        if (last) {
          ready = barrier_passed(shared + C::kFull + 8 * at.stage, at.parity);
          next = operands(at.stage);
        }
        promote(acc[block], partial, rows, stage);
        if (C::kColumnScales && last) release(stage);
      }
    };

    for (uint32_t pair = blockIdx.x / 2; pair < args.pairs; pair += gridDim.x / 2) {
      const TileAt tile = tile_at(pair, args, rank);
      int32_t step = 0;
      for (;;) {
        const bool first = step == 0, last = step + 1 == args.steps;
        advance([&](int block) __attribute__((always_inline)) {
          if (block == 0 && first && unwritten) finish(acc[C::kBlocks - 1], finished, C::kBlocks - 1);
          if (block == 1 && last) finish(acc[0], tile, 0);
        });
        if (last) break;
        for (++step; step + 1 < args.steps; ++step) advance([](int) {});
      }
      finished = tile;
      unwritten = true;
    }
    finish(acc[C::kBlocks - 1], finished, C::kBlocks - 1);
  }

  // Two products under way: the next one is queued before this one is promoted.
  __device__ __forceinline__ void run_ahead() const {
    static_assert(C::kBlocks == 1 || C::kPartials == 1);
    uint32_t pair = blockIdx.x / 2;
    if (pair >= args.pairs) return;
    const uint32_t tiles = (args.pairs - pair + gridDim.x / 2 - 1) / (gridDim.x / 2);
    uint32_t products = tiles * args.steps;
    Tile acc, even, odd;
#pragma unroll
    for (int i = 0; i < kTileN / 2; ++i) acc[i] = 0.0f;
    RingPosition<C::kStages> at, ahead;
    TileScales<C> b_scales_of(args, rank, lane);
    TileAt tile = tile_at(pair, args, rank);
    int32_t step = 0;

    auto queue = [&](Tile& partial) __attribute__((always_inline)) {
      wait(ahead);
      start(partial, operands(ahead.stage), 0);
      ahead.advance();
    };
    auto add = [&](Tile& partial, const Rows& rows) __attribute__((always_inline)) {
      pin_registers(partial);
      if (!C::kColumnScales) release(at.stage);
      promote(acc, partial, rows, at.stage);
      if (C::kColumnScales) release(at.stage);
      at.advance();
      if (++step < args.steps) return;
      finish(acc, tile, 0);
      step = 0;
      pair += gridDim.x / 2;
      tile = tile_at(min(pair, args.pairs - 1), args, rank);
    };
    auto queue_and_add = [&](Tile& partial, Tile& next) __attribute__((always_inline)) {
      queue(next);
      const Rows rows = row_scales(at.stage, 0, b_scales_of.next());
      wgmma_wait<1>();
      add(partial, rows);
    };
    auto add_last = [&](Tile& partial) __attribute__((always_inline)) {
      const Rows rows = row_scales(at.stage, 0, b_scales_of.next());
      wgmma_wait_all();
      add(partial, rows);
    };
    queue(even);
    for (;;) {
      if (--products == 0) return add_last(even);
      queue_and_add(even, odd);
      if (--products == 0) return add_last(odd);
      queue_and_add(odd, even);
    }
  }
};

template <class C>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(C::kThreads, 1)
    fp8_gemm_pairs_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                          const __grid_constant__ CUtensorMap a_scales, const __grid_constant__ CUtensorMap b_scales,
                          const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(kAtomBytes) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const uint32_t rank = cluster_rank();
  const Maps maps{&a, &b, &a_scales, &b_scales};

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(shared + C::kFull + 8 * stage, 1);
      barrier_init(shared + C::kEmpty + 8 * stage, 2 * 4 * C::kMathGroups);  // one arrival from each math warp of the pair
    }
    barrier_init_fence();
  }
  cluster_sync();

  const uint32_t group = warp_uniform(threadIdx.x / 128);
  if (group == C::kMathGroups) {
    warpgroup_give_registers<C::kProducerRegisters>();
    if (warp_uniform(threadIdx.x / 32 % 4) == 0 && elect_lane()) produce<C>(maps, args, shared, rank);
  } else {
    warpgroup_take_registers<C::kMathRegisters>();
    const Math<C> math(args, memory, shared, rank, group);
    if constexpr (C::kPartials == 2) {
      math.run_ahead();
    } else {
      math.run_alternating();
    }
  }
  cluster_sync();  // the other block still arrives at this one's barriers
}

template <class C>
void launch(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  allow_shared_memory<fp8_gemm_pairs_kernel<C>>(C::kBytes, device, "fp8_gemm: reserving shared memory (this kernel needs a Hopper GPU)");
  const int64_t steps = (args.k + kStepK - 1) / kStepK;
  const CUtensorMap a = fp8_gemm_codes_map(args.a, args.m, args.k, args.lda, C::kTileM / (plan.share_a ? 2 : 1));
  const CUtensorMap b = fp8_gemm_codes_map(args.b, args.n, args.k, args.ldb, kTileN / (plan.share_a ? 1 : 2));
  const CUtensorMap a_scales = fp8_gemm_scales_map(args.a_scales, args.m, steps, args.ld_a_scales, C::kTileM);
  CUtensorMap b_scales{};
  if (C::kColumnScales) b_scales = fp8_gemm_scales_map(args.b_scales, args.n, steps, args.ld_b_scales, kTileN);

  KernelArgs kernel_args;
  kernel_args.output = gemm_output(args);
  kernel_args.b_scales = args.b_scales;
  kernel_args.ld_b_scales = args.ld_b_scales;
  kernel_args.tiles_m = static_cast<uint32_t>(plan.tiles_m);
  kernel_args.tiles_n = static_cast<uint32_t>(plan.tiles_n);
  kernel_args.pairs = static_cast<uint32_t>(plan.units);
  kernel_args.steps = static_cast<int32_t>(steps);
  kernel_args.share_a = plan.share_a;
  fp8_gemm_pairs_kernel<C><<<plan.grid, C::kThreads, C::kBytes, stream>>>(a, b, a_scales, b_scales, kernel_args);
  cuda_check(cudaGetLastError(), "fp8_gemm: launching the kernel");
}

// Two math warpgroups with 128 rows each, three with 64, or two with 64 and two products under way.
template <bool kColumnScales>
void launch_rows(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  switch (plan.tile_m) {
    case 256: return launch<Config<2, 2, 1, kColumnScales>>(args, plan, device, stream);
    case 192: return launch<Config<3, 1, 1, kColumnScales>>(args, plan, device, stream);
    default: return launch<Config<2, 1, 2, kColumnScales>>(args, plan, device, stream);
  }
}

}  // namespace

void fp8_gemm_pairs_sm90(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  args.b_group_rows == 1 ? launch_rows<true>(args, plan, device, stream) : launch_rows<false>(args, plan, device, stream);
}

}  // namespace eightfold
