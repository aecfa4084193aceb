// What the blocks of attention over pages compute: units, found from the lengths on the device, so that the launch is the same whatever
// they are.
//
//   unit   64 rows of the queries of one KV head of one sequence, against a span of its chunks
//   span   as many chunks as let every block have one, were they all alike. The span that begins with a sequence's first chunk folds its
//          chunks itself; a later one leaves each as a part, since a fold of folds would have other bits.
//   slot   of rows that wait: a part's, (sequence * most_chunks + chunk) * kv_heads + KV head, where the first span's fold lies in the
//          place of its last chunk; after those one of each block, for what it has folded so far
//
// Where there are units enough, of many queries or of many sequences that are not long, each has the whole span: there are no parts.
#pragma once

#include <cuda_bf16.h>

#include "attention/attention_keys.cuh"
#include "attention/attention_tile.cuh"
#include "quant/cast.h"

namespace eightfold::attention {

struct Slots {
  float *out, *top, *sum;  // [slot, row, dim], [slot, row]
  int32_t* span;           // chunks of a span; 0 where no sequence has more
  int32_t parts, rows;     // slots of parts, 0 where units have whole sequences; rows of a slot
};

struct PagedArgs {
  PagedKeys keys;
  Slots slots;
  const __nv_bfloat16* q;
  __nv_bfloat16* out;
  quant::Quantized codes;  // without code_ld; codes null where `out` is wanted
  int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
  const int32_t* starts;
  int32_t kv_heads, group, sequences, most_rows, most_chunks;  // rows: queries times the heads of a group
  int32_t block;                                               // of the mask
  int32_t settled;                                             // as of PagedAttention
  int32_t whole;                                               // a unit is a sequence and a KV head
  int32_t blocks;                                              // that compute units
  float factor;
};

// Rows of a sequence that asks for nothing are 0, its length is not looked at.
struct Sequence {
  int32_t row, queries, keys, chunks;

  __device__ __forceinline__ Sequence(const PagedArgs& args, int32_t row, int32_t queries, int32_t keys)
      : row(row), queries(queries), keys(keys), chunks(queries > 0 ? chunks_of(args, keys) : 0) {}
  __device__ __forceinline__ Sequence(const PagedArgs& args, int32_t index) {
    row = __ldcg(args.starts + index);
    queries = __ldcg(args.starts + index + 1) - row;
    keys = __ldcg(args.keys.lengths + index);
    chunks = queries > 0 ? chunks_of(args, keys) : 0;
  }
  static __device__ __forceinline__ int32_t chunks_of(const PagedArgs& args, int32_t keys) {
    return max(0, min((keys + kAttentionChunk - 1) / kAttentionChunk, args.most_chunks));
  }
  __device__ __forceinline__ int32_t blocks(const PagedArgs& args) const { return (queries * args.group + kRows - 1) / kRows; }
  __device__ __forceinline__ int32_t units(const PagedArgs& args, int32_t span) const { return (chunks + span - 1) / span * blocks(args); }
};

constexpr int kFewSequences = 32;  // of which each lane of a warp has one

__device__ __forceinline__ Sequence sequence_of_lane(const PagedArgs& args) {
  const int32_t lane = threadIdx.x % 32;
  return lane < args.sequences ? Sequence(args, lane) : Sequence(args, 0, 0, 0);
}

__device__ __forceinline__ int32_t span_of(const PagedArgs& args, int32_t chunks) {
  return args.slots.parts == 0 ? args.most_chunks : max(1, (chunks * args.kv_heads + args.blocks - 1) / args.blocks);
}

__device__ __forceinline__ int32_t sum_up_to_lane(int32_t sum) {
  const int32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t before = __shfl_up_sync(0xFFFFFFFFu, sum, step);
    if (lane >= step) sum += before;
  }
  return sum;
}

// The units of a launch. In shared memory, kInts of them: begins[i], of the sequences before i * run, and the warps' sums; of few
// sequences, after begins, what they are. Where units are whole sequences nothing need be counted: run is 0, and a unit of a sequence that
// asks for nothing has no tiles.
template <int kThreads>
struct Plan {
  static constexpr int kWarps = kThreads / 32, kInts = kThreads + 1 + 2 * kWarps;
  static_assert(4 * kFewSequences <= kInts);
  const int32_t* begins;
  int32_t run, span, units;
  bool folds;  // whether a sequence has more chunks than a span

  // By all threads of a block, which meet.
  __device__ __forceinline__ Plan(const PagedArgs& args, int32_t* shared) : begins(shared) {
    const int32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    if (args.whole) {
      run = 0, span = args.most_chunks, units = args.sequences * args.kv_heads, folds = false;
      __syncthreads();
      return;
    }
    run = (args.sequences + kThreads - 1) / kThreads;
    if (args.sequences <= kFewSequences) {  // read once: a step of decoding waits for it
      const Sequence own = sequence_of_lane(args);
      span = span_of(args, __reduce_add_sync(0xFFFFFFFFu, own.chunks));
      const int32_t count = own.units(args, span), sum = sum_up_to_lane(count);
      folds = __any_sync(0xFFFFFFFFu, own.chunks > span);
      units = __shfl_sync(0xFFFFFFFFu, sum, 31) * args.kv_heads;
      if (warp == 0) {
        const int32_t kept[] = {sum - count, own.row, own.queries, own.keys};
#pragma unroll
        for (int i = 0; i < 4; ++i) shared[i * kFewSequences + lane] = kept[i];
      }
      __syncthreads();
      return;
    }
    int32_t *chunk_sums = shared + kThreads + 1, *unit_sums = chunk_sums + kWarps;
    const int32_t first = min(thread * run, args.sequences), end = min(first + run, args.sequences);
    int32_t chunks = 0;
    for (int32_t s = first; s < end; ++s) chunks += Sequence(args, s).chunks;
    chunks = __reduce_add_sync(0xFFFFFFFFu, chunks);
    if (lane == 0) chunk_sums[warp] = chunks;
    __syncthreads();
    chunks = 0;
    for (int w = 0; w < kWarps; ++w) chunks += chunk_sums[w];
    span = span_of(args, chunks);

    int32_t own = 0, longest = 0;
    for (int32_t s = first; s < end; ++s) {
      const Sequence sequence(args, s);
      own += sequence.units(args, span);
      longest = max(longest, sequence.chunks);
    }
    int32_t sum = sum_up_to_lane(own);
    if (lane == 31) unit_sums[warp] = sum;
    folds = __syncthreads_or(longest > span);
    for (int w = 0; w < warp; ++w) sum += unit_sums[w];
    shared[thread] = sum - own;
    if (thread == kThreads - 1) shared[kThreads] = sum;
    __syncthreads();
    units = shared[kThreads] * args.kv_heads;
  }
};

struct Unit {
  int32_t sequence, head, row, queries, keys;  // row: of the sequence's first query; keys: that exist
  int32_t first, rows;                         // the first of its rows, and how many exist
  int32_t chunk, end, chunks, seen;            // chunk to end, of `chunks` in all; keys that its last row sees

  template <int kThreads>
  __device__ __forceinline__ Unit(const PagedArgs& args, const Plan<kThreads>& plan, int32_t index) {
    head = index % args.kv_heads;
    int32_t at = index / args.kv_heads;
    const Sequence its = plan.run == 0 ? Sequence(args, sequence = at) : find(args, plan, at);
    if (plan.run == 0) at = 0;
    row = its.row, queries = its.queries, keys = queries > 0 ? its.keys : 0;
    const int32_t blocks = max(its.blocks(args), 1);
    first = (blocks - 1 - at % blocks) * kRows;  // those that see most come first
    rows = min(queries * args.group - first, args.slots.rows);
    seen = sees(args, kRows - 1);
    chunks = Sequence::chunks_of(args, seen);
    chunk = at / blocks * plan.span, end = min(chunk + plan.span, chunks);
  }
  // The sequence of unit `at` of a head, which becomes its number among the sequence's. By whole warps.
  template <int kThreads>
  __device__ __forceinline__ Sequence find(const PagedArgs& args, const Plan<kThreads>& plan, int32_t& at) {
    if (args.sequences <= kFewSequences) {
      const int32_t* own = plan.begins + 31 - __clz(__ballot_sync(0xFFFFFFFFu, plan.begins[threadIdx.x % 32] <= at));
      sequence = static_cast<int32_t>(own - plan.begins);
      at -= own[0];
      return {args, own[kFewSequences], own[2 * kFewSequences], own[3 * kFewSequences]};
    }
    int32_t low = 0, high = kThreads;  // begins[low] <= at < begins[high]
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      (plan.begins[middle] <= at ? low : high) = middle;
    }
    at -= plan.begins[low];
    sequence = low * plan.run;
    Sequence its(args, sequence);
    for (int32_t units; (units = its.units(args, plan.span)) <= at; at -= units) its = Sequence(args, ++sequence);
    return its;
  }
  // Keys that one of its rows sees.
  __device__ __forceinline__ int32_t sees(const PagedArgs& args, int32_t place) const {
    return keys_seen(keys - queries + (first + place) / args.group, keys, args.block);
  }
  __device__ __forceinline__ bool folds() const { return chunk == 0; }
  __device__ __forceinline__ bool finishes() const { return chunk == 0 && end == chunks; }
  __device__ __forceinline__ int32_t end_tile() const { return min((seen + kTile - 1) / kTile, end * kTilesOfChunk); }
  __device__ __forceinline__ int32_t slot(const PagedArgs& args, int32_t of_chunk) const {
    return (sequence * args.most_chunks + of_chunk) * args.kv_heads + head;
  }
};

}  // namespace eightfold::attention
