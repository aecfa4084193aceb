// softmax(scale * q k^T) v with one order of operations for a row, wherever and with whatever neighbours it is computed, so that training,
// prefill and decoding over a paged cache give the same bits.
//
// For a query at position t of its sequence (keys that it sees: keys_seen()), keys in tiles of kAttentionTile and tiles in chunks of
// kAttentionChunk, both counted from the sequence's first key:
//
//   of a chunk   m = -inf, l = 0, o = 0; for each tile, in order:
//                  z = (q . k) * (scale * log2(e))        keys that the query does not see: -inf
//                  n = max(m, max z)   a = exp2(m - n)   p = exp2(z - n)
//                  l = l * a + sum p   o = o * a + bf16(p) v      m = n
//   fold         chunks in order: n = max(M, m); O = O * exp2(M - n) + o * exp2(m - n); L the same; M = n. The first is taken as it is.
//   result       O / L, rounded once; log-sum-exp (M + log2(L)) * ln(2)
//
// A tile or chunk of which a query sees no key changes nothing, so nobody need compute it. On CUDA the dot products and p v are the
// tensor cores', 64 rows a warpgroup whatever their number; on the CPU they are fp32 sums in the order of the dimension and of the keys,
// and p is not rounded where the operands are fp32.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/fp8.h"

namespace eightfold {

constexpr int kAttentionTile = 128, kAttentionChunk = 256;

// Who sees what: blocks of so many tokens, each of which sees the keys of its own block and of those before. 1 is the causal mask.
constexpr int64_t kNoMask = 0, kCausal = 1, kMostBlock = 1 << 30;

// Of a sequence of `keys` keys, how many the token at `position` sees: the first so many.
template <class Int>
EF_HD Int keys_seen(Int position, Int keys, Int block) {
  if (block == kNoMask) return keys;
  const Int end = block == kCausal ? position + 1 : (position / block + 1) * block;
  return end < keys ? end : keys;
}

// A [tokens, heads, dim] tensor, dim contiguous; element strides.
struct AttentionRows {
  void* data;
  int64_t token_stride, head_stride;
};

// Packed sequences: rows starts[s] to starts[s + 1] of every tensor are sequence s.
struct Attention {
  AttentionRows q, k, v, out;  // heads of q and out, kv_heads of k and v; kv head j serves heads j * heads / kv_heads and following
  float* lse;                  // [heads, tokens], natural logarithm; may be null
  DType dtype;                 // bf16, or on the CPU fp32
  int64_t tokens, heads, kv_heads, dim;
  const int32_t* starts;       // [sequences + 1], rising from 0 to tokens; on the tensors' device
  int64_t sequences, longest;  // longest: no sequence has more tokens
  float scale;
  int64_t block;  // kNoMask, or 1 to kMostBlock
};

struct AttentionBackward {
  Attention forward;  // its out and lse as the forward pass gave them
  AttentionRows dout, dq, dk, dv;
};

// Keys and values in pages: page p of sequence s holds its keys p * page_size and following, at pages[s * most_pages + p].
struct PagedAttention {
  // Rows starts[s] to starts[s + 1] are the last of sequence s, whose keys, theirs included, are lengths[s]; on the CPU rows without keys
  // are left as they are.
  AttentionRows q, out;
  const void *k_pages, *v_pages;     // [page, kv_head, page_size, dim], dense
  const float *k_scales, *v_scales;  // [page, kv_head, page_size] where pages are E4M3 codes: a key is bf16(code * scale); else null
  DType dtype, page_dtype;
  int64_t tokens, heads, kv_heads, dim, page_count, page_size;
  const int32_t *pages, *starts, *lengths;
  int64_t sequences, most_pages, longest;  // longest: no sequence has more rows of q
  float scale;
  int64_t block;  // as of Attention
  // Whether all but q, and the keys and values of its rows, was complete before a kernel ahead that did not start early: on CUDA it is then
  // read while the kernels behind that one still run.
  bool settled;
  // Where not null, instead of `out`: its row codes [tokens, heads * dim] in groups of 128, which are a head (dim is 128), and their scales
  // [tokens, heads] with rows contiguous, the bytes of casting the bf16 result. On CUDA only where paged_attention_gives_codes_sm90() says
  // so; on the CPU the cast is apart.
  uint8_t* codes;
  float* scales;
  int64_t scale_ld;
};

void attention_cpu(const Attention& op);
void attention_backward_cpu(const AttentionBackward& op);
void paged_attention_cpu(const PagedAttention& op);

void attention_sm90(const Attention& op, void* stream);
// Bytes of workspace for what attention_backward_sm90 is given; decided by sizes alone.
int64_t attention_backward_workspace_sm90(const Attention& op);
void attention_backward_sm90(const AttentionBackward& op, void* workspace, void* stream);
// Bytes of workspace for what paged_attention_sm90 is given; decided by sizes and the current device alone.
int64_t paged_attention_workspace_sm90(const PagedAttention& op);
void paged_attention_sm90(const PagedAttention& op, void* workspace, void* stream);
bool paged_attention_gives_codes_sm90(const PagedAttention& op);

// Rows of k and v [tokens, kv_heads, dim] into pages: row i to slot slots[i] = page * page_size + place in it; below 0: nowhere.
struct PagedStore {
  AttentionRows k, v;
  void *k_pages, *v_pages;
  float *k_scales, *v_scales;  // where pages are E4M3: amax / 448 of a row of a head, amax at least 1e-10, as everywhere
  const int64_t* slots;        // [tokens]
  DType dtype, page_dtype;
  int64_t tokens, kv_heads, dim, page_count, page_size;
};

void paged_store_cpu(const PagedStore& op);
void paged_store_sm90(const PagedStore& op, void* stream);

// What lies between the projection to q, k and v and attention over pages: q and k are normalised head by head (quant/norm.h) where
// weights are given, then rotated (rotary/rotary.h); q goes to out, k and v into pages. Each step rounds to the dtype, so the bits are
// those of rms_norm, rotary and paged_store_ one after the other.
//
// Floor: q, k and v read once and written once; apart they are read and written up to three times, by up to five kernels.
struct RopeCacheWrite {
  AttentionRows q, out;  // [tokens, heads, dim]; dim is even
  PagedStore store;
  int64_t heads;
  const float *cos, *sin;           // [tokens, dim / 2], dense
  const void *q_weight, *k_weight;  // [dim] in `weight_dtype` (bf16 or f32); null: no norm
  DType weight_dtype;
  float eps;
};

void rope_cache_write_cpu(const RopeCacheWrite& op);
void rope_cache_write_sm90(const RopeCacheWrite& op, void* stream);

// Keys or values as a cache of E4M3 pages gives them back: a row of a head becomes code * scale, rounded to the dtype; codes and scale are
// those of PagedStore. Training that takes them so has the bits of decoding over such pages.
struct KvRound {
  AttentionRows x, out;  // [tokens, heads, dim]
  DType dtype;
  int64_t tokens, heads, dim;
};

void kv_round_cpu(const KvRound& op);
void kv_round_sm90(const KvRound& op, void* stream);

}  // namespace eightfold
