// dq on Hopper: 128 queries of a head against the keys that they see.
//
//   producer   one thread has the copy engine bring q and dout of a piece of work, then a ring of tiles of 128 keys, k and v by turns, also
//              for the next piece while this one ends
//   math       two warpgroups of 64 queries: s = q k^T, t = dout v^T; p = exp2(s - lse), ds = p (t - delta) in registers, dq += ds k
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "attention/attention_backward.cuh"
#include "attention/attention_maps.h"
#include "attention/attention_work.cuh"
#include "core/device.h"
#include "core/launch.cuh"

namespace eightfold {
namespace {

using namespace attention;

template <int kDim>
struct Config {
  static constexpr int kMathGroups = 2, kThreads = 128 * (kMathGroups + 1);
  static constexpr int kProducerRegisters = 24, kMathRegisters = 240;
  static constexpr int kBlockBytes = Shape<kDim>::kBlockBytes, kTileBytes = Shape<kDim>::kTileBytes;
  static constexpr int kStages = kDim == 64 ? 8 : 5, kRing = 2 * kTileBytes;
  static constexpr int kFull = kRing + kStages * kTileBytes, kEmpty = kFull + 8 * kStages;
  static constexpr int kQueriesFull = kEmpty + 8 * kStages, kQueriesEmpty = kQueriesFull + 8, kBytes = kQueriesEmpty + 8;
  static_assert(kBytes <= 232448);
};

struct QueryArgs {
  Args<PackedKeys> of;
  RowSums sums;
  float scale;
};

template <int kDim>
__device__ __forceinline__ void produce(const QueryArgs& args, const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v,
                                        const CUtensorMap* dout, uint32_t shared) {
  using C = Config<kDim>;
  const uint32_t queries_full = shared + C::kQueriesFull;
  RingPosition<C::kStages> at;
  uint32_t parity = 1;
  for (int32_t index = blockIdx.x; index < args.of.work; index += gridDim.x) {
    const Work work(args.of, index);
    if (work.tiles == 0) continue;
    barrier_wait(shared + C::kQueriesEmpty, parity);
    parity ^= 1;
    barrier_arrive_expect(queries_full, 2 * C::kTileBytes);
#pragma unroll
    for (int block = 0; block < Shape<kDim>::kBlocks; ++block) {
      tma_load_3d(shared + block * C::kBlockBytes, q, queries_full, 64 * block, work.head, work.row);
      tma_load_3d(shared + C::kTileBytes + block * C::kBlockBytes, dout, queries_full, 64 * block, work.head, work.row);
    }
    for (int32_t tile = 0; tile < work.tiles; ++tile) {
#pragma unroll
      for (const CUtensorMap* map : {k, v}) {
        const uint32_t full = shared + C::kFull + 8 * at.stage;
        barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
        barrier_arrive_expect(full, C::kTileBytes);
        args.of.keys.template load<kDim>(shared + C::kRing + at.stage * C::kTileBytes, map, full, work.head / args.of.group, work.begin,
                                         work.sequence, tile);
        at.advance();
      }
    }
  }
}

template <int kDim>
__device__ __forceinline__ void multiply(const QueryArgs& args, uint32_t shared, int32_t group) {
  using C = Config<kDim>;
  const uint32_t lane = threadIdx.x % 32, q = shared + group * 64 * 128, dout = q + C::kTileBytes;
  const int32_t place = 64 * group + 16 * (threadIdx.x / 32 % 4) + static_cast<int32_t>(lane) / 4;  // of the lane's first row
  RingPosition<C::kStages> at;
  uint32_t parity = 0;
  auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  };
  for (int32_t index = blockIdx.x; index < args.of.work; index += gridDim.x) {
    const Work work(args.of, index);
    if (work.tiles == 0) continue;
    const int32_t all_see = work.sees(args.of, 64 * group), sees[2] = {work.sees(args.of, place), work.sees(args.of, place + 8)};
    float lse[2], delta[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = work.head * args.sums.places + RowSums::padded(work.begin, work.sequence) + work.first + place + 8 * h;
      const bool exists = place + 8 * h < work.rows;
      lse[h] = exists ? __ldg(args.sums.lse + row) : 0.0f, delta[h] = exists ? __ldg(args.sums.delta + row) : 0.0f;
    }
    barrier_wait(shared + C::kQueriesFull, parity);
    parity ^= 1;
    float dq[kDim / 2];
    clear(dq);
    for (int32_t tile = 0; tile < work.tiles; ++tile) {
      Scores s, t;
      Weights words;
      const int32_t kept = work.keys - tile * kTile;
      const uint32_t k = shared + C::kRing + at.stage * C::kTileBytes, k_empty = shared + C::kEmpty + 8 * at.stage;
      barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
      at.advance();
      if (kept < kTile) clear_rows<kDim>(k, kept, 1 + group);
      start_scores<kDim>(s, q, C::kBlockBytes, k);
      const uint32_t v = shared + C::kRing + at.stage * C::kTileBytes, v_empty = shared + C::kEmpty + 8 * at.stage;
      barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
      at.advance();
      if (kept < kTile) clear_rows<kDim>(v, kept, 1 + group);
      start_scores<kDim>(t, dout, C::kBlockBytes, v);
      wgmma_wait<1>();
      pin_registers(s);
      if (all_see < (tile + 1) * kTile) {
        const int32_t limits[2] = {sees[0] - tile * kTile, sees[1] - tile * kTile};
        hide(s, limits, lane);
      }
#pragma unroll
      for (int i = 0; i < kTile / 2; ++i) s[i] = ex2_approx(__fmaf_rn(s[i], args.of.factor, -lse[i / 2 % 2]));
      wgmma_wait_all();
      pin_registers(t);
      release(v_empty);
      if (tile + 1 == work.tiles) release(shared + C::kQueriesEmpty);
#pragma unroll
      for (int i = 0; i < kTile / 2; ++i) t[i] = __fmul_rn(s[i], t[i] - delta[i / 2 % 2]);
      pack_tile(t, words);
      start_mix<kDim>(dq, words, k);
      wgmma_wait_all();
      pin_registers(dq);
      release(k_empty);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      store_row<kDim>(
          args.of.out + (static_cast<int64_t>(work.row) + place + 8 * h) * args.of.out_token_stride + work.head * args.of.out_head_stride,
          dq, args.scale, h, place + 8 * h < work.rows);
  }
}

template <int kDim>
__global__ void __launch_bounds__(Config<kDim>::kThreads, 1)
    attention_backward_queries_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                                      const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap dout,
                                      const __grid_constant__ QueryArgs args) {
  using C = Config<kDim>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(shared + C::kFull + 8 * i, 1);
      barrier_init(shared + C::kEmpty + 8 * i, 4 * C::kMathGroups);
    }
    barrier_init(shared + C::kQueriesFull, 1);
    barrier_init(shared + C::kQueriesEmpty, 4 * C::kMathGroups);
    barrier_init_fence();
  }
  __syncthreads();
  const int32_t group = static_cast<int32_t>(warp_uniform(threadIdx.x / 128));
  if (group == C::kMathGroups) {
    warpgroup_give_registers<C::kProducerRegisters>();
    if (warp_uniform(threadIdx.x / 32 % 4) == 0 && elect_lane()) produce<kDim>(args, &q, &k, &v, &dout, shared);
  } else {
    warpgroup_take_registers<C::kMathRegisters>();
    multiply<kDim>(args, shared, group);
  }
}

template <int kDim>
void launch(const AttentionBackward& op, const QueryArgs& args, cudaStream_t stream) {
  using C = Config<kDim>;
  constexpr auto kernel = attention_backward_queries_kernel<kDim>;
  const Attention& f = op.forward;
  const int device = current_device();
  allow_shared_memory<kernel>(C::kBytes, device, "attention_backward: reserving shared memory (this kernel needs a Hopper GPU)");
  const CUtensorMap q = rows_map(f.q, f.tokens, f.heads, kDim), dout = rows_map(op.dout, f.tokens, f.heads, kDim);
  const CUtensorMap k = rows_map(f.k, f.tokens, f.kv_heads, kDim), v = rows_map(f.v, f.tokens, f.kv_heads, kDim);
  const int grid = std::min(args.of.work, multiprocessors(device));
  kernel<<<grid, C::kThreads, C::kBytes, stream>>>(q, k, v, dout, args);
  check_launch("attention_backward_queries_kernel");
}

}  // namespace

namespace attention {

void queries_gradients_sm90(const AttentionBackward& op, const RowSums& sums, void* stream) {
  const QueryArgs args{arguments(op.forward, op.dq, PackedKeys{}), sums, op.forward.scale};
  const auto s = static_cast<cudaStream_t>(stream);
  if (op.forward.dim == 64) return launch<64>(op, args, s);
  if (op.forward.dim == 96) return launch<96>(op, args, s);
  launch<128>(op, args, s);
}

}  // namespace attention
}  // namespace eightfold
