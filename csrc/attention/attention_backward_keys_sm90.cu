// dk and dv on Hopper: a block of 128 keys of a KV head against the queries that see it, of all heads that share it.
//
//   producer   one thread has the copy engine bring k and v once, then a ring of tiles of 64 queries: q, dout and the rows' sums
//   math       two warpgroups of 64 keys: s = k q^T, t = v dout^T; p = exp2(s - lse), ds = p (t - delta) in registers, and as left
//              operands dv += p dout, dk += ds q. What one warpgroup computes in registers runs beside the other's products
//
// The blocks with the most queries come first; as many pairs of sequence and KV head at a time as the L2 cache holds queries of.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "attention/attention_backward.cuh"
#include "attention/attention_maps.h"
#include "core/device.h"
#include "core/launch.cuh"
#include "core/tma.cuh"
#include "core/tma_stream.cuh"

namespace eightfold {
namespace {

using namespace attention;

constexpr int kKeys = kTile, kQueries = kSumsTile;

template <int kDim>
struct Config {
  static constexpr int kMathGroups = 2, kThreads = 128 * (kMathGroups + 1);
  static constexpr int kProducerRegisters = 24, kMathRegisters = 240;
  static constexpr int kKeyBlock = Shape<kDim, kKeys>::kBlockBytes, kQueryBlock = Shape<kDim, kQueries>::kBlockBytes;
  static constexpr int kKeyBytes = Shape<kDim, kKeys>::kTileBytes, kQueryBytes = Shape<kDim, kQueries>::kTileBytes;
  static constexpr int kSumBytes = kQueries * 4;
  static constexpr int kStages = kDim == 64 ? 6 : 4, kStageBytes = 2 * kQueryBytes;
  static constexpr int kRing = 2 * kKeyBytes, kSums = kRing + kStages * kStageBytes;
  static constexpr int kFull = kSums + kStages * 2 * kSumBytes, kEmpty = kFull + 8 * kStages, kKeysFull = kEmpty + 8 * kStages;
  static constexpr int kBytes = kKeysFull + 8;
  static_assert(kBytes <= 232448);
};

struct Args {
  RowSums sums;
  AttentionRows dk, dv;
  const int32_t* starts;
  int32_t group, kv_heads, key_tiles, pairs, span, block;  // as of attention_work.cuh, a pair being a KV head of a sequence
  float factor, scale;
};

struct Work {
  int32_t sequence, begin, length, head, key;  // head: of keys; key: the first of the block
  int32_t first, tiles;                        // tiles of queries

  __device__ __forceinline__ Work(const Args& args, int32_t index) {
    const int32_t section = index / (args.span * args.key_tiles), rest = index % (args.span * args.key_tiles);
    const int32_t width = min(args.span, args.pairs - section * args.span), pair = section * args.span + rest % width;
    sequence = pair / args.kv_heads, head = pair % args.kv_heads;
    begin = __ldg(args.starts + sequence);
    length = __ldg(args.starts + sequence + 1) - begin;
    key = rest / width * kKeys;
    first = first_query(key, args.block) / kQueries;
    tiles = key < length ? (length + kQueries - 1) / kQueries - first : 0;
  }
};

template <int kDim>
__device__ __forceinline__ void produce(const Args& args, const Work& work, const CUtensorMap* q, const CUtensorMap* k,
                                        const CUtensorMap* v, const CUtensorMap* dout, uint32_t shared) {
  using C = Config<kDim>;
  const uint32_t keys_full = shared + C::kKeysFull;
  barrier_arrive_expect(keys_full, 2 * C::kKeyBytes);
#pragma unroll
  for (int block = 0; block < Shape<kDim>::kBlocks; ++block) {
    tma_load_3d(shared + block * C::kKeyBlock, k, keys_full, 64 * block, work.head, work.begin + work.key);
    tma_load_3d(shared + C::kKeyBytes + block * C::kKeyBlock, v, keys_full, 64 * block, work.head, work.begin + work.key);
  }
  const int64_t place = RowSums::padded(work.begin, work.sequence);
  RingPosition<C::kStages> at;
  for (int32_t head = work.head * args.group; head < (work.head + 1) * args.group; ++head) {
    for (int32_t tile = work.first; tile < work.first + work.tiles; ++tile) {
      const uint32_t full = shared + C::kFull + 8 * at.stage, to = shared + C::kRing + at.stage * C::kStageBytes;
      barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
      barrier_arrive_expect(full, C::kStageBytes + 2 * C::kSumBytes);
#pragma unroll
      for (int block = 0; block < Shape<kDim>::kBlocks; ++block) {
        tma_load_3d(to + block * C::kQueryBlock, q, full, 64 * block, head, work.begin + tile * kQueries);
        tma_load_3d(to + C::kQueryBytes + block * C::kQueryBlock, dout, full, 64 * block, head, work.begin + tile * kQueries);
      }
      const int64_t row = head * args.sums.places + place + tile * kQueries;
      const uint32_t sums = shared + C::kSums + at.stage * 2 * C::kSumBytes;
      bulk_load(sums, args.sums.lse + row, C::kSumBytes, full);
      bulk_load(sums + C::kSumBytes, args.sums.delta + row, C::kSumBytes, full);
      at.advance();
    }
  }
}

// Scores [keys, queries] of queries before from[h] of the tile, which do not see the lane's key h.
template <int kCount>
__device__ __forceinline__ void hide_queries(float (&scores)[kCount], const int32_t (&from)[2], uint32_t lane) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (8 * (i / 4) + 2 * static_cast<int32_t>(lane % 4) + i % 2 < from[i / 2 % 2]) scores[i] = kNothing;
}

// f(x, a query's sum) of every number [keys, queries] of a tile; `sums`: of its queries, in shared memory.
template <int kCount, class F>
__device__ __forceinline__ void with_sums(float (&x)[kCount], uint32_t sums, uint32_t lane, const F& f) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const float2 pair = load_shared_pair(sums + 4 * (8 * j + 2 * (lane % 4)));
#pragma unroll
    for (int i = 4 * j; i < 4 * j + 4; ++i) x[i] = f(i, i % 2 ? pair.y : pair.x);
  }
}

template <int kDim>
__device__ __forceinline__ void store_rows(const AttentionRows& to, const float (&sums)[kDim / 2], const Work& work, int32_t key,
                                           float factor) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
    store_row<kDim>(static_cast<__nv_bfloat16*>(to.data) + static_cast<int64_t>(work.begin + key + 8 * h) * to.token_stride +
                        work.head * to.head_stride,
                    sums, factor, h, key + 8 * h < work.length);
}

template <int kDim>
__device__ __forceinline__ void multiply(const Args& args, const Work& work, uint32_t shared, int32_t group) {
  using C = Config<kDim>;
  const uint32_t lane = threadIdx.x % 32, k = shared + group * 64 * 128, v = k + C::kKeyBytes;
  const int32_t last = work.key + 64 * group + 63;                                                           // of the warpgroup's keys
  const int32_t key = work.key + 64 * group + 16 * (threadIdx.x / 32 % 4) + static_cast<int32_t>(lane) / 4;  // the lane's first
  const int32_t all_see = first_query(last, args.block), see[2] = {first_query(key, args.block), first_query(key + 8, args.block)};
  float dk[kDim / 2], dv[kDim / 2];
  clear(dk);
  clear(dv);
  RingPosition<C::kStages> at;
  barrier_wait(shared + C::kKeysFull, 0);
  for (int32_t n = 0; n < args.group * work.tiles; ++n) {
    const int32_t query = (work.first + n % work.tiles) * kQueries;
    const uint32_t q = shared + C::kRing + at.stage * C::kStageBytes, dout = q + C::kQueryBytes;
    const uint32_t sums = shared + C::kSums + at.stage * 2 * C::kSumBytes;
    float s[kQueries / 2], t[kQueries / 2];
    uint32_t words[kQueries / 4], more_words[kQueries / 4];
    barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
    if (work.length - query < kQueries) {
      clear_rows<kDim, kQueries>(q, work.length - query, 1 + group);
      clear_rows<kDim, kQueries>(dout, work.length - query, 1 + group);
    }
    start_scores<kDim>(s, k, C::kKeyBlock, q);
    start_scores<kDim>(t, v, C::kKeyBlock, dout);
    wgmma_wait<1>();
    pin_registers(s);
    if (query < all_see) {
      const int32_t from[2] = {see[0] - query, see[1] - query};
      hide_queries(s, from, lane);
    }
    with_sums(s, sums, lane, [&](int i, float lse) { return ex2_approx(__fmaf_rn(s[i], args.factor, -lse)); });
    pack_tile(s, words);
    start_mix<kDim>(dv, words, dout);
    wgmma_wait<1>();
    pin_registers(t);
    with_sums(t, sums + C::kSumBytes, lane, [&](int i, float delta) { return __fmul_rn(s[i], t[i] - delta); });
    pack_tile(t, more_words);
    start_mix<kDim>(dk, more_words, q);
    wgmma_wait_all();
    pin_registers(dk);
    pin_registers(dv);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared + C::kEmpty + 8 * at.stage);
    at.advance();
  }
  store_rows<kDim>(args.dk, dk, work, key, args.scale);
  store_rows<kDim>(args.dv, dv, work, key, 1.0f);
}

template <int kDim>
__global__ void __launch_bounds__(Config<kDim>::kThreads, 1)
    attention_backward_keys_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                                   const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap dout,
                                   const __grid_constant__ Args args) {
  using C = Config<kDim>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const Work work(args, static_cast<int32_t>(blockIdx.x));
  if (work.tiles == 0) return;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(shared + C::kFull + 8 * i, 1);
      barrier_init(shared + C::kEmpty + 8 * i, 4 * C::kMathGroups);
    }
    barrier_init(shared + C::kKeysFull, 1);
    barrier_init_fence();
  }
  __syncthreads();
  const int32_t group = static_cast<int32_t>(warp_uniform(threadIdx.x / 128));
  if (group == C::kMathGroups) {
    warpgroup_give_registers<C::kProducerRegisters>();
    if (warp_uniform(threadIdx.x / 32 % 4) == 0 && elect_lane()) produce<kDim>(args, work, &q, &k, &v, &dout, shared);
  } else {
    warpgroup_take_registers<C::kMathRegisters>();
    multiply<kDim>(args, work, shared, group);
  }
}

template <int kDim>
void launch(const AttentionBackward& op, const Args& args, cudaStream_t stream) {
  using C = Config<kDim>;
  constexpr auto kernel = attention_backward_keys_kernel<kDim>;
  const Attention& f = op.forward;
  allow_shared_memory<kernel>(C::kBytes, current_device(), "attention_backward: reserving shared memory (this kernel needs a Hopper GPU)");
  const CUtensorMap q = rows_map(f.q, f.tokens, f.heads, kDim, kQueries), dout = rows_map(op.dout, f.tokens, f.heads, kDim, kQueries);
  const CUtensorMap k = rows_map(f.k, f.tokens, f.kv_heads, kDim), v = rows_map(f.v, f.tokens, f.kv_heads, kDim);
  kernel<<<static_cast<uint32_t>(int64_t{args.key_tiles} * args.pairs), C::kThreads, C::kBytes, stream>>>(q, k, v, dout, args);
  check_launch("attention_backward_keys_kernel");
}

constexpr int64_t kCachedQueries = 20 << 20;  // bytes of q and dout that stay in the L2 cache while blocks of keys share them

}  // namespace

namespace attention {

void keys_gradients_sm90(const AttentionBackward& op, const RowSums& sums, void* stream) {
  const Attention& f = op.forward;
  Args args{};
  args.sums = sums;
  args.dk = op.dk, args.dv = op.dv;
  args.starts = f.starts;
  args.kv_heads = static_cast<int32_t>(f.kv_heads), args.group = static_cast<int32_t>(f.heads / f.kv_heads);
  args.key_tiles = static_cast<int32_t>((f.longest + kKeys - 1) / kKeys);
  args.pairs = static_cast<int32_t>(f.sequences * f.kv_heads);
  args.span = static_cast<int32_t>(std::max<int64_t>(1, kCachedQueries / (f.longest * f.dim * 4 * args.group)));
  args.block = static_cast<int32_t>(f.block);
  args.factor = f.scale * 1.4426950408889634f, args.scale = f.scale;
  const auto s = static_cast<cudaStream_t>(stream);
  if (f.dim == 64) return launch<64>(op, args, s);
  if (f.dim == 96) return launch<96>(op, args, s);
  launch<128>(op, args, s);
}

}  // namespace attention
}  // namespace eightfold
