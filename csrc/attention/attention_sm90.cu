// Attention of many queries on Hopper: training and prefill, keys packed with the queries or in pages.
//
//   work       128 queries of a head of a sequence: for as many heads as the L2 cache holds keys of, those with the most keys first
//   producer   one thread has the copy engine bring the queries (two buffers) and a ring of tiles, k and v by turns, also for the next
//              piece of work while this one's results leave
//   math       two warpgroups of 64 queries: scores, softmax and mix of a tile one after the other (attention_tile.cuh); one's softmax
//              runs beside the other's products. Chunks are folded in registers.
//
// Floor: 4 * dim FLOP for a query and key that it sees, at the tensor cores' 4,096 a clock; the exponentials of a tile are half as long
// (16 a clock), the fold of a chunk a twentieth.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "attention/attention_keys.cuh"
#include "attention/attention_maps.h"
#include "attention/attention_paged.h"
#include "attention/attention_work.cuh"
#include "core/barrier.cuh"
#include "core/device.h"
#include "core/launch.cuh"
#include "core/quad.cuh"

namespace eightfold {
namespace {

using namespace attention;

template <int kDim>
struct Config {
  static constexpr int kMathGroups = 2, kThreads = 128 * (kMathGroups + 1);
  static constexpr int kProducerRegisters = 24, kMathRegisters = 240;
  static constexpr int kQueryBytes = Shape<kDim>::kTileBytes, kTileBytes = Shape<kDim>::kTileBytes;
  static constexpr int kQueryBuffers = 2, kStages = kDim == 64 ? 8 : 5;
  static constexpr int kRing = kQueryBuffers * kQueryBytes;
  static constexpr int kFull = kRing + kStages * kTileBytes, kEmpty = kFull + 8 * kStages;
  static constexpr int kQueryFull = kEmpty + 8 * kStages, kQueryEmpty = kQueryFull + 8 * kQueryBuffers;
  static constexpr int kBytes = kQueryEmpty + 8 * kQueryBuffers;
  static_assert(kBytes <= 232448);
};

template <int kDim, class Keys>
__device__ __forceinline__ void produce(const Args<Keys>& args, const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v,
                                        uint32_t shared) {
  using C = Config<kDim>;
  RingPosition<C::kStages> at;
  RingPosition<C::kQueryBuffers> queries;
  for (int32_t index = blockIdx.x; index < args.work; index += gridDim.x) {
    const Work work(args, index);
    if (work.tiles == 0) continue;
    const uint32_t query_full = shared + C::kQueryFull + 8 * queries.stage;
    barrier_wait(shared + C::kQueryEmpty + 8 * queries.stage, queries.parity ^ 1);
    barrier_arrive_expect(query_full, C::kQueryBytes);
#pragma unroll
    for (int block = 0; block < Shape<kDim>::kBlocks; ++block)
      tma_load_3d(shared + queries.stage * C::kQueryBytes + block * Shape<kDim>::kBlockBytes, q, query_full, 64 * block, work.head,
                  work.row);
    queries.advance();
    for (int32_t tile = 0; tile < work.tiles; ++tile) {
#pragma unroll
      for (const CUtensorMap* map : {k, v}) {
        const uint32_t full = shared + C::kFull + 8 * at.stage;
        barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
        barrier_arrive_expect(full, C::kTileBytes);
        args.keys.template load<kDim>(shared + C::kRing + at.stage * C::kTileBytes, map, full, work.head / args.group, work.begin,
                                      work.sequence, tile);
        at.advance();
      }
    }
  }
}

// Rows of a warpgroup, of which `count` exist, from `row` on.
template <int kDim, class Keys>
__device__ __forceinline__ void store_rows(const Args<Keys>& args, const Rows<kDim>& all, int32_t head, int32_t row, int32_t count) {
  const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t place = 16 * warp + lane / 4 + 8 * h;
    const bool exists = place < count;
    store_row<kDim>(args.out + (static_cast<int64_t>(row) + place) * args.out_token_stride + head * args.out_head_stride, all, h, exists);
    if (exists && args.lse && lane % 4 == 0)
      args.lse[head * args.tokens + row + place] = (all.top[h] + lg2_approx(all.sum[h])) * 0.69314718056f;
  }
}

template <int kDim, class Keys>
__device__ __forceinline__ void multiply(const Args<Keys>& args, uint32_t shared, int32_t group) {
  using C = Config<kDim>;
  const uint32_t lane = threadIdx.x % 32;
  const int32_t place = 64 * group + 16 * (threadIdx.x / 32 % 4) + static_cast<int32_t>(lane) / 4;  // of the lane's first row
  RingPosition<C::kStages> at;
  RingPosition<C::kQueryBuffers> queries;
  auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  };
  for (int32_t index = blockIdx.x; index < args.work; index += gridDim.x) {
    const Work work(args, index);
    if (work.tiles == 0) continue;
    barrier_wait(shared + C::kQueryFull + 8 * queries.stage, queries.parity);
    const uint32_t q = shared + queries.stage * C::kQueryBytes + group * 64 * 128;
    const int32_t all_see = work.sees(args, 64 * group), sees[2] = {work.sees(args, place), work.sees(args, place + 8)};
    Rows<kDim> all, chunk;
    all.clear();
    chunk.clear();
    for (int32_t tile = 0; tile < work.tiles; ++tile) {
      Scores scores;
      Weights weights;
      barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
      start_scores<kDim>(scores, q, Shape<kDim>::kBlockBytes, shared + C::kRing + at.stage * C::kTileBytes);
      wgmma_wait_all();
      pin_registers(scores);
      release(shared + C::kEmpty + 8 * at.stage);
      at.advance();
      const int32_t kept = work.keys - tile * kTile;
      if (all_see < (tile + 1) * kTile) {
        const int32_t limits[2] = {sees[0] - tile * kTile, sees[1] - tile * kTile};
        hide(scores, limits, lane);
      }
      absorb<kDim>(chunk, scores, args.factor, weights);
      barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
      const uint32_t v = shared + C::kRing + at.stage * C::kTileBytes;
      if (kept < kTile) clear_rows<kDim>(v, kept, 1 + group);
      start_mix<kDim>(chunk.out, weights, v);
      wgmma_wait_all();
      pin_registers(chunk.out);
      release(shared + C::kEmpty + 8 * at.stage);
      at.advance();
      if ((tile + 1) % kTilesOfChunk == 0 || tile + 1 == work.tiles) {
        end_chunk<kDim>(chunk);
        fold_chunk<kDim>(all, chunk);
        chunk.clear();
      }
    }
    release(shared + C::kQueryEmpty + 8 * queries.stage);
    queries.advance();
    store_rows<kDim>(args, all, work.head, work.row + 64 * group, work.rows - 64 * group);
  }
}

template <int kDim, class Keys>
__global__ void __launch_bounds__(Config<kDim>::kThreads, 1)
    attention_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                     const __grid_constant__ Args<Keys> args) {
  using C = Config<kDim>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(shared + C::kFull + 8 * i, 1);
      barrier_init(shared + C::kEmpty + 8 * i, 4 * C::kMathGroups);
    }
    for (int i = 0; i < C::kQueryBuffers; ++i) {
      barrier_init(shared + C::kQueryFull + 8 * i, 1);
      barrier_init(shared + C::kQueryEmpty + 8 * i, 4 * C::kMathGroups);
    }
    barrier_init_fence();
  } else if (threadIdx.x == 32) {
    tma_prefetch_map(&q);
    tma_prefetch_map(&k);
    tma_prefetch_map(&v);
  }
  __syncthreads();
  const int32_t group = static_cast<int32_t>(warp_uniform(threadIdx.x / 128));
  if (group == C::kMathGroups) {
    warpgroup_give_registers<C::kProducerRegisters>();
    if (warp_uniform(threadIdx.x / 32 % 4) == 0 && elect_lane()) produce<kDim>(args, &q, &k, &v, shared);
  } else {
    warpgroup_take_registers<C::kMathRegisters>();
    multiply<kDim>(args, shared, group);
  }
}

template <int kDim, class Keys>
void launch(const AttentionRows& query_rows, const CUtensorMap& k, const CUtensorMap& v, const Args<Keys>& args, cudaStream_t stream) {
  using C = Config<kDim>;
  constexpr auto kernel = attention_kernel<kDim, Keys>;
  const int device = current_device();
  allow_shared_memory<kernel>(C::kBytes, device, "attention: reserving shared memory (this kernel needs a Hopper GPU)");
  const CUtensorMap q = rows_map(query_rows, args.tokens, args.heads, kDim);
  const int grid = std::min(args.work, multiprocessors(device));
  kernel<<<grid, C::kThreads, C::kBytes, stream>>>(q, k, v, args);
  check_launch("attention_kernel");
}

template <class Keys>
void launch_dim(const AttentionRows& q, int64_t dim, const CUtensorMap& k, const CUtensorMap& v, const Args<Keys>& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (dim == 64) return launch<64>(q, k, v, args, s);
  if (dim == 96) return launch<96>(q, k, v, args, s);
  launch<128>(q, k, v, args, s);
}

}  // namespace

void attention_sm90(const Attention& op, void* stream) {
  if (op.tokens == 0) return;
  Args<PackedKeys> args = arguments(op, op.out, PackedKeys{});
  args.lse = op.lse;
  const CUtensorMap k = rows_map(op.k, op.tokens, op.kv_heads, op.dim), v = rows_map(op.v, op.tokens, op.kv_heads, op.dim);
  launch_dim(op.q, op.dim, k, v, args, stream);
}

namespace attention {

void paged_rows_sm90(const PagedAttention& op, void* stream) {
  if (op.tokens == 0) return;
  const Args<PagedKeys> args = arguments(op, op.out,
                                         PagedKeys{op.pages, op.lengths, static_cast<int32_t>(op.most_pages),
                                                   static_cast<int32_t>(op.page_size), static_cast<int32_t>(op.page_count)});
  launch_dim(op.q, op.dim, pages_map(op.k_pages, op), pages_map(op.v_pages, op), args, stream);
}

}  // namespace attention
}  // namespace eightfold
