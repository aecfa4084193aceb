// Attention of a block of queries over a cache on Hopper: few rows, many keys, none of them masked.
//
//   unit       64 rows of the queries of one KV head of one sequence: all heads of its group, query by query
//   share      a unit's keys are split over a cluster of up to 8 blocks, 16 by 16 as evenly as they go; who has which is found from the
//              length on the device, so that the launch is the same whatever lengths and places are
//   producer   a warp keeps a ring of tiles of 64 keys, k and v by turns, full. Before the kernels ahead have ended it asks for the
//              first of them in L2
//   math       a warpgroup: scores, softmax and mix of a tile one after the other (attention/attention_tile.cuh). Codes are first made
//              wide (attention/attention_pages.cuh). The block's own rows come from k and v: they replace what the copy engine brought
//              for them, and one unit's blocks write them to the cache, which nobody reads there
//   fold       each block leaves its part in its shared memory; then each folds some rows of all parts, in order
//
// Floor: the cache's bytes at 3.0 TB/s: 7.2 us for 32 heads of 1,312 keys of dim 128 in bf16, 11.2 us for 2,048; with 4 KV heads (28 heads)
// 0.9 and 1.4 us, where the rest counts.
//
// Why so. wgmma with 64 rows, of which 32 heads of 32 queries use half: a key of dim 128 is 8 clocks of tensor core, while a
// multiprocessor's share of the memory brings one in 38; the product turned over (keys as rows) would halve the 8, but needs maxima across
// warps and weights through shared memory, and mma.sync feeds every operand through registers. Tiles of 64 keys, not 128: a share is 160
// to 330 keys, and what follows its last key's arrival is part of every call. Two blocks to a multiprocessor (three over codes, which have
// more to compute) have 96 KB of loads under way each (codes: 41), and one computes while the other waits. The fold goes through the
// cluster, since a second kernel is 2 us and one block that folds all parts from L2 reads 128 KB alone. Clusters of 4 (128 blocks for 32
// KV heads) fit beside each other whatever multiprocessors a part of the chip lacks, because two blocks fit on each. Several units of a
// group read the same keys, from L2: 10.8 MB for 224 rows.
//
// Predicted, not measured, for 32 rows: 1 us to start and fetch queries, 0.8 until keys come, the floor, 0.5 for the last tile and 1 for
// the fold (a fence of the cluster, 16 KB a block read from others): 10.5 us for 32 heads and 1,312 keys, 14.5 for 2,048; with 28:4 heads 5
// us, where L2 gives the keys in 2. Over codes 7.5 and 9.5 us: a tile of 64 keys is 640 clocks of a multiprocessor to make wide and some
// 400 of softmax, the memory brings one in 1,260. A batch of 8: the floor / 0.9.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "attention/attention_pages.cuh"
#include "attention/attention_tile.cuh"
#include "attention/paged_store.cuh"
#include "block_attention/block_attention.h"
#include "core/barrier.cuh"
#include "core/cluster.cuh"
#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "core/tensor_map.h"
#include "core/tma.cuh"
#include "core/tma_stream.cuh"

namespace eightfold {
namespace {

using namespace attention;

constexpr int kKeys = 64, kStep = 16;  // keys of a tile; of which so many are fetched together
constexpr int kMostSplits = 8, kMultiprocessors = 132, kTilesAhead = 4;

__device__ __forceinline__ int32_t whole_steps(int32_t keys) { return (keys + kStep - 1) / kStep * kStep; }

struct Args {
  BlockAttention op;
  int32_t rows, group, kv_heads, room, units, splits;  // units: of a KV head of a sequence
  float factor;
};

struct WideCache {
  static constexpr bool kCodes = false;
  static constexpr int kElementBytes = 2, kBlocksOfMultiprocessor = 2, kBlocksWanted = kMultiprocessors;
  CUtensorMap maps[2];  // of keys and values

  __device__ __forceinline__ void prefetch() const {
    tma_prefetch_map(&maps[0]);
    tma_prefetch_map(&maps[1]);
  }
  // A warp's lanes: `count` keys of head `pair` from `key` on.
  template <int kDim>
  __device__ __forceinline__ void load(int which, uint32_t to, uint32_t barrier, const Args&, int32_t pair, int32_t key,
                                       int32_t count) const {
    using S = Shape<kDim, kKeys>;
    const int32_t lane = threadIdx.x % 32, part = lane % S::kBlocks, begin = lane / S::kBlocks * kStep;
    if (begin < count) tma_load_3d(to + part * S::kBlockBytes + begin * 128, &maps[which], barrier, 64 * part, key + begin, pair);
  }
};

struct CodeCache {
  static constexpr bool kCodes = true;
  static constexpr int kElementBytes = 1, kBlocksOfMultiprocessor = 3, kBlocksWanted = 2 * kMultiprocessors;

  __device__ __forceinline__ void prefetch() const {}
  template <int kDim>
  __device__ __forceinline__ void load(int which, uint32_t to, uint32_t barrier, const Args& args, int32_t pair, int32_t key,
                                       int32_t count) const {
    const PagedStore& cache = args.op.cache;
    const int32_t lane = threadIdx.x % 32;
    const int64_t row = static_cast<int64_t>(pair) * args.room + key;
    if (lane == 0) bulk_load(to, static_cast<const uint8_t*>(which ? cache.v_pages : cache.k_pages) + row * kDim, count * kDim, barrier);
    if (lane == 1) bulk_load(to + kKeys * kDim, (which ? cache.v_scales : cache.k_scales) + row, count * 4, barrier);
  }
};

template <int kDim, class Cache>
struct Config {
  static constexpr int kMathThreads = 128, kThreads = kMathThreads + 32, kWarps = kThreads / 32;
  static constexpr int kTileBytes = Cache::kCodes ? kKeys * (kDim + 4) : Shape<kDim, kKeys>::kTileBytes;  // codes, then their scales
  static constexpr int kStages = Cache::kCodes ? 5 : 96 * 1024 / kTileBytes;
  static constexpr int kWide = Shape<kDim>::kBlocks * kRows * 128;  // after the queries; a tile of codes made wide
  static constexpr int kRing = kWide + (Cache::kCodes ? Shape<kDim, kKeys>::kTileBytes : 0);
  static constexpr int kFull = kRing + kStages * kTileBytes, kEmpty = kFull + 8 * kStages, kBytes = kEmpty + 8 * kStages;
  // What the block has seen, once the tiles have been: rows that no two of a warp's share a bank, then maximum and sum of each.
  static constexpr int kPart = kWide, kPitch = (kDim + 8) * 4, kTops = kRows * kPitch;
  static_assert(kPart + kTops + 8 * kRows <= kFull);
  static_assert(Cache::kBlocksOfMultiprocessor * (kBytes + 1024) <= 233472);
};

struct Work {
  int32_t sequence, head, pair, first, rows;  // first: of its rows, of which `rows` exist
  int32_t begin, end, at, own, own_end;       // keys of the share; where the block's rows lie; keys that come from k and v
  bool writes;

  // Lengths are read past the first-level cache: the first time is before the kernels ahead have ended.
  __device__ __forceinline__ Work(const Args& args, int32_t rank) {
    const int32_t index = blockIdx.x / args.splits, unit = index % args.units;
    pair = index / args.units, sequence = pair / args.kv_heads, head = pair % args.kv_heads;
    first = unit * kRows, rows = min(args.rows * args.group - first, kRows);
    const int32_t keys = max(0, min(__ldcg(args.op.lengths + sequence), args.room)), steps = (keys + kStep - 1) / kStep;
    begin = steps * rank / args.splits * kStep, end = min(steps * (rank + 1) / args.splits * kStep, keys);
    at = min(__ldcg(args.op.at + sequence), args.room);
    own = args.op.cache.k.data ? max(at, 0) : keys, own_end = min(at + args.rows, keys);
    writes = unit == 0;
  }
  __device__ __forceinline__ bool has_own(int32_t key, int32_t count) const { return max(key, own) < min(key + count, own_end); }
};

// Of one unit's blocks: what the ring will ask for, so that it comes from L2.
template <int kDim, class Cache>
__device__ __forceinline__ void ask_ahead(const Args& args, const Work& work) {
  constexpr int kRowBytes = kDim * Cache::kElementBytes;
  const PagedStore& cache = args.op.cache;
  const int32_t lane = threadIdx.x % 32, key = work.begin + lane / 2 * kKeys;
  if (!work.writes || lane >= 2 * kTilesAhead || key >= work.end) return;
  const auto* from = static_cast<const uint8_t*>(lane % 2 ? cache.v_pages : cache.k_pages);
  bulk_prefetch_l2(from + (static_cast<int64_t>(work.pair) * args.room + key) * kRowBytes,
                   min(whole_steps(work.end - key), kKeys) * kRowBytes);
}

template <int kDim, class Cache>
__device__ __forceinline__ void produce(const Args& args, const Cache& cache, const Work& work, uint32_t shared) {
  using C = Config<kDim, Cache>;
  RingPosition<C::kStages> at;
  for (int32_t key = work.begin; key < work.end; key += kKeys) {
    const int32_t count = min(whole_steps(work.end - key), kKeys);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const uint32_t full = shared + C::kFull + 8 * at.stage;
      barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
      if (threadIdx.x % 32 == 0) barrier_arrive_expect(full, count * (C::kTileBytes / kKeys));
      __syncwarp();
      cache.template load<kDim>(which, shared + C::kRing + at.stage * C::kTileBytes, full, args, work.pair, key, count);
      at.advance();
    }
  }
}

// The block's own rows of a tile in their places, as the cache will hold them, and into the cache. By all math threads; async_fence() and
// a meeting follow.
template <int kDim, class Cache>
__device__ __forceinline__ void place_own(const Args& args, const Work& work, bool values, uint32_t tile, int32_t key, int32_t kept) {
  using T = __nv_bfloat16;
  const PagedStore& cache = args.op.cache;
  const AttentionRows& rows = values ? cache.v : cache.k;
  const int32_t lane = threadIdx.x % kRowLanes, begin = max(key, work.own), end = min(key + kept, work.own_end);
  const T* from = static_cast<const T*>(rows.data) + (static_cast<int64_t>(work.sequence) * args.rows - work.at) * rows.token_stride +
                  work.head * rows.head_stride + 8 * lane;
  for (int32_t base = begin; base < end; base += 128 / kRowLanes) {
    const int32_t own = base + static_cast<int32_t>(threadIdx.x) / kRowLanes, place = own - key;
    const bool exists = own < end, mine = exists && 8 * lane < kDim;
    Octet<T> x = load_octet<true>(from + own * rows.token_stride, mine ? 8 : 0);
    store_row<Cache::kCodes>(cache, values, exists && work.writes ? static_cast<int64_t>(work.pair) * args.room + own : -1, x);
    if constexpr (Cache::kCodes) x = through_codes(x);
    if (mine)
      store_shared(tile + lane / 8 * Shape<kDim, kKeys>::kBlockBytes + place * 128 + (lane % 8 ^ place % 8) * 16,
                   make_uint4(x.words[0], x.words[1], x.words[2], x.words[3]));
  }
}

// What this block has seen, for whoever folds: by the math threads, once all have done with the tiles.
template <int kDim, class C>
__device__ __forceinline__ void leave(const Rows<kDim>& rows, uint32_t shared) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t row = threadIdx.x / 32 * 16 + lane / 4 + 8 * h, to = shared + C::kPart + row * C::kPitch + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) store_shared(to + 32 * i, make_float2(rows.out[4 * i + 2 * h], rows.out[4 * i + 2 * h + 1]));
    if (lane % 4 == 0) store_shared(shared + C::kPart + C::kTops + 8 * row, make_float2(rows.top[h], rows.sum[h]));
  }
}

template <int kDim, class Cache>
__device__ __forceinline__ void multiply(const Args& args, const Work& work, uint32_t shared) {
  using C = Config<kDim, Cache>;
  const uint32_t lane = threadIdx.x % 32;
  RingPosition<C::kStages> at;
  auto release = [&] {
    __syncwarp();
    if (lane == 0) barrier_arrive(shared + C::kEmpty + 8 * at.stage);
    at.advance();
  };
  // Keys or values from `key` on, of which `kept` exist, once they have come, until done() with them.
  auto next = [&](bool values, int32_t key, int32_t kept) {
    uint32_t tile = shared + C::kRing + at.stage * C::kTileBytes;
    const bool own = work.has_own(key, kept);
    barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
    if constexpr (Cache::kCodes) {
      warpgroup_meet(1);  // all have done with the wide tile
      widen<kDim, 4, kKeys>(shared + C::kWide, tile, kept);
      release();
      tile = shared + C::kWide;
      if (own) warpgroup_meet(1);
    }
    if (own) place_own<kDim, Cache>(args, work, values, tile, key, kept);
    if (own || Cache::kCodes) {
      async_fence();
      warpgroup_meet(1);
    }
    return tile;
  };
  auto done = [&] {
    if constexpr (!Cache::kCodes) release();
  };
  place_queries<kDim>(shared, 1, [&](int32_t place) -> const __nv_bfloat16* {
    const int32_t row = work.first + place;
    if (place >= work.rows) return nullptr;
    return static_cast<const __nv_bfloat16*>(args.op.q.data) +
           (static_cast<int64_t>(work.sequence) * args.rows + row / args.group) * args.op.q.token_stride +
           (work.head * args.group + row % args.group) * args.op.q.head_stride;
  });
  Rows<kDim> rows;
  rows.clear();
  for (int32_t key = work.begin; key < work.end; key += kKeys) {
    ScoresOf<kKeys> scores;
    WeightsOf<kKeys> weights;
    const int32_t kept = min(work.end - key, kKeys);
    start_scores<kDim>(scores, shared, kRows * 128, next(false, key, kept));
    wgmma_wait_all();
    pin_registers(scores);
    done();
    if (kept < kKeys) {
      const int32_t limits[2] = {kept, kept};
      hide(scores, limits, lane);
    }
    absorb<kDim>(rows, scores, args.factor, weights);
    const uint32_t v = next(true, key, kept);
    if (!Cache::kCodes && kept < kKeys) clear_rows<kDim, kKeys>(v, kept, 1);
    start_mix<kDim>(rows.out, weights, v);
    wgmma_wait_all();
    pin_registers(rows.out);
    done();
  }
  end_chunk<kDim>(rows);
  warpgroup_meet(1);
  leave<kDim, C>(rows, shared);
}

// Rows of the unit from all parts of the cluster, in order: a warp takes a row, a lane four columns.
template <int kDim, class Cache>
__device__ __forceinline__ void fold(const Args& args, const Work& work, uint32_t shared, int32_t rank) {
  using C = Config<kDim, Cache>;
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool mine = 4 * lane < kDim;
  for (int32_t row = rank + args.splits * warp; row < work.rows; row += args.splits * C::kWarps) {
    float2 tops[kMostSplits];
    float4 outs[kMostSplits];
    float most = kNothing;
#pragma unroll
    for (int p = 0; p < kMostSplits; ++p) {
      const bool exists = p < args.splits;
      const uint32_t part = cluster_address(shared + C::kPart, exists ? p : 0);
      tops[p] = exists ? load_cluster_pair(part + C::kTops + 8 * row) : make_float2(kNothing, 0.0f);
      outs[p] = exists && mine ? load_cluster_floats(part + row * C::kPitch + 16 * lane) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      most = fmaxf(most, tops[p].x);
    }
    if (most == kNothing) most = 0.0f;  // no keys, or NaN alone
    float sum = 0.0f;
    float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int p = 0; p < kMostSplits; ++p) {
      const float factor = ex2_approx(tops[p].x - most);
      sum = __fmaf_rn(tops[p].y, factor, sum);
      out.x = __fmaf_rn(outs[p].x, factor, out.x), out.y = __fmaf_rn(outs[p].y, factor, out.y);
      out.z = __fmaf_rn(outs[p].z, factor, out.z), out.w = __fmaf_rn(outs[p].w, factor, out.w);
    }
    const float inverse = sum == 0.0f ? 0.0f : reciprocal(sum);
    const int32_t at = work.first + row;
    __nv_bfloat16* to = static_cast<__nv_bfloat16*>(args.op.out.data) +
                        (static_cast<int64_t>(work.sequence) * args.rows + at / args.group) * args.op.out.token_stride +
                        (work.head * args.group + at % args.group) * args.op.out.head_stride + 4 * lane;
    if (mine)
      *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(__fmul_rn(out.x, inverse), __fmul_rn(out.y, inverse)),
                                                 pack_bf16(__fmul_rn(out.z, inverse), __fmul_rn(out.w, inverse)));
  }
}

template <int kDim, class Cache>
__global__ void __launch_bounds__(Config<kDim, Cache>::kThreads, Cache::kBlocksOfMultiprocessor)
    block_attention_kernel(const __grid_constant__ Cache cache, const __grid_constant__ Args args) {
  using C = Config<kDim, Cache>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const int32_t rank = static_cast<int32_t>(cluster_rank());
  const bool produces = warp_uniform(threadIdx.x / 32) == C::kMathThreads / 32;
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(shared + C::kFull + 8 * i, 1);
      barrier_init(shared + C::kEmpty + 8 * i, C::kMathThreads / 32);
    }
    barrier_init_fence();
  } else if (threadIdx.x == 32) {
    cache.prefetch();
  }
  if (produces) ask_ahead<kDim, Cache>(args, Work(args, rank));
  __syncthreads();
  wait_for_earlier_kernels();
  const Work work(args, rank);
  if (produces)
    produce<kDim>(args, cache, work, shared);
  else
    multiply<kDim, Cache>(args, work, shared);
  cluster_meet_to_read();
  fold<kDim, Cache>(args, work, shared, rank);
  cluster_meet();  // a block that others still read from stays
}

// [sequence and KV head, key, dim], dense: a box begins at (column, key, sequence * kv_heads + KV head).
CUtensorMap cache_map(const void* data, const BlockAttention& op) {
  const PagedStore& cache = op.cache;
  const int64_t row = 2 * cache.dim;
  return encode_tensor_map({data,
                            {cache.dim, cache.page_size, op.sequences * cache.kv_heads},
                            {0, row, row * cache.page_size},
                            {64, kStep, 1},
                            CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                            2,
                            CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B});
}

template <int kDim, class Cache>
void launch(const Cache& cache, Args args, cudaStream_t stream) {
  using C = Config<kDim, Cache>;
  constexpr auto kernel = block_attention_kernel<kDim, Cache>;
  allow_shared_memory<kernel>(C::kBytes, current_device(), "block_attention: reserving shared memory (this kernel needs a Hopper GPU)");
  args.splits = std::clamp(Cache::kBlocksWanted / (args.kv_heads * args.units), 1, kMostSplits);
  const int64_t blocks = args.op.sequences * args.kv_heads * args.units * args.splits;
  if (blocks > INT32_MAX) throw std::runtime_error("block_attention: more than 2^31 - 1 blocks: too many sequences and heads");
  launch_clusters(true, args.splits, "block_attention_kernel", kernel, blocks, C::kThreads, C::kBytes, stream, cache, args);
}

template <class Cache>
void launch_dim(const Cache& cache, const Args& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (args.op.cache.dim == 64) return launch<64>(cache, args, s);
  if (args.op.cache.dim == 96) return launch<96>(cache, args, s);
  launch<128>(cache, args, s);
}

}  // namespace

void block_attention_sm90(const BlockAttention& op, void* stream) {
  if (op.sequences == 0 || op.heads == 0) return;
  Args args{};
  args.op = op;
  args.rows = static_cast<int32_t>(op.rows), args.kv_heads = static_cast<int32_t>(op.cache.kv_heads);
  args.group = static_cast<int32_t>(op.heads / op.cache.kv_heads), args.room = static_cast<int32_t>(op.cache.page_size);
  args.units = (args.rows * args.group + kRows - 1) / kRows;
  args.factor = op.scale * 1.4426950408889634f;
  if (op.cache.page_dtype == DType::e4m3) return launch_dim(CodeCache{}, args, stream);
  launch_dim(WideCache{{cache_map(op.cache.k_pages, op), cache_map(op.cache.v_pages, op)}}, args, stream);
}

}  // namespace eightfold
