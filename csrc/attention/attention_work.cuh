// How the tiles of queries of packed sequences, or of sequences in pages, are given to blocks: for attention and for the gradient of q.
#pragma once

#include <algorithm>

#include "attention/attention_keys.cuh"

namespace eightfold::attention {

constexpr int64_t kCachedKeys = 20 << 20;  // bytes of keys and values that stay in the L2 cache while heads share it

// A pair is a head of a sequence; `span` of them share the cache.
template <class Keys>
struct Args {
  Keys keys;
  __nv_bfloat16* out;
  float* lse;
  int64_t out_token_stride, out_head_stride, tokens;
  const int32_t* starts;
  int32_t heads, group, query_tiles, pairs, span, work;  // group: heads that share keys; query_tiles: of the longest sequence
  int32_t block;                                         // of the mask
  float factor;
};

struct Work {
  int32_t sequence, begin, head, row, rows;  // begin: of the sequence; row: of the first query, `rows` of them
  int32_t first, keys, tiles;                // first: its position; keys: that exist

  template <class Keys>
  __device__ __forceinline__ Work(const Args<Keys>& args, int32_t index) {
    const int32_t section = index / (args.span * args.query_tiles), rest = index % (args.span * args.query_tiles);
    const int32_t width = min(args.span, args.pairs - section * args.span);
    const int32_t tile = args.query_tiles - 1 - rest / width, pair = section * args.span + rest % width;
    sequence = pair / args.heads, head = pair % args.heads;
    const int32_t end = __ldg(args.starts + sequence + 1);
    begin = __ldg(args.starts + sequence);
    row = begin + tile * kTile;
    rows = min(end - row, kTile);
    if constexpr (Keys::kPaged) {
      keys = __ldg(args.keys.lengths + sequence);
      first = keys - (end - begin) + tile * kTile;
    } else {
      keys = end - begin;
      first = tile * kTile;
    }
    tiles = rows > 0 ? (sees(args, kTile - 1) + kTile - 1) / kTile : 0;
  }
  // Keys that one of its queries sees.
  template <class Keys>
  __device__ __forceinline__ int32_t sees(const Args<Keys>& args, int32_t place) const {
    return keys_seen(first + place, keys, args.block);
  }
};

// What both kinds of keys have in common; `out`: where a row's result goes.
template <class Keys, class Op>
Args<Keys> arguments(const Op& op, const AttentionRows& out, const Keys& keys) {
  Args<Keys> args{};
  args.keys = keys;
  args.out = static_cast<__nv_bfloat16*>(out.data);
  args.out_token_stride = out.token_stride, args.out_head_stride = out.head_stride;
  args.tokens = op.tokens;
  args.starts = op.starts;
  args.heads = static_cast<int32_t>(op.heads), args.group = static_cast<int32_t>(op.heads / op.kv_heads);
  args.query_tiles = static_cast<int32_t>((op.longest + kTile - 1) / kTile);
  args.pairs = static_cast<int32_t>(op.sequences * op.heads);
  args.span = static_cast<int32_t>(std::max<int64_t>(1, kCachedKeys / (op.longest * op.dim * 4))) * args.group;
  args.work = args.query_tiles * args.pairs;
  args.block = static_cast<int32_t>(op.block);
  args.factor = op.scale * 1.4426950408889634f;
  return args;
}

}  // namespace eightfold::attention
