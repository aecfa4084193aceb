// Large products on Hopper: a persistent, warp-specialised kernel of block pairs.
//
//   pairs                two blocks on neighbouring multiprocessors take tiles that share rows of a (or of b): each fetches half
//                        of the shared operand and the copy engine hands it to both, which cuts the reads from L2 by a third.
//   producer warpgroup   one thread walks the block's tiles and, for each 128 of K, has the copy engine bring codes and scales
//                        into a ring of stages. A stage is free when the math warps of both blocks have read it.
//   math warpgroups      two share the tile's rows. For each stage: 4 wgmma (32 of K each) from zero into `partial`, wait,
//                        acc += partial * (sa * sb) in fp32, give the stage back.
//   results              leave thread by thread while the tensor cores are already at the next tile. Rows of both operands are arranged on
//                        arrival (fp8_gemm_maps.h), so that a lane's columns are runs of eight, its rows neighbours, and its scales one
//                        load.
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
#include "core/tma_stream.cuh"
#include "core/wgmma.cuh"
#include "gemm/fp8_gemm_epilogue.cuh"
#include "gemm/fp8_gemm_launch.h"
#include "gemm/fp8_gemm_maps.h"
#include "gemm/fp8_gemm_pairs.cuh"

namespace eightfold {
namespace {

using namespace pairs;

struct Maps {
  const CUtensorMap *a[2], *b, *a_scales, *b_scales;  // a: each block of a group's rows
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
    const int32_t unit = row / C::kGroupRows;
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
#pragma unroll
        for (int block = 0; block < C::kBlocks; ++block)
          tma_load_5d_multicast(a + (block * C::kMathGroups + rank) * C::kBlockBytes, maps.a[block], full, k,
                                unit + static_cast<int32_t>(rank), kBoth);
        tma_load_5d(b, maps.b, full, k, column / 32);
        tma_load_2d_multicast(a_scales + rank * (C::kAScaleBytes / 2), maps.a_scales, full, half_row, step, kBoth);
        if (C::kColumnScales) tma_load_2d(b_scales, maps.b_scales, full, column, step);
      } else {
#pragma unroll
        for (int block = 0; block < C::kBlocks; ++block)
          tma_load_5d(a + block * C::kMathGroups * C::kBlockBytes, maps.a[block], full, k, unit);
        tma_load_5d_multicast(b + rank * (C::kBBytes / 2), maps.b, full, k, half_column / 32, kBoth);
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
  const uint32_t row_scales;  // of the lane's rows: upper and lower of each block
  const uint32_t b_scales;
  const uint32_t columns;  // of the lane's first eight columns' scales, where columns have their own
  const int2* tiles;
  const uint32_t empty;  // of the first stage, in block `lane` of the pair

  __device__ __forceinline__ Math(const KernelArgs& args, const uint8_t* memory, uint32_t shared, uint32_t rank, uint32_t group)
      : args(args),
        shared(shared),
        rank(rank),
        group(group),
        lane(in_register(threadIdx.x % 32)),
        row_scales(shared + C::kAScales + group * C::kGroupRows * 4 + threadIdx.x / 32 % 4 * (C::kGroupRows / 4) * 4 +
                   lane / 4 * 8 * C::kBlocks),
        b_scales(shared + C::kBScales),
        columns(shared + C::kBScales + 32 * (lane % 4)),
        tiles(reinterpret_cast<const int2*>(memory + C::kTiles)),
        empty(cluster_address(shared + C::kEmpty, lane % 2)) {}

  __device__ __forceinline__ void wait(const RingPosition<C::kStages>& at) const {
    barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
  }

  struct Operands {
    uint64_t a, b;
  };
  __device__ __forceinline__ Operands operands(uint32_t stage) const {
    return {wgmma_operand(shared + stage * C::kABytes + group * C::kBlockBytes), wgmma_operand(shared + C::kB + stage * C::kBBytes)};
  }

  __device__ __forceinline__ void start(Tile& partial, const Operands& at, int block) const {
    const uint64_t a = wgmma_operand_offset(at.a, block * C::kMathGroups * C::kBlockBytes);
    pin_registers(partial);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStepK; k += 32) {
      Wgmma<C::kTileN>::multiply(partial, wgmma_operand_offset(a, k), wgmma_operand_offset(at.b, k), k > 0);
    }
    wgmma_commit();
  }

  // a's scales of the lane's two rows in each block, times b's of each piece of the tile's columns where it has one.
  static constexpr int kRowScales = C::kColumnScales ? 1 : C::kPieces;
  struct RowScales {
    float of[C::kBlocks][2 * kRowScales];
  };
  __device__ __forceinline__ RowScales read_row_scales(uint32_t stage) const {
    float own[2 * C::kBlocks];
    if constexpr (C::kBlocks == 2) {
      const float4 rows = load_shared_floats(row_scales + stage * C::kAScaleBytes);
      own[0] = rows.x, own[1] = rows.y, own[2] = rows.z, own[3] = rows.w;
    } else {
      const float2 rows = load_shared_pair(row_scales + stage * C::kAScaleBytes);
      own[0] = rows.x, own[1] = rows.y;
    }
    float pieces[3] = {1.0f, 1.0f, 1.0f};
    if constexpr (!C::kColumnScales && C::kPieces == 1) {
      pieces[0] = load_shared_float(b_scales + stage * C::kBScaleBytes);
    } else if constexpr (!C::kColumnScales) {
      const float4 b = load_shared_floats(b_scales + stage * C::kBScaleBytes);
      pieces[0] = b.x, pieces[1] = b.y, pieces[2] = b.z;
    }
    RowScales scales;
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2 * kRowScales; ++i)
        scales.of[block][i] = C::kColumnScales ? own[2 * block + i] : own[2 * block + i % 2] * pieces[i / 2];
    }
    return scales;
  }

  // Fours of column scales that a lane holds ahead of their use: as many as leave accumulators and products in two register banks.
  static constexpr int kHeldColumns = kKind == OutputKind::bf16_vectors ? 2 : 1;
  struct ColumnScales {
    float4 held[C::kColumnScales ? kHeldColumns : 1];  // the next ones, in turn
  };
  __device__ __forceinline__ ColumnScales read_column_scales(uint32_t stage) const {
    ColumnScales scales{};
    if constexpr (C::kColumnScales) {
#pragma unroll
      for (int j = 0; j < kHeldColumns; ++j) scales.held[j] = column_scales(stage, j);
    }
    return scales;
  }
  // The lane's four columns of registers 8 * i to 8 * i + 7.
  __device__ __forceinline__ float4 column_scales(uint32_t stage, int i) const {
    return load_shared_floats(columns + stage * C::kBScaleBytes + i / 2 * 128 + i % 2 * 16);
  }

  // Both blocks of the pair may overwrite the stage.
  __device__ __forceinline__ void release(uint32_t stage) const {
    __syncwarp();
    if (lane < 2) cluster_barrier_arrive(empty + 8 * stage);
  }

  // acc += partial * (a's scale * b's scale), for the columns of fours of registers from kFrom to kTo, both even. Where b has a scale for a
  // piece of columns, `rows` holds the products already.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void promote(Tile& acc, const Tile& partial, const float (&rows)[2 * kRowScales], ColumnScales& scales,
                                          uint32_t stage) const {
#pragma unroll
    for (int j = kFrom; j < kTo; j += 2) {
      const int piece = C::kColumnScales ? 0 : 8 * j / C::kPiece;
      const float upper = rows[2 * piece], lower = rows[2 * piece + 1];
      float column[4] = {};
      if constexpr (C::kColumnScales) {
        float4& held = scales.held[j / 2 % kHeldColumns];
        column[0] = held.x, column[1] = held.y, column[2] = held.z, column[3] = held.w;
        if (j / 2 + kHeldColumns < C::kTileN / 16) held = column_scales(stage, j / 2 + kHeldColumns);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int at = 4 * (j + c / 2) + c % 2;
        acc[at] = fmaf(partial[at], C::kColumnScales ? upper * column[c] : upper, acc[at]);
        acc[at + 2] = fmaf(partial[at + 2], C::kColumnScales ? lower * column[c] : lower, acc[at + 2]);
      }
    }
  }

  // Where results are added to bf16: asks the L2 cache for what the warp's rows of a tile hold, so that finish() waits little.
  __device__ __forceinline__ void prefetch_sums(int2 tile) const {
    if constexpr (kKind == OutputKind::bf16_sums) {
      constexpr int kLine = 64, kRows = C::kGroupRows / 4, kLines = C::kTileN / kLine;  // a cache line's columns; the warp's rows
      const int32_t row = tile.x * C::kTileM + (group * 4 + threadIdx.x / 32 % 4) * kRows;
#pragma unroll
      for (uint32_t i = lane; i < kRows * kLines; i += 32) {
        const int32_t r = row + i / kLines, c = tile.y * C::kTileN + i % kLines * kLine;
        if (r < args.output.m && c < args.output.n) prefetch_l2(static_cast<const uint16_t*>(args.output.out) + r * args.output.ld + c);
      }
    }
  }

  // Writes a finished block of 64 rows and clears it.
  __device__ __forceinline__ void finish(Tile& acc, int2 tile, int block) const {
    const uint32_t warp = warp_uniform(threadIdx.x / 32);
    const int32_t row = tile.x * C::kTileM + (group * 4 + warp % 4) * (C::kGroupRows / 4) + 2 * block;
    const uint32_t staging = shared + C::kOut + warp * C::kWarpStaging;
    if constexpr (kKind == OutputKind::bf16_sums)
      add_octets<2 * C::kBlocks, C::kWarpStaging>(args.output, acc, staging, row, tile.y * C::kTileN, lane);
    else
      store_octets<kKind, 2 * C::kBlocks>(args.output, acc, staging, row, tile.y * C::kTileN, lane);
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
      RowScales rows;
      at.advance();
#pragma unroll
      for (int block = 0; block < C::kBlocks; ++block) {
        const bool last = block == C::kBlocks - 1;
        Tile partial;
        start(partial, now, block);
        if (block == 0) rows = read_row_scales(stage);
        ColumnScales scales = read_column_scales(stage);
        behind(block, stage);
        wgmma_wait_all();
        pin_registers(partial);
        if (!last) {
          promote<0, kAll>(acc[block], partial, rows.of[block], scales, stage);
          continue;
        }
        if (!C::kColumnScales) release(stage);
        const bool ready = barrier_passed(shared + C::kFull + 8 * at.stage, at.parity);
        next = operands(at.stage);
        promote<0, kMost>(acc[block], partial, rows.of[block], scales, stage);
        barrier_wait_unless(ready || !more, shared + C::kFull + 8 * at.stage, at.parity);
        promote<kMost, kAll>(acc[block], partial, rows.of[block], scales, stage);
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
              if (block == 0 && first) prefetch_sums(tiles[stage]);
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
    auto add = [&](Tile& partial, const RowScales& rows) __attribute__((always_inline)) {
      ColumnScales scales = read_column_scales(at.stage);
      pin_registers(partial);
      const int2 tile = tiles[at.stage];
      if (step == 0) prefetch_sums(tile);
      if (!C::kColumnScales) release(at.stage);
      promote<0, C::kTileN / 8>(acc, partial, rows.of[0], scales, at.stage);
      if (C::kColumnScales) release(at.stage);
      at.advance();
      if (++step < args.steps) return;
      finish(acc, tile, 0);
      step = 0;
    };
    auto queue_and_add = [&](Tile& partial, Tile& next) __attribute__((always_inline)) {
      queue(next);
      const RowScales rows = read_row_scales(at.stage);
      wgmma_wait<1>();
      add(partial, rows);
    };
    auto add_last = [&](Tile& partial) __attribute__((always_inline)) {
      const RowScales rows = read_row_scales(at.stage);
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

template <class C, OutputKind kKind>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(C::kThreads, 1)
    fp8_gemm_pairs_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap second_a,
                          const __grid_constant__ CUtensorMap b, const __grid_constant__ CUtensorMap a_scales,
                          const __grid_constant__ CUtensorMap b_scales, const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(kAtomBytes) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const uint32_t rank = cluster_rank();
  const Maps maps{{&a, &second_a}, &b, &a_scales, &b_scales};

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(shared + C::kFull + 8 * stage, 1);
      barrier_init(shared + C::kEmpty + 8 * stage, 2 * 4 * C::kMathGroups);  // one arrival from each math warp of the pair
    }
    barrier_init_fence();
  } else if (threadIdx.x == 32) {
    tma_prefetch_map(maps.a[0]);
    if constexpr (C::kBlocks == 2) tma_prefetch_map(maps.a[1]);
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
  const auto rows_map = [&](int block) { return fp8_gemm_arranged_rows_map(args.a, args.m, args.k, args.lda, a_rows, C::kBlocks, block); };
  const CUtensorMap a = rows_map(0), second_a = C::kBlocks == 2 ? rows_map(1) : a;
  const CUtensorMap b = fp8_gemm_arranged_columns_map(args.b, args.n, args.k, args.ldb, b_rows);
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
  fp8_gemm_pairs_kernel<C, kKind><<<plan.grid, C::kThreads, C::kBytes, stream>>>(a, second_a, b, a_scales, b_scales, kernel_args);
  cuda_check(cudaGetLastError(), "fp8_gemm: launching the kernel");
}

template <class C>
void launch_kind(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  const OutputKind kind = output_kind(gemm_output(args));
  if constexpr (C::kColumnScales) {  // of weight gradients
    if (kind == OutputKind::f32_sums) return launch<C, OutputKind::f32_sums>(args, plan, device, stream);
    if (kind == OutputKind::bf16_sums) return launch<C, OutputKind::bf16_sums>(args, plan, device, stream);
  }
  if (kind == OutputKind::bf16_vectors) return launch<C, OutputKind::bf16_vectors>(args, plan, device, stream);
  launch<C, OutputKind::any>(args, plan, device, stream);
}

// Two math warpgroups with 128 rows each, with 64, or with 64 and two products under way.
template <bool kColumnScales>
void launch_tile(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  if (plan.tile_m == 256) return launch_kind<Config<2, 1, 128, kColumnScales>>(args, plan, device, stream);
  if (plan.tile_n == 192) return launch_kind<Config<1, 1, 192, kColumnScales>>(args, plan, device, stream);
  launch_kind<Config<1, 2, 128, kColumnScales>>(args, plan, device, stream);
}

}  // namespace

void fp8_gemm_pairs_sm90(const Fp8GemmArgs& args, const Fp8GemmPlan& plan, int device, cudaStream_t stream) {
  args.b_group_rows == 1 ? launch_tile<true>(args, plan, device, stream) : launch_tile<false>(args, plan, device, stream);
}

}  // namespace eightfold
