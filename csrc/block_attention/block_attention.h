// softmax(scale * q k^T) v of a block of queries that lies somewhere in a sequence, over all keys of the sequence, before it and behind: a
// step of a diffusion language model between two refreshes of its cache (Fast-dLLM's DualCache, arXiv 2505.22618, section 3.2; with keys
// that end with the block its prefix cache, and the step of block-causal models). Nothing is masked.
//
// The block's own keys and values, where given, are written to the cache in the same call and attended as the cache holds them, so that the
// result has the bits of writing first and attending then. A row's bits depend on its sequence, on the number of rows and heads and on
// what holds the cache, not on the other sequences nor on the cache's room.
//
// Floor: the bytes of the cached keys and values, once.
#pragma once

#include "attention/attention.h"

namespace eightfold {

constexpr int64_t kMostBlockRows = 64;

struct BlockAttention {
  AttentionRows q, out;  // row s * rows + i of [sequences * rows, heads, dim] is row i of sequence s
  PagedStore cache;      // a page is a sequence. k and v: its own rows as those of q, data null where they are in the cache; no slots
  const int32_t *at, *lengths;  // of a sequence: where its rows lie, and its keys with them; nothing is done where those are 0: out is 0
  int64_t sequences, rows, heads;
  float scale;
};

void block_attention_cpu(const BlockAttention& op);
void block_attention_sm90(const BlockAttention& op, void* stream);

}  // namespace eightfold
