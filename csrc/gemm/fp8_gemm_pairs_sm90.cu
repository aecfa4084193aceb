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
// Promotion shares the register banks with the tensor cores: acc[i] and partial[i] should lie in two, one even, one odd. The compiler
// sees to it unless something ties accumulators in pairs, such as a store of two.
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

// kBlocks: 64-row blocks of a math warpgroup; kPartials: products under way at once in a warpgroup.
template <int kMathGroups_, int kBlocks_, int kPartials_, int kTileN_, bool kColumnScales_>
struct Config {
  static constexpr int kMathGroups = kMathGroups_, kBlocks = kBlocks_, kPartials = kPartials_, kTileN = kTileN_;
  static constexpr bool kColumnScales = kColumnScales_;
  static constexpr int kTileM = 64 * kBlocks * kMathGroups;
  static constexpr int kBandRows = kTileM == 128 ? 16 : 8;       // tiles of a band that neighbouring blocks work on
  static constexpr int kHeldColumns = kMathGroups == 2 ? 4 : 2;  // scales of columns that a lane holds ahead of their use, in pairs
  // Columns that surely have one scale of b: tiles start at multiples of them.
  static constexpr int kPiece = kTileN % 128 == 0 ? 128 : 64, kPieces = kTileN / kPiece;
  static constexpr int kThreads = 128 * (kMathGroups + 1);
  static constexpr int kProducerRegisters = kMathGroups == 2 ? 40 : 32;
  static constexpr int kMathRegisters = kMathGroups == 2 ? 232 : 160;

  static constexpr int kABytes = kTileM * kStepK, kBBytes = kTileN * kStepK;
  static constexpr int kAScaleBytes = kTileM * 4, kBScaleBytes = kColumnScales ? kTileN * 4 : 16;
  static constexpr int kCopiedBytes = kABytes + kBBytes + kAScaleBytes + (kColumnScales ? kBScaleBytes : 0);  // of a stage
  // Room in which a warp turns finished registers into rows. Little, because stages are worth more.
  static constexpr int kWarpStaging = kMathGroups == 3 || kColumnScales ? 1024 : 2048;
  static constexpr int kStaging = 4 * kMathGroups * kWarpStaging;
  static constexpr int kTileBytes = 8;  // which tile a stage is of
  static constexpr int kStages = (kSharedBytes - kStaging) / (kABytes + kBBytes + kAScaleBytes + kBScaleBytes + kTileBytes + 2 * 8);

  static constexpr int kB = kStages * kABytes, kOut = kB + kStages * kBBytes, kAScales = kOut + kStaging;
  static constexpr int kBScales = kAScales + kStages * kAScaleBytes;
  static constexpr int kTiles = kBScales + kStages * kBScaleBytes;
  static constexpr int kFull = kTiles + kStages * kTileBytes, kEmpty = kFull + kStages * 8;
  static constexpr int kBytes = kEmpty + kStages * 8;

  static_assert(kBytes <= kSharedBytes && kStages >= 3 && (kBlocks == 1 || kPartials == 1));
};

struct KernelArgs {
  GemmOutput output;
  const float* b_scales;
  int64_t ld_b_scales;
  uint32_t tiles_m, tiles_n, pairs;
  int32_t steps;     // ceil(k / 128), at least 1
  int32_t b_groups;  // rows of b_scales
  bool share_a;      // a pair's tiles are neighbours along n and share rows of a; else along m, and share rows of b
};

struct TileAt {
  int32_t m, n;
};

// Bands of tile rows, walked along n: blocks that run together share rows of a and of b in the L2 cache.
template <class C>
__device__ __forceinline__ TileAt tile_at(uint32_t pair, const KernelArgs& args, uint32_t rank) {
  const uint32_t rows = args.share_a ? args.tiles_m : (args.tiles_m + 1) / 2,
                 columns = args.share_a ? (args.tiles_n + 1) / 2 : args.tiles_n;
  const uint32_t height = args.share_a ? C::kBandRows : C::kBandRows / 2;
  const uint32_t band = pair / (height * columns), rest = pair % (height * columns);
  const uint32_t in_band = min(height, rows - band * height);
  const uint32_t m = band * height + rest % in_band, n = rest / in_band;
  return {static_cast<int32_t>(args.share_a ? m : 2 * m + rank), static_cast<int32_t>(args.share_a ? 2 * n + rank : n)};
}

struct Maps {
  const CUtensorMap *a, *b, *a_scales, *b_scales;
};

// The scales of b of a tile's pieces of columns, where it has one each, a step ahead of their use.
template <class C>
struct PieceScales {
  const float* at[C::kPieces];
  float upcoming[C::kPieces];
  const int32_t last;

  __device__ __forceinline__ PieceScales(const KernelArgs& args, int32_t column) : last(args.steps - 1) {
    if constexpr (!C::kColumnScales) {
#pragma unroll
      for (int p = 0; p < C::kPieces; ++p) {
        const int32_t group = min((column + p * C::kPiece) / 128, args.b_groups - 1);
        at[p] = args.b_scales + group * args.ld_b_scales;
        upcoming[p] = load_read_only(at[p]);
      }
    }
  }
  __device__ __forceinline__ float4 take(int32_t step) {
    float now[4] = {};
#pragma unroll
    for (int p = 0; p < C::kPieces; ++p) {
      now[p] = upcoming[p];
      upcoming[p] = load_read_only(at[p] + min(step + 1, last));
    }
    return make_float4(now[0], now[1], now[2], now[3]);
  }
};

template <class C>
__device__ __forceinline__ void produce(const Maps& maps, const KernelArgs& args, uint32_t shared, uint32_t rank) {
  constexpr uint16_t kBoth = 3;
  RingPosition<C::kStages> at;
  for (uint32_t pair = blockIdx.x / 2; pair < args.pairs; pair += gridDim.x / 2) {
    const TileAt tile = tile_at<C>(pair, args, rank);
    const int32_t row = tile.m * C::kTileM, column = tile.n * C::kTileN;
    // The half of a shared operand that this block fetches for both.
    const int32_t half_row = row + static_cast<int32_t>(rank) * (C::kTileM / 2),
                  half_column = column + static_cast<int32_t>(rank) * (C::kTileN / 2);
    PieceScales<C> scales(args, column);
    for (int32_t step = 0; step < args.steps; ++step, at.advance()) {
      const uint32_t full = shared + C::kFull + 8 * at.stage;
      const uint32_t a = shared + at.stage * C::kABytes, b = shared + C::kB + at.stage * C::kBBytes;
      const uint32_t a_scales = shared + C::kAScales + at.stage * C::kAScaleBytes,
                     b_scales = shared + C::kBScales + at.stage * C::kBScaleBytes;
      const int32_t k = step * kStepK;
      barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
      if (args.share_a) {
        tma_load_2d_multicast(a + rank * (C::kABytes / 2), maps.a, full, k, half_row, kBoth);
        tma_load_2d(b, maps.b, full, k, column);
        tma_load_2d_multicast(a_scales + rank * (C::kAScaleBytes / 2), maps.a_scales, full, half_row, step, kBoth);
        if (C::kColumnScales) tma_load_2d(b_scales, maps.b_scales, full, column, step);
      } else {
        tma_load_2d(a, maps.a, full, k, row);
        tma_load_2d_multicast(b + rank * (C::kBBytes / 2), maps.b, full, k, half_column, kBoth);
        tma_load_2d(a_scales, maps.a_scales, full, row, step);
        if (C::kColumnScales) {
          tma_load_2d_multicast(b_scales + rank * (C::kBScaleBytes / 2), maps.b_scales, full, half_column, step, kBoth);
        }
      }
      if (!C::kColumnScales) store_shared(b_scales, scales.take(step));
      store_shared(shared + C::kTiles + at.stage * C::kTileBytes, make_int2(tile.m, tile.n));
      barrier_arrive_expect(full, C::kCopiedBytes);
    }
  }
  // The block stays until the other one's warps, too, have given back every stage: they arrive at its barriers.
  for (int i = 0; i < C::kStages; ++i, at.advance()) barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
}

// A math warpgroup.
template <class C, OutputKind kKind>
struct Math {
  using Tile = float[C::kTileN / 2];

  const KernelArgs& args;
  const uint32_t shared, rank, group, lane;
  const uint32_t lane_row;  // the lane's upper row among 64
  const float* a_scales;
  const float* b_scales;
  const uint32_t columns;  // of the lane's first two columns' scales, where columns have their own
  const int2* tiles;
  const uint32_t empty;  // of the first stage, in block `lane` of the pair

  __device__ __forceinline__ Math(const KernelArgs& args, const uint8_t* memory, uint32_t shared, uint32_t rank, uint32_t group)
      : args(args),
        shared(shared),
        rank(rank),
        group(group),
        lane(in_register(threadIdx.x % 32)),
        lane_row(threadIdx.x / 32 % 4 * 16 + lane / 4),
        a_scales(reinterpret_cast<const float*>(memory + C::kAScales) + group * 64 * C::kBlocks + lane_row),
        b_scales(reinterpret_cast<const float*>(memory + C::kBScales)),
        columns(shared + C::kBScales + 8 * (lane % 4)),
        tiles(reinterpret_cast<const int2*>(memory + C::kTiles)),
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
      Wgmma<C::kTileN>::multiply(partial, wgmma_operand_offset(a, k), wgmma_operand_offset(at.b, k), k > 0);
    }
    wgmma_commit();
  }

  // a's scales of the lane's two rows, times b's of each piece of the tile's columns where it has one.
  static constexpr int kRowScales = C::kColumnScales ? 1 : C::kPieces;
  struct Scales {
    float rows[2 * kRowScales];
    float2 columns[C::kColumnScales ? C::kHeldColumns : 1];  // the next ones, in turn
  };
  __device__ __forceinline__ Scales read_scales(uint32_t stage, int block) const {
    const float* a = a_scales + stage * C::kTileM + 64 * block;
    const float upper = a[0], lower = a[8];
    Scales scales;
    if constexpr (C::kColumnScales) {
      scales.rows[0] = upper;
      scales.rows[1] = lower;
#pragma unroll
      for (int j = 0; j < C::kHeldColumns; ++j) scales.columns[j] = column_scales(stage, j);
    } else {
      const float4 b = *reinterpret_cast<const float4*>(b_scales + stage * 4);
      const float pieces[3] = {b.x, b.y, b.z};
#pragma unroll
      for (int p = 0; p < kRowScales; ++p) {
        scales.rows[2 * p] = upper * pieces[p];
        scales.rows[2 * p + 1] = lower * pieces[p];
      }
    }
    pin_registers(scales.rows);
    return scales;
  }
  __device__ __forceinline__ float2 column_scales(uint32_t stage, int j) const {
    return load_shared_pair(columns + stage * C::kBScaleBytes + 32 * j);
  }

  // Both blocks of the pair may overwrite the stage.
  __device__ __forceinline__ void release(uint32_t stage) const {
    __syncwarp();
    if (lane < 2) cluster_barrier_arrive(empty + 8 * stage);
  }

  // acc += partial * (a's scale * b's scale), for the columns of fours of registers from kFrom to kTo. Where b has a scale for a
  // piece of columns, scales.rows holds the products already.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void promote(Tile& acc, const Tile& partial, Scales& scales, uint32_t stage) const {
#pragma unroll
    for (int j = kFrom; j < kTo; ++j) {
      const int piece = C::kColumnScales ? 0 : 8 * j / C::kPiece;
      const float upper = scales.rows[2 * piece], lower = scales.rows[2 * piece + 1];
      float2 column = make_float2(0.0f, 0.0f);
      if constexpr (C::kColumnScales) {
        float2& held = scales.columns[j % C::kHeldColumns];
        column = held;
        if (j + C::kHeldColumns < C::kTileN / 8) held = column_scales(stage, j + C::kHeldColumns);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float s = c == 0 ? column.x : column.y;
        acc[4 * j + c] = fmaf(partial[4 * j + c], C::kColumnScales ? upper * s : upper, acc[4 * j + c]);
        acc[4 * j + 2 + c] = fmaf(partial[4 * j + 2 + c], C::kColumnScales ? lower * s : lower, acc[4 * j + 2 + c]);
      }
    }
  }

  // Writes a finished block of 64 rows and clears it.
  __device__ __forceinline__ void finish(Tile& acc, int2 tile, int block) const {
    const int32_t row = tile.x * C::kTileM + (group * C::kBlocks + block) * 64, column = tile.y * C::kTileN;
    const uint32_t warp = warp_uniform(threadIdx.x / 32);
    store_rows<kKind, C::kWarpStaging>(args.output, acc, shared + C::kOut + warp * C::kWarpStaging, row + warp % 4 * 16, column, lane);
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; ++i) acc[i] = 0.0f;
  }

  // One product under way: the other warpgroups' products fill the tensor cores while this one promotes. What else there is to do is
  // done while a product is under way: reading scales, writing a finished block of results. So the path from one product to the
  // next is the promotion alone, and the loop inside a tile stays lean.
  __device__ __forceinline__ void run_alternating() const {
    Tile acc[C::kBlocks];
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < C::kTileN / 2; ++i) acc[block][i] = 0.0f;
    }
    if (blockIdx.x / 2 >= args.pairs) return;
    RingPosition<C::kStages> at;
    int2 finished{};
    bool unwritten = false;
    wait(at);
    Operands next = operands(at.stage);

    // behind(block, stage): what else to do while a block's products are under way. The next step, where there is one, is waited for when
    // little of the promotion is left: the rest covers the way through the branch.
    auto advance = [&](auto behind, bool more) __attribute__((always_inline)) {
      constexpr int kAll = C::kTileN / 8, kMost = kAll - 4;
      const uint32_t stage = at.stage;
      const Operands now = next;
      at.advance();
#pragma unroll
      for (int block = 0; block < C::kBlocks; ++block) {
        const bool last = block == C::kBlocks - 1;
        Tile partial;
        start(partial, now, block);
        Scales scales = read_scales(stage, block);
        behind(block, stage);
        wgmma_wait_all();
        pin_registers(partial);
        if (!last) {
          promote<0, kAll>(acc[block], partial, scales, stage);
          continue;
        }
        if (!C::kColumnScales) release(stage);
        const bool ready = barrier_passed(shared + C::kFull + 8 * at.stage, at.parity);
        next = operands(at.stage);
        promote<0, kMost>(acc[block], partial, scales, stage);
        barrier_wait_unless(ready || !more, shared + C::kFull + 8 * at.stage, at.parity);
        promote<kMost, kAll>(acc[block], partial, scales, stage);
        if (C::kColumnScales) release(stage);
      }
    };

    constexpr int kUnrolled = C::kColumnScales ? 1 : 4;
    for (uint32_t pair = blockIdx.x / 2; pair < args.pairs; pair += gridDim.x / 2) {
      const bool last_tile = pair + gridDim.x / 2 >= args.pairs;
      int32_t step = 0;
      for (;;) {
        const bool first = step == 0, last = step + 1 == args.steps;
        advance(
            [&](int block, uint32_t stage) __attribute__((always_inline)) {
              constexpr int kLast = C::kBlocks - 1;
              if (block == 0 && first && unwritten) finish(acc[kLast], finished, kLast);
              if (block == kLast && last) finished = tiles[stage];
              if (block == 1 && last) finish(acc[0], finished, 0);
            },
            !(last && last_tile));
        if (last) break;
        auto nothing = [](int, uint32_t) {};
        ++step;
        if constexpr (kUnrolled > 1) {
          for (; step + kUnrolled < args.steps; step += kUnrolled) {
#pragma unroll
            for (int i = 0; i < kUnrolled; ++i) advance(nothing, true);
          }
        }
        for (; step + 1 < args.steps; ++step) advance(nothing, true);
      }
      unwritten = true;
    }
    finish(acc[C::kBlocks - 1], finished, C::kBlocks - 1);
  }

  // Two products under way: the next one is queued before this one is promoted.
  __device__ __forceinline__ void run_ahead() const {
    const uint32_t pair = blockIdx.x / 2;
    if (pair >= args.pairs) return;
    const uint32_t tiles_of_pair = (args.pairs - pair + gridDim.x / 2 - 1) / (gridDim.x / 2);
    uint32_t products = tiles_of_pair * args.steps;
    Tile acc, even, odd;
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; ++i) acc[i] = 0.0f;
    RingPosition<C::kStages> at, ahead;
    int32_t step = 0;

    auto queue = [&](Tile& partial) __attribute__((always_inline)) {
      wait(ahead);
      start(partial, operands(ahead.stage), 0);
      ahead.advance();
    };
    auto add = [&](Tile& partial, Scales& scales) __attribute__((always_inline)) {
      pin_registers(partial);
      const int2 tile = tiles[at.stage];
      if (!C::kColumnScales) release(at.stage);
      promote<0, C::kTileN / 8>(acc, partial, scales, at.stage);
      if (C::kColumnScales) release(at.stage);
      at.advance();
      if (++step < args.steps) return;
      finish(acc, tile, 0);
      step = 0;
    };
    auto queue_and_add = [&](Tile& partial, Tile& next) __attribute__((always_inline)) {
      queue(next);
      Scales scales = read_scales(at.stage, 0);
      wgmma_wait<1>();
      add(partial, scales);
    };
    auto add_last = [&](Tile& partial) __attribute__((always_inline)) {
      Scales scales = read_scales(at.stage, 0);
      wgmma_wait_all();
      add(partial, scales);
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

template <class C, OutputKind kKind>
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
  } else if (threadIdx.x == 32) {
    tma_prefetch_map(maps.a);
    tma_prefetch_map(maps.b);
    tma_prefetch_map(maps.a_scales);
    if constexpr (C::kColumnScales) tma_prefetch_map(maps.b_scales);
  }
  cluster_meet();

  const uint32_t group = warp_uniform(threadIdx.x / 128);
  if (group == C::kMathGroups) {
    warpgroup_give_registers<C::kProducerRegisters>();
    if (warp_uniform(threadIdx.x / 32 % 4) == 0 && elect_lane()) produce<C>(maps, args, shared, rank);
  } else {
    warpgroup_take_registers<C::kMathRegisters>();
    const Math<C, kKind> math(args, memory, shared, rank, group);
    if constexpr (C::kPartials == 2)
      math.run_ahead();
    else
      math.run_alternating();
  }
}

template <class C, OutputKind kKind>
void launch(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  allow_shared_memory<fp8_gemm_pairs_kernel<C, kKind>>(C::kBytes, device,
                                                       "fp8_gemm: reserving shared memory (this kernel needs a Hopper GPU)");
  const int64_t steps = (args.k + kStepK - 1) / kStepK;
  const int a_rows = C::kTileM / (plan.share_a ? 2 : 1), b_rows = C::kTileN / (plan.share_a ? 1 : 2);  // that a block fetches
  const CUtensorMap a = fp8_gemm_codes_map(args.a, args.m, args.k, args.lda, a_rows);
  const CUtensorMap b = fp8_gemm_codes_map(args.b, args.n, args.k, args.ldb, b_rows);
  const CUtensorMap a_scales = fp8_gemm_scales_map(args.a_scales, args.m, steps, args.ld_a_scales, a_rows), none{};
  const CUtensorMap b_scales = C::kColumnScales ? fp8_gemm_scales_map(args.b_scales, args.n, steps, args.ld_b_scales, b_rows) : none;
  KernelArgs kernel_args;
  kernel_args.output = gemm_output(args);
  kernel_args.b_scales = args.b_scales;
  kernel_args.ld_b_scales = args.ld_b_scales;
  kernel_args.tiles_m = static_cast<uint32_t>(plan.tiles_m);
  kernel_args.tiles_n = static_cast<uint32_t>(plan.tiles_n);
  kernel_args.pairs = static_cast<uint32_t>(plan.units);
  kernel_args.steps = static_cast<int32_t>(steps);
  kernel_args.b_groups = static_cast<int32_t>((args.n + 127) / 128);
  kernel_args.share_a = plan.share_a;
  fp8_gemm_pairs_kernel<C, kKind><<<plan.grid, C::kThreads, C::kBytes, stream>>>(a, b, a_scales, b_scales, kernel_args);
  cuda_check(cudaGetLastError(), "fp8_gemm: launching the kernel");
}

template <class C>
void launch_kind(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  constexpr OutputKind kSums = C::kColumnScales ? OutputKind::f32_sums : OutputKind::any;  // of weight gradients
  switch (output_kind(gemm_output(args))) {
    case OutputKind::bf16_vectors: return launch<C, OutputKind::bf16_vectors>(args, plan, device, stream);
    case OutputKind::f32_sums: return launch<C, kSums>(args, plan, device, stream);
    case OutputKind::any: return launch<C, OutputKind::any>(args, plan, device, stream);
  }
}

// Two math warpgroups with 128 rows each, with 64, or with 64 and two products under way, or three with 64.
template <bool kColumnScales>
void launch_tile(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  if (plan.tile_n == 192) return launch_kind<Config<2, 1, 1, 192, kColumnScales>>(args, plan, device, stream);
  switch (plan.tile_m) {
    case 256: return launch_kind<Config<2, 2, 1, 128, kColumnScales>>(args, plan, device, stream);
    case 192: return launch_kind<Config<3, 1, 1, 128, kColumnScales>>(args, plan, device, stream);
    default: return launch_kind<Config<2, 1, 2, 128, kColumnScales>>(args, plan, device, stream);
  }
}

}  // namespace

void fp8_gemm_pairs_sm90(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  args.b_group_rows == 1 ? launch_tile<true>(args, plan, device, stream) : launch_tile<false>(args, plan, device, stream);
}

}  // namespace eightfold
