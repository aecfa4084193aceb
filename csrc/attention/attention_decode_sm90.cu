// Attention of few queries over a paged cache on Hopper: a warpgroup's 64 rows hold all queries of the heads that share a KV head.
//
//   unit      a chunk of keys of one KV head of one sequence; the blocks that stay (two to a multiprocessor) take them in turn. Which there
//             are the blocks find from the lengths, on the device: the grid is the same whatever they are.
//   producer  a warp's thread keeps a ring of tiles, k and v by turns, full; also the next unit's
//   math      the tiles of the chunk as in the kernel of many queries (attention_tile.cuh). A sequence of one chunk is finished there; else
//             what the chunk gave goes to the workspace,
//   fold      where a second kernel folds the chunks of a row in order
//
// Floor: the bytes of keys and values, once. The tensor cores multiply 64 rows whatever their number: 8 clocks a key of dim 128, where a
// multiprocessor's share of the memory brings one in 38.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "attention/attention_keys.cuh"
#include "attention/attention_maps.h"
#include "attention/attention_paged.h"
#include "core/barrier.cuh"
#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "core/launch.cuh"
#include "core/memory.cuh"
#include "core/quad.cuh"

namespace eightfold {
namespace {

using namespace attention;

constexpr int kRows = 64, kFoldWarps = 8, kFoldAhead = 16;

template <int kDim>
struct Config {
  static constexpr int kThreads = 128 + 32, kBlocksOfMultiprocessor = 2;
  static constexpr int kQueryBytes = Shape<kDim>::kBlocks * kRows * 128, kTileBytes = Shape<kDim>::kTileBytes;
  static constexpr int kStages = kDim == 64 ? 6 : 3;
  static constexpr int kRing = kQueryBytes, kFull = kRing + kStages * kTileBytes, kEmpty = kFull + 8 * kStages;
  static constexpr int kBytes = kEmpty + 8 * kStages;  // and what count_chunks takes
  static constexpr int kCarries = 1 + kThreads / 32;
  static_assert(kBlocksOfMultiprocessor * (kBytes + 1024) <= 233472);
};

// Parts of rows that wait for their fold: part = chunk * kv_heads + KV head, chunks counted over all sequences.
struct Parts {
  float *out, *top, *sum;  // [part, row, dim], [part, row]
  int32_t* begins;         // [sequences + 1]: the first chunk of each sequence
};

struct Args {
  PagedKeys keys;
  Parts parts;
  const __nv_bfloat16* q;
  __nv_bfloat16* out;
  int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
  const int32_t* starts;
  int32_t kv_heads, group, sequences, most_rows;  // most_rows: of a KV head and sequence, at most kRows
  float factor;
};

__device__ __forceinline__ int32_t chunks_of(const Args& args, int32_t sequence) {
  const bool asks = __ldg(args.starts + sequence + 1) > __ldg(args.starts + sequence);
  return asks ? (__ldg(args.keys.lengths + sequence) + kAttentionChunk - 1) / kAttentionChunk : 0;
}

// begins[s]: chunks of the sequences before s. By all threads of a block; `begins` may be shared or device memory.
__device__ __forceinline__ void count_chunks(const Args& args, int32_t* begins, int32_t* carry) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (threadIdx.x == 0) carry[0] = 0;
  for (int32_t base = 0; base < args.sequences; base += blockDim.x) {
    const int32_t s = base + threadIdx.x;
    int32_t own = s < args.sequences ? chunks_of(args, s) : 0, sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t before = __shfl_up_sync(0xFFFFFFFFu, sum, step);
      if (lane >= step) sum += before;
    }
    __syncthreads();
    if (lane == 31) carry[1 + warp] = sum;
    __syncthreads();
    int32_t before = carry[0];
    for (int w = 0; w < warp; ++w) before += carry[1 + w];
    if (s < args.sequences) begins[s] = before + sum - own;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 0; w < warps; ++w) carry[0] += carry[1 + w];
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) begins[args.sequences] = carry[0];
  __syncthreads();
}

struct Unit {
  int32_t sequence, chunk, chunks, head, part;  // chunk: of `chunks` of the sequence
  int32_t keys, row, queries;

  __device__ __forceinline__ Unit(const Args& args, const int32_t* begins, int32_t index) {
    head = index % args.kv_heads, part = index;
    const int32_t at = index / args.kv_heads;
    int32_t low = 0, high = args.sequences;  // begins[low] <= at < begins[high]
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      (begins[middle] <= at ? low : high) = middle;
    }
    sequence = low, chunk = at - begins[low], chunks = begins[low + 1] - begins[low];
    keys = __ldg(args.keys.lengths + sequence);
    row = __ldg(args.starts + sequence);
    queries = __ldg(args.starts + sequence + 1) - row;
  }
  __device__ __forceinline__ int32_t first_tile() const { return chunk * kTilesOfChunk; }
  __device__ __forceinline__ int32_t end_tile() const { return min((keys + kTile - 1) / kTile, (chunk + 1) * kTilesOfChunk); }
};

template <int kDim>
__device__ __forceinline__ void produce(const Args& args, const CUtensorMap* k, const CUtensorMap* v, uint32_t shared,
                                        const int32_t* begins, int32_t units) {
  using C = Config<kDim>;
  RingPosition<C::kStages> at;
  for (int32_t index = blockIdx.x; index < units; index += gridDim.x) {
    const Unit unit(args, begins, index);
    for (int32_t tile = unit.first_tile(); tile < unit.end_tile(); ++tile) {
#pragma unroll
      for (const CUtensorMap* map : {k, v}) {
        const uint32_t full = shared + C::kFull + 8 * at.stage;
        barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
        barrier_arrive_expect(full, C::kTileBytes);
        args.keys.load<kDim>(shared + C::kRing + at.stage * C::kTileBytes, map, full, unit.head, 0, unit.sequence, tile);
        at.advance();
      }
    }
  }
}

// The queries of a unit, row = query * group + head of the group, as the tensor core wants them; rows that do not exist are zeros.
template <int kDim>
__device__ __forceinline__ void place_queries(const Args& args, const Unit& unit, uint32_t shared) {
  constexpr int kPieces = kDim / 8;  // of 16 bytes
  for (int32_t i = threadIdx.x; i < kRows * kPieces; i += 128) {
    const int32_t row = i / kPieces, piece = i % kPieces;
    const int32_t query = row / args.group, head = unit.head * args.group + row % args.group;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (query < unit.queries)
      v = *reinterpret_cast<const uint4*>(args.q + (static_cast<int64_t>(unit.row) + query) * args.q_token_stride +
                                          head * args.q_head_stride + 8 * piece);
    const uint32_t to = shared + piece / 8 * (kRows * 128) + row * 128 + (piece % 8 ^ row % 8) * 16;
    store_shared(to, v);
  }
  async_fence();
  warpgroup_meet(1);
}

template <int kDim>
__device__ __forceinline__ void store_result(const Args& args, const Unit& unit, const Rows<kDim>& rows) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t row = 16 * (threadIdx.x / 32) + lane / 4 + 8 * h, query = row / args.group;
    const bool exists = query < unit.queries;
    if (unit.chunks == 1) {
      const float inverse = reciprocal(rows.sum[h]);
      __nv_bfloat16* to = args.out + (static_cast<int64_t>(unit.row) + query) * args.out_token_stride +
                          (unit.head * args.group + row % args.group) * args.out_head_stride;
#pragma unroll
      for (int i = 0; i < kDim / 8; i += 4) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          words[j] = pack_bf16(__fmul_rn(rows.out[4 * (i + j) + 2 * h], inverse), __fmul_rn(rows.out[4 * (i + j) + 2 * h + 1], inverse));
        transpose_quad(words, lane % 4);
        if (exists) *reinterpret_cast<uint4*>(to + 8 * i + 8 * (lane % 4)) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    } else if (exists) {
      const int64_t at = static_cast<int64_t>(unit.part) * args.most_rows + row;
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i)
        *reinterpret_cast<float2*>(args.parts.out + at * kDim + 8 * i + 2 * (lane % 4)) =
            make_float2(rows.out[4 * i + 2 * h], rows.out[4 * i + 2 * h + 1]);
      if (lane % 4 == 0) args.parts.top[at] = rows.top[h], args.parts.sum[at] = rows.sum[h];
    }
  }
}

template <int kDim>
__device__ __forceinline__ void multiply(const Args& args, uint32_t shared, const int32_t* begins, int32_t units) {
  using C = Config<kDim>;
  const uint32_t lane = threadIdx.x % 32;
  const int32_t place = 16 * (threadIdx.x / 32) + static_cast<int32_t>(lane) / 4;
  RingPosition<C::kStages> at;
  auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  };
  for (int32_t index = blockIdx.x; index < units; index += gridDim.x) {
    const Unit unit(args, begins, index);
    place_queries<kDim>(args, unit, shared);
    Rows<kDim> rows;
    rows.clear();
    for (int32_t tile = unit.first_tile(); tile < unit.end_tile(); ++tile) {
      Scores scores;
      Weights weights;
      barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
      start_scores<kDim>(scores, shared, kRows * 128, shared + C::kRing + at.stage * C::kTileBytes);
      wgmma_wait_all();
      pin_registers(scores);
      release(shared + C::kEmpty + 8 * at.stage);
      at.advance();
      const int32_t kept = unit.keys - tile * kTile;  // the last query sees them all
      if (kept < kTile + unit.queries) {
        const int32_t last = kept - unit.queries + 1;  // what query 0 sees
        const int32_t limits[2] = {last + place / args.group, last + (place + 8) / args.group};
        hide(scores, limits, lane);
      }
      absorb<kDim>(rows, scores, args.factor, weights);
      barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
      const uint32_t v = shared + C::kRing + at.stage * C::kTileBytes;
      if (kept < kTile) clear_rows<kDim>(v, kept, 1);
      start_mix<kDim>(rows, weights, v);
      wgmma_wait_all();
      pin_registers(rows.out);
      release(shared + C::kEmpty + 8 * at.stage);
      at.advance();
    }
    end_chunk<kDim>(rows);
    store_result<kDim>(args, unit, rows);
    warpgroup_meet(1);  // before the next unit's queries take their place
  }
}

template <int kDim>
__global__ void __launch_bounds__(Config<kDim>::kThreads, Config<kDim>::kBlocksOfMultiprocessor)
    paged_decode_kernel(const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v, const __grid_constant__ Args args) {
  using C = Config<kDim>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(shared + C::kFull + 8 * i, 1);
      barrier_init(shared + C::kEmpty + 8 * i, 4);
    }
    barrier_init_fence();
  } else if (threadIdx.x == 32) {
    tma_prefetch_map(&k);
    tma_prefetch_map(&v);
  }
  int32_t *carry = reinterpret_cast<int32_t*>(memory + C::kBytes), *begins = carry + C::kCarries;
  count_chunks(args, begins, carry);
  const int32_t units = begins[args.sequences] * args.kv_heads;
  if (blockIdx.x == 0) {
    for (int32_t i = threadIdx.x; i <= args.sequences; i += C::kThreads) args.parts.begins[i] = begins[i];
  }
  if (warp_uniform(threadIdx.x / 32) == 4) {
    if (elect_lane()) produce<kDim>(args, &k, &v, shared, begins, units);
  } else {
    multiply<kDim>(args, shared, begins, units);
  }
}

// A warp folds the chunks of a row in 32 of the dimension, several on their way at once.
template <int kDim>
__global__ void __launch_bounds__(32 * kFoldWarps) paged_fold_kernel(const Args args) {
  wait_for_earlier_kernels();
  constexpr int kPieces = kDim / 32;
  const int32_t lane = threadIdx.x % 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kFoldWarps + threadIdx.x / 32;
  const int32_t column = static_cast<int32_t>(index % kPieces) * 32 + lane, row = static_cast<int32_t>(index / kPieces % args.most_rows);
  const int32_t of = static_cast<int32_t>(index / kPieces / args.most_rows), sequence = of / args.kv_heads, head = of % args.kv_heads;
  if (sequence >= args.sequences) return;
  const int32_t begin = args.parts.begins[sequence], end = args.parts.begins[sequence + 1];
  const int32_t first = __ldg(args.starts + sequence), query = row / args.group;
  if (end - begin < 2 || query >= __ldg(args.starts + sequence + 1) - first) return;
  float top = kNothing, sum = 0.0f, out = 0.0f;
  for (int32_t base = begin; base < end; base += kFoldAhead) {
    const int32_t count = min(end - base, kFoldAhead);
    float tops[kFoldAhead], sums[kFoldAhead], outs[kFoldAhead];
#pragma unroll
    for (int c = 0; c < kFoldAhead; ++c) {
      if (c >= count) break;
      const int64_t at = (static_cast<int64_t>(base + c) * args.kv_heads + head) * args.most_rows + row;
      tops[c] = args.parts.top[at], sums[c] = args.parts.sum[at], outs[c] = args.parts.out[at * kDim + column];
    }
#pragma unroll
    for (int c = 0; c < kFoldAhead; ++c) {
      if (c >= count) break;
      const Fold fold = fold_of(top, tops[c]);
      top = fold.top;
      sum = fold(sum, sums[c]);
      out = fold(out, outs[c]);
    }
  }
  __nv_bfloat16* to = args.out + (static_cast<int64_t>(first) + query) * args.out_token_stride +
                      (head * args.group + row % args.group) * args.out_head_stride;
  to[column] = __float2bfloat16_rn(__fmul_rn(out, reciprocal(sum)));
}

int64_t most_chunks(const PagedAttention& op) { return (op.most_pages * op.page_size + kAttentionChunk - 1) / kAttentionChunk; }
int64_t most_rows(const PagedAttention& op) { return op.longest * (op.heads / op.kv_heads); }
bool few_queries(const PagedAttention& op) { return most_rows(op) <= kRows; }

template <int kDim>
void launch(const PagedAttention& op, const Args& args, cudaStream_t stream) {
  using C = Config<kDim>;
  constexpr auto kernel = paged_decode_kernel<kDim>;
  const int device = current_device();
  const int bytes = C::kBytes + 4 * (C::kCarries + args.sequences + 1);
  allow_shared_memory<kernel>(bytes, device, "paged_attention: reserving shared memory (this kernel needs a Hopper GPU)");
  const int64_t units = static_cast<int64_t>(args.sequences) * args.kv_heads * most_chunks(op);
  const int grid = static_cast<int>(std::min<int64_t>(units, C::kBlocksOfMultiprocessor * multiprocessors(device)));
  kernel<<<grid, C::kThreads, bytes, stream>>>(pages_map(op.k_pages, op), pages_map(op.v_pages, op), args);
  check_launch("paged_decode_kernel");

  cudaLaunchAttribute early = early_start();
  cudaLaunchConfig_t config{};
  const int64_t warps = static_cast<int64_t>(args.sequences) * args.kv_heads * args.most_rows * (kDim / 32);
  config.gridDim = dim3(static_cast<unsigned>((warps + kFoldWarps - 1) / kFoldWarps));
  config.blockDim = dim3(32 * kFoldWarps);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, paged_fold_kernel<kDim>, args);
  check_launch("paged_fold_kernel");
}

}  // namespace

int64_t paged_attention_workspace_sm90(const PagedAttention& op) {
  if (op.tokens == 0 || !few_queries(op)) return 0;
  const int64_t parts = op.sequences * op.kv_heads * most_chunks(op) * most_rows(op);
  return parts * (op.dim + 2) * 4 + (op.sequences + 1) * 4;
}

void paged_attention_sm90(const PagedAttention& op, void* workspace, void* stream) {
  if (op.tokens == 0) return;
  if (!few_queries(op)) return paged_rows_sm90(op, stream);
  Args args{};
  args.keys = {op.pages, op.lengths, static_cast<int32_t>(op.most_pages), static_cast<int32_t>(op.page_size),
               static_cast<int32_t>(op.page_count)};
  args.q = static_cast<const __nv_bfloat16*>(op.q.data), args.out = static_cast<__nv_bfloat16*>(op.out.data);
  args.q_token_stride = op.q.token_stride, args.q_head_stride = op.q.head_stride;
  args.out_token_stride = op.out.token_stride, args.out_head_stride = op.out.head_stride;
  args.starts = op.starts;
  args.kv_heads = static_cast<int32_t>(op.kv_heads), args.group = static_cast<int32_t>(op.heads / op.kv_heads);
  args.sequences = static_cast<int32_t>(op.sequences);
  args.most_rows = static_cast<int32_t>(most_rows(op));
  args.factor = op.scale * 1.4426950408889634f;
  const int64_t parts = op.sequences * op.kv_heads * most_chunks(op) * most_rows(op);
  args.parts.out = static_cast<float*>(workspace);
  args.parts.top = args.parts.out + parts * op.dim;
  args.parts.sum = args.parts.top + parts;
  args.parts.begins = reinterpret_cast<int32_t*>(args.parts.sum + parts);
  const auto s = static_cast<cudaStream_t>(stream);
  if (op.dim == 64) return launch<64>(op, args, s);
  if (op.dim == 96) return launch<96>(op, args, s);
  launch<128>(op, args, s);
}

}  // namespace eightfold
