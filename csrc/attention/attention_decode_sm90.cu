// Attention of few queries over a paged cache on Hopper: a warpgroup's 64 rows hold all queries of the heads that share a KV head.
//
//   unit      a span of chunks of one KV head of one sequence (attention_units.cuh); the blocks that stay, two to a multiprocessor, take
//             them in turn
//   producer  a warp keeps a ring of tiles, k and v by turns, full, also of the next unit: a lane asks for a share of a page
//   math      the tiles of a chunk as in the kernel of many queries (attention_tile.cuh). What the unit has folded so far waits in the
//             block's slot, which stays in the L2 cache: a chunk's reads hide it. A sequence of one span is finished there,
//   fold      the parts of others by a second kernel, in order
//   start     where all but the newest rows is settled, units are planned and the ring is filled while the kernel ahead, which makes those
//             rows, still runs. Kernels before it may run as well, each having started early, but none of before the last kernel that
//             did not: and that one came after all that is read early (PagedAttention::settled). Writes, and newest rows, wait
//
// Over pages of E4M3 codes the math warpgroup first makes a tile wide (attention_pages.cuh), and many queries, too, are computed here: 64
// rows are a unit.
//
// Floor: the bytes of keys and values, once. The tensor cores multiply 64 rows whatever their number: 8 clocks a key of dim 128, where a
// multiprocessor's share of the memory brings one in 38.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "attention/attention_maps.h"
#include "attention/attention_paged.h"
#include "attention/attention_pages.cuh"
#include "attention/attention_units.cuh"
#include "core/barrier.cuh"
#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "core/launch.cuh"
#include "core/memory.cuh"
#include "core/tma_stream.cuh"
#include "quant/row_cast.cuh"

namespace eightfold {
namespace {

using namespace attention;

constexpr int kCodesDim = quant::kTile;  // of a head that is a group of codes

template <int kDim, class Pages>
struct Config {
  static constexpr int kThreads = 128 + 32, kBlocksOfMultiprocessor = 2;
  static constexpr int kQueryBytes = Shape<kDim>::kBlocks * kRows * 128, kTileBytes = Pages::template Tile<kDim>::kBytes;
  static constexpr int kStages = kDim == 64 ? 6 : 3;
  static constexpr int kWide = kQueryBytes, kRing = kWide + (Pages::kCodes ? Shape<kDim>::kTileBytes : 0);  // kWide: a tile of codes
  static constexpr int kFull = kRing + kStages * kTileBytes, kEmpty = kFull + 8 * kStages;
  static constexpr int kPlan = kEmpty + 8 * kStages, kUnit = kPlan + 4 * Plan<kThreads>::kInts, kBytes = kUnit + sizeof(Unit);
  static_assert(kBlocksOfMultiprocessor * (kBytes + 1024) <= 233472);
};

template <int kDim, class Pages, int kThreads>
__device__ __forceinline__ void produce(const PagedArgs& args, const Pages& pages, uint32_t shared, const Plan<kThreads>& plan) {
  using C = Config<kDim, Pages>;
  constexpr int kParts = Pages::template Tile<kDim>::kParts;
  const int32_t lane = threadIdx.x % 32;
  Share share;
  share.part = lane % kParts;
  // Where a unit has all queries, nobody reads its keys again: what else the L2 cache holds, as weights of norms, is read once more.
  share.policy = args.most_rows > kRows ? l2_evict_normal() : l2_evict_first();
  // The lane's share of a tile.
  const auto share_of = [&](const Unit& unit, int32_t tile) {
    const int32_t kept = unit.keys - tile * kTile;
    share.keys = kept < kTile ? kFewKeys : min(args.keys.page_size, kTile);
    share.begin = lane / kParts * share.keys;
    share.coming = min((kept + share.keys - 1) / share.keys * share.keys, kTile);
    const int32_t key = tile * kTile + share.begin;
    share.page = share.begin < share.coming ? args.keys.page(unit.sequence, key) : 0;
    share.place = key % args.keys.page_size;
    return share;
  };
  RingPosition<C::kStages> at;
  bool waits = args.settled;
  for (int32_t index = blockIdx.x; index < plan.units; index += gridDim.x) {
    const Unit unit(args, plan, index);
    share.head = unit.head;
    const int32_t first = unit.chunk * kTilesOfChunk, end = unit.end_tile();
    Share next = share_of(unit, first);
    for (int32_t tile = first; tile < end; ++tile) {
      if (waits && unit.keys - tile * kTile - unit.queries < kTile) {  // it has keys of this launch's own rows
        wait_for_earlier_kernels();
        waits = false;
      }
      const Share now = next;
      if (tile + 1 < end) next = share_of(unit, tile + 1);  // its page is on the way
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const uint32_t full = shared + C::kFull + 8 * at.stage;
        barrier_wait(shared + C::kEmpty + 8 * at.stage, at.parity ^ 1);
        if (lane == 0) barrier_arrive_expect(full, now.coming * (C::kTileBytes / kTile));
        __syncwarp();
        if (now.begin < now.coming) pages.template load<kDim>(which, shared + C::kRing + at.stage * C::kTileBytes, full, args.keys, now);
        at.advance();
      }
    }
  }
}

// The lane's row h in a slot.
__device__ __forceinline__ int64_t place_in(const Slots& slots, int32_t slot, int32_t place) {
  return static_cast<int64_t>(slot) * slots.rows + place;
}

// Into what this block has left in a slot goes a chunk's `rows`, which then hold both.
template <int kDim>
__device__ __forceinline__ void fold_into(const Slots& slots, int32_t slot, int32_t place, int32_t count, Rows<kDim>& rows) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (place + 8 * h >= count) continue;
    const int64_t at = place_in(slots, slot, place + 8 * h);
    const float* from = slots.out + at * kDim + 2 * (threadIdx.x % 4);
    const Fold fold = fold_of(slots.top[at], rows.top[h]);
    rows.top[h] = fold.top;
    rows.sum[h] = fold(slots.sum[at], rows.sum[h]);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      const float2 held = *reinterpret_cast<const float2*>(from + 8 * i);
      rows.out[4 * i + 2 * h] = fold(held.x, rows.out[4 * i + 2 * h]);
      rows.out[4 * i + 2 * h + 1] = fold(held.y, rows.out[4 * i + 2 * h + 1]);
    }
  }
}

template <int kDim>
__device__ __forceinline__ void leave_in(const Slots& slots, int32_t slot, int32_t place, int32_t count, const Rows<kDim>& rows) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (place + 8 * h >= count) continue;
    const int64_t at = place_in(slots, slot, place + 8 * h);
    float* to = slots.out + at * kDim + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i)
      *reinterpret_cast<float2*>(to + 8 * i) = make_float2(rows.out[4 * i + 2 * h], rows.out[4 * i + 2 * h + 1]);
    if (threadIdx.x % 4 == 0) slots.top[at] = rows.top[h], slots.sum[at] = rows.sum[h];
  }
}

// The lane's row h of `head` as codes, a group: what the cast of store_row()'s row would give. By whole warps; `exists` may differ.
template <int kDim>
__device__ __forceinline__ void store_codes(const PagedArgs& args, int64_t token, int32_t head, const Rows<kDim>& rows, int h,
                                            bool exists) {
  using Eight = Octet<__nv_bfloat16>;
  const int32_t member = threadIdx.x % 4;
  const float inverse = reciprocal(rows.sum[h]);
  Eight octets[kDim / 32];
  uint32_t maximum = 0;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    octet_of_row<kDim>(octets[i].words, rows.out, h, inverse, 4 * i);
    maximum = Eight::larger(maximum, octet_maximum(octets[i]));
  }
  maximum = Eight::larger(maximum, __shfl_xor_sync(0xFFFFFFFFu, maximum, 1));
  maximum = Eight::larger(maximum, __shfl_xor_sync(0xFFFFFFFFu, maximum, 2));
  const float scale = group_scale(__uint_as_float(Eight::widest_bits(maximum)), false);
  const auto by = GroupDivider<__nv_bfloat16>::of(scale);
  if (!exists) return;
  if (member == 0) args.codes.scales[token + head * args.codes.scale_ld] = scale;
  uint8_t* to = args.codes.codes + (token * (args.kv_heads * args.group) + head) * kDim + 8 * member;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) store_codes8(to + 32 * i, encode_octet(octets[i], by), 8, true);
}

template <int kDim>
__device__ __forceinline__ void store_result(const PagedArgs& args, const Unit& unit, int32_t place, const Rows<kDim>& rows) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t row = unit.first + place + 8 * h;
    if (kDim == kCodesDim && args.codes.codes) {
      store_codes<kDim>(args, static_cast<int64_t>(unit.row) + row / args.group, unit.head * args.group + row % args.group, rows, h,
                        place + 8 * h < unit.rows);
      continue;
    }
    store_row<kDim>(args.out + (static_cast<int64_t>(unit.row) + row / args.group) * args.out_token_stride +
                        (unit.head * args.group + row % args.group) * args.out_head_stride,
                    rows, h, place + 8 * h < unit.rows);
  }
}

// kExist: of a lane's two rows; 1 where a unit has 8 rows at most, which are the first warp's.
// `kept_unit`: in shared memory, where a unit waits for the end of its chunks: the tiles want the registers. Each block waits here for the
// kernels ahead, once its first unit is known.
template <int kDim, int kExist, class Pages, int kThreads>
__device__ __forceinline__ void multiply(const PagedArgs& args, uint32_t shared, const Plan<kThreads>& plan, Unit* kept_unit) {
  using C = Config<kDim, Pages>;
  const uint32_t lane = threadIdx.x % 32;
  const int32_t place = 16 * (threadIdx.x / 32) + static_cast<int32_t>(lane) / 4;  // of the lane's first row
  const int32_t own_slot = args.slots.parts + blockIdx.x;
  RingPosition<C::kStages> at;
  auto release = [&] {
    __syncwarp();
    if (lane == 0) barrier_arrive(shared + C::kEmpty + 8 * at.stage);
    at.advance();
  };
  // The next tile once it has come, until done() with it. Codes are made wide where the tile before was.
  auto next = [&](int32_t kept) {
    const uint32_t tile = shared + C::kRing + at.stage * C::kTileBytes;
    barrier_wait(shared + C::kFull + 8 * at.stage, at.parity);
    if constexpr (!Pages::kCodes) return tile;
    warpgroup_meet(1);
    widen<kDim, kExist == 1 ? 4 : 2>(shared + C::kWide, tile, kept);  // what leaves all in registers
    release();
    async_fence();
    warpgroup_meet(1);
    return shared + C::kWide;
  };
  auto done = [&] {
    if constexpr (!Pages::kCodes) release();
  };
  for (int32_t index = blockIdx.x; index < plan.units; index += gridDim.x) {
    const Unit unit(args, plan, index);
    if (threadIdx.x == 0) *kept_unit = unit;  // seen by all once the queries are placed
    if (index == blockIdx.x) wait_for_earlier_kernels();
    place_queries<kDim>(shared, 1, [&](int32_t place) -> const __nv_bfloat16* {  // row = query * group + head of the group
      const int32_t row = unit.first + place;
      if (place >= unit.rows) return nullptr;
      return args.q + (static_cast<int64_t>(unit.row) + row / args.group) * args.q_token_stride +
             (unit.head * args.group + row % args.group) * args.q_head_stride;
    });
    Rows<kDim> rows;
    rows.clear();
    const int32_t end_tile = unit.end_tile(), all_see = unit.sees(args, 0);
    for (int32_t tile = unit.chunk * kTilesOfChunk; tile < end_tile; ++tile) {
      Scores scores;
      Weights weights;
      const int32_t kept = kept_unit->keys - tile * kTile;
      start_scores<kDim>(scores, shared, kRows * 128, next(kept));
      wgmma_wait_all();
      pin_registers(scores);
      done();
      if (all_see < (tile + 1) * kTile) {
        const int32_t limits[2] = {kept_unit->sees(args, place) - tile * kTile, kept_unit->sees(args, place + 8) - tile * kTile};
        hide(scores, limits, lane);
      }
      absorb<kDim, kExist>(rows, scores, args.factor, weights);
      const uint32_t v = next(kept);
      if (!Pages::kCodes && kept < kTile) clear_rows<kDim>(v, kept, 1);
      start_mix<kDim>(rows.out, weights, v);
      wgmma_wait_all();
      pin_registers(rows.out);
      done();
      const bool ends = tile + 1 == end_tile;
      if (!ends && (tile + 1) % kTilesOfChunk != 0) continue;
      const int32_t chunk = tile / kTilesOfChunk;
      end_chunk<kDim>(rows);
      const Unit& unit = *kept_unit;
      if (unit.folds() && chunk > 0) fold_into<kDim>(args.slots, own_slot, place, unit.rows, rows);
      if (ends && unit.finishes())
        store_result<kDim>(args, unit, place, rows);
      else
        leave_in<kDim>(args.slots, unit.folds() && !ends ? own_slot : unit.slot(args, chunk), place, unit.rows, rows);
      rows.clear();
    }
    warpgroup_meet(1);  // before the next unit, and its queries, take their place
  }
  wait_for_earlier_kernels();  // blocks without a unit, too
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.slots.span = plan.folds ? plan.span : 0;
}

template <int kDim, int kExist, class Pages>
__global__ void __launch_bounds__(Config<kDim, Pages>::kThreads, Config<kDim, Pages>::kBlocksOfMultiprocessor)
    paged_decode_kernel(const __grid_constant__ Pages pages, const __grid_constant__ PagedArgs args) {
  using C = Config<kDim, Pages>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  let_next_kernel_start();
  const int64_t line = (static_cast<int64_t>(blockIdx.x) * C::kThreads + threadIdx.x) * 32;  // of 128 bytes of page numbers
  if (line < static_cast<int64_t>(args.sequences) * args.keys.most_pages) prefetch_l2(args.keys.pages + line);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(shared + C::kFull + 8 * i, 1);
      barrier_init(shared + C::kEmpty + 8 * i, 4);
    }
    barrier_init_fence();
  } else if (threadIdx.x == 32) {
    pages.prefetch();
  }
  if (!args.settled) wait_for_earlier_kernels();
  const Plan<C::kThreads> plan(args, reinterpret_cast<int32_t*>(memory + C::kPlan));
  if (warp_uniform(threadIdx.x / 32) == 4) return produce<kDim>(args, pages, shared, plan);
  multiply<kDim, kExist, Pages>(args, shared, plan, reinterpret_cast<Unit*>(memory + C::kUnit));
}

// What a thread has of a row: a column.
struct Folded {
  float top = kNothing, sum = 0.0f, out = 0.0f;

  // Parts `step` rows of slots apart, all on their way at once; those from `count` on change nothing. A lane has the factors of a part:
  // they are those of fold_of() in turn, as a maximum knows no order.
  template <int kAhead, int kDim>
  __device__ __forceinline__ void take(const Slots& slots, int64_t at, int64_t step, int32_t count) {
    const int32_t lane = threadIdx.x % 32;
    const bool mine = lane < min(count, kAhead);
    const float own = mine ? slots.top[at + lane * step] : kNothing, own_sum = mine ? slots.sum[at + lane * step] : 0.0f;
    const float* from = slots.out + at * kDim + threadIdx.x;
    float outs[kAhead];
#pragma unroll
    for (int c = 0; c < kAhead; ++c, from += step * kDim) outs[c] = c < count ? *from : -0.0f;
    float most = own;
#pragma unroll
    for (int by = 1; by < kAhead; by *= 2) {
      const float before = __shfl_up_sync(0xFFFFFFFFu, most, by);
      if (lane >= by) most = fmaxf(most, before);
    }
    most = fmaxf(most, top);
    const float before = __shfl_up_sync(0xFFFFFFFFu, most, 1);
    const float all = ex2_approx((lane == 0 ? top : before) - most), part = ex2_approx(own - most), added = __fmul_rn(own_sum, part);
#pragma unroll
    for (int c = 0; c < kAhead; ++c) {
      const float scale = __shfl_sync(0xFFFFFFFFu, all, c);
      sum = __fmaf_rn(sum, scale, __shfl_sync(0xFFFFFFFFu, added, c));
      out = __fmaf_rn(out, scale, __fmul_rn(outs[c], __shfl_sync(0xFFFFFFFFu, part, c)));
    }
    top = __shfl_sync(0xFFFFFFFFu, most, kAhead - 1);
  }
};

// A block's row, of which a thread has one column, as codes: cast as anywhere, once the first warp has it.
__device__ __forceinline__ void store_codes(const PagedArgs& args, int64_t token, int32_t head, __nv_bfloat16 result) {
  __shared__ __align__(16) __nv_bfloat16 row[kCodesDim];
  row[threadIdx.x] = result;
  __syncthreads();
  if (threadIdx.x < 32) {
    const int count = threadIdx.x < kCodesDim / 8 ? 8 : 0;
    const Octet<__nv_bfloat16> x = count > 0 ? load_shared(row + 8 * threadIdx.x) : Octet<__nv_bfloat16>{};
    const int64_t cols = static_cast<int64_t>(args.kv_heads) * args.group * kCodesDim;
    quant::cast_row_octet(x, args.codes, token, static_cast<int64_t>(head) * kCodesDim + 8 * threadIdx.x, cols, count, true);
  }
  __syncthreads();  // before the next row
}

// A block takes rows, a thread a column.
template <int kDim>
__global__ void __launch_bounds__(kDim) paged_fold_kernel(const __grid_constant__ PagedArgs args) {
  let_next_kernel_start();
  constexpr int kFew = 8, kMany = 32;
  const int64_t rows = static_cast<int64_t>(args.sequences) * args.kv_heads * args.slots.rows;
  const int32_t rows_of_sequence = args.kv_heads * args.slots.rows;
  if (!args.settled) wait_for_earlier_kernels();
  Sequence sequence(args, static_cast<int32_t>(blockIdx.x) / rows_of_sequence);
  const bool few = args.sequences <= kFewSequences;
  int32_t span = 0;
  if (few) span = span_of(args, __reduce_add_sync(0xFFFFFFFFu, sequence_of_lane(args).chunks));
  wait_for_earlier_kernels();
  if (!few) span = *args.slots.span;
  if (span == 0) return;
  for (int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const int32_t row = static_cast<int32_t>(index % args.slots.rows), of = static_cast<int32_t>(index / args.slots.rows);
    const int32_t head = of % args.kv_heads, query = row / args.group;
    if (index != blockIdx.x) sequence = Sequence(args, of / args.kv_heads);
    if (sequence.chunks <= span || query >= sequence.queries) continue;
    const int64_t step = static_cast<int64_t>(args.kv_heads) * args.slots.rows;
    int64_t at = (static_cast<int64_t>(of / args.kv_heads) * args.most_chunks + span - 1) * step + head * args.slots.rows + row;
    Folded folded;
    for (int32_t left = sequence.chunks - span + 1; left > 0;) {
      if (left > kFew) {
        folded.take<kMany, kDim>(args.slots, at, step, left);
        at += kMany * step, left -= kMany;
      } else {
        folded.take<kFew, kDim>(args.slots, at, step, left);
        left = 0;
      }
    }
    const int64_t token = static_cast<int64_t>(sequence.row) + query;
    const int32_t query_head = head * args.group + row % args.group;
    const __nv_bfloat16 result = __float2bfloat16_rn(__fmul_rn(folded.out, reciprocal(folded.sum)));
    if (kDim == kCodesDim && args.codes.codes)
      store_codes(args, token, query_head, result);
    else
      args.out[token * args.out_token_stride + query_head * args.out_head_stride + threadIdx.x] = result;
  }
}

int64_t most_chunks(const PagedAttention& op) { return (op.most_pages * op.page_size + kAttentionChunk - 1) / kAttentionChunk; }
int64_t most_rows(const PagedAttention& op) { return op.longest * (op.heads / op.kv_heads); }
bool few_queries(const PagedAttention& op) { return most_rows(op) <= kRows; }
bool computes(const PagedAttention& op) { return few_queries(op) || op.page_dtype == DType::e4m3; }

int64_t most_blocks() { return int64_t{2} * multiprocessors(current_device()); }

// Whether units have whole sequences: where many queries make units enough, and where sequences do whose lengths, of a few chunks at most,
// cannot differ by much. Then there are no parts, and a step of decoding has a kernel less in each layer.
bool whole_sequences(const PagedAttention& op) {
  constexpr int64_t kFewChunks = 2048 / kAttentionChunk;
  return !few_queries(op) || (most_chunks(op) <= kFewChunks && 10 * op.sequences * op.kv_heads >= 9 * most_blocks());
}

int64_t blocks_of(const PagedAttention& op) {
  const int64_t of_head = few_queries(op) ? (whole_sequences(op) ? 1 : most_chunks(op)) : (most_rows(op) + kRows - 1) / kRows;
  return std::min(op.sequences * op.kv_heads * of_head, most_blocks());
}
int64_t parts_of(const PagedAttention& op) { return whole_sequences(op) ? 0 : op.sequences * op.kv_heads * most_chunks(op); }
int64_t rows_of_slot(const PagedAttention& op) { return std::min<int64_t>(most_rows(op), kRows); }
int64_t rows_of_slots(const PagedAttention& op) { return (parts_of(op) + blocks_of(op)) * rows_of_slot(op); }

template <int kDim, int kExist, class Pages>
void launch(const PagedAttention& op, const Pages& pages, const PagedArgs& args, cudaStream_t stream) {
  using C = Config<kDim, Pages>;
  constexpr auto kernel = paged_decode_kernel<kDim, kExist, Pages>;
  const int device = current_device();
  allow_shared_memory<kernel>(C::kBytes, device, "paged_attention: reserving shared memory (this kernel needs a Hopper GPU)");
  launch_kernel(true, "paged_decode_kernel", kernel, blocks_of(op), C::kThreads, C::kBytes, stream, pages, args);
  if (args.most_chunks == 1 || args.slots.parts == 0) return;
  const int64_t rows = op.sequences * op.kv_heads * args.slots.rows;
  launch_kernel(true, "paged_fold_kernel", paged_fold_kernel<kDim>, std::min<int64_t>(rows, 8 * multiprocessors(device)), kDim, 0, stream,
                args);
}

template <int kExist, class Pages>
void launch_dim(const PagedAttention& op, const Pages& pages, const PagedArgs& args, cudaStream_t stream) {
  if (op.dim == 64) return launch<64, kExist>(op, pages, args, stream);
  if (op.dim == 96) return launch<96, kExist>(op, pages, args, stream);
  launch<128, kExist>(op, pages, args, stream);
}

template <class Pages>
void launch_rows(const PagedAttention& op, const Pages& pages, const PagedArgs& args, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (most_rows(op) <= 8) return launch_dim<1>(op, pages, args, s);
  launch_dim<2>(op, pages, args, s);
}

}  // namespace

int64_t paged_attention_workspace_sm90(const PagedAttention& op) {
  if (op.tokens == 0 || !computes(op)) return 0;
  return rows_of_slots(op) * (op.dim + 2) * 4 + 4;
}

bool paged_attention_gives_codes_sm90(const PagedAttention& op) { return op.dim == kCodesDim && computes(op); }

void paged_attention_sm90(const PagedAttention& op, void* workspace, void* stream) {
  if (op.tokens == 0) return;
  if (!computes(op)) return paged_rows_sm90(op, stream);
  PagedArgs args{};
  args.keys = {op.pages, op.lengths, static_cast<int32_t>(op.most_pages), static_cast<int32_t>(op.page_size),
               static_cast<int32_t>(op.page_count)};
  args.q = static_cast<const __nv_bfloat16*>(op.q.data), args.out = static_cast<__nv_bfloat16*>(op.out.data);
  args.q_token_stride = op.q.token_stride, args.q_head_stride = op.q.head_stride;
  args.out_token_stride = op.out.token_stride, args.out_head_stride = op.out.head_stride;
  args.codes = {op.codes, op.scales, 0, op.scale_ld};
  args.starts = op.starts;
  args.kv_heads = static_cast<int32_t>(op.kv_heads), args.group = static_cast<int32_t>(op.heads / op.kv_heads);
  args.sequences = static_cast<int32_t>(op.sequences);
  args.most_rows = static_cast<int32_t>(most_rows(op)), args.most_chunks = static_cast<int32_t>(most_chunks(op));
  args.block = static_cast<int32_t>(op.block);
  args.settled = op.settled;
  args.blocks = static_cast<int32_t>(blocks_of(op));
  args.whole = few_queries(op) && whole_sequences(op);
  args.factor = op.scale * 1.4426950408889634f;
  args.slots.parts = static_cast<int32_t>(parts_of(op)), args.slots.rows = static_cast<int32_t>(rows_of_slot(op));
  args.slots.out = static_cast<float*>(workspace);
  args.slots.top = args.slots.out + rows_of_slots(op) * op.dim;
  args.slots.sum = args.slots.top + rows_of_slots(op);
  args.slots.span = reinterpret_cast<int32_t*>(args.slots.sum + rows_of_slots(op));
  if (op.page_dtype != DType::e4m3) {
    const auto map = [&](const void* pages, int most) { return pages_map(pages, op, most); };
    const WidePages pages{{map(op.k_pages, kRowsOfBox), map(op.v_pages, kRowsOfBox)},
                          {map(op.k_pages, kFewKeys), map(op.v_pages, kFewKeys)}};
    return launch_rows(op, pages, args, stream);
  }
  const auto codes = [](const void* pages) { return static_cast<const uint8_t*>(pages); };
  launch_rows(op, CodePages{{codes(op.k_pages), codes(op.v_pages)}, {op.k_scales, op.v_scales}, args.kv_heads}, args, stream);
}

}  // namespace eightfold
