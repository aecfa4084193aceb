// Sums over tokens, phi(left)^T [right | factor], of both passes: S and z from k, v and 1; dS and dz from q, dn and dD.
//
// In shared memory a tile of tokens lies in panels of 32 columns, 64 bytes a token; its 16-byte pieces are exchanged so that neither eight
// tokens of a piece nor four pieces of two tokens meet in a bank.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "core/cluster.cuh"
#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "linear_attention/linear_attention_state.cuh"

namespace eightfold::linear {

constexpr int kCluster = 8;        // spans that a cluster sums and folds
constexpr int kLongestSpan = 512;  // of up to kMostParts * kCluster of them; of more tokens spans are longer
constexpr int kMostParts = 32;     // clusters of a head
constexpr int kStep = 16;          // tokens of an instruction
constexpr uint32_t kOnes = 0x3F803F80u;

// How tokens are split; by their number alone.
struct Split {
  int64_t parts, span;

  explicit Split(int64_t tokens) {
    constexpr int64_t kUnit = 32;
    parts = std::clamp<int64_t>((tokens + kCluster * kLongestSpan - 1) / (kCluster * kLongestSpan), 1, kMostParts);
    span = (tokens + parts * kCluster * kUnit - 1) / (parts * kCluster * kUnit) * kUnit;
  }
};

// Where states go, or come from.
struct StateRows {
  float *state, *normalizer;
};

struct SumsArgs {
  HeadRows left, right;
  const uint8_t* mask;  // of tokens, may be null
  int32_t tokens, heads, groups, parts, span, samples;
  const float *state_in, *normalizer_in;  // added where there is one part; may be null
  StateRows out;                          // [part][sample][head]
};

// A block's tokens, and the heads of its group.
struct Share {
  int32_t sample, head, heads, part, begin, end;

  __device__ __forceinline__ Share(const SumsArgs& args, int group_heads, uint32_t rank) {
    const int32_t cluster = blockIdx.x / kCluster;
    head = cluster % args.groups * group_heads, heads = min(args.heads - head, group_heads);
    part = cluster / args.groups % args.parts, sample = cluster / args.groups / args.parts;
    begin = min((part * kCluster + static_cast<int32_t>(rank)) * args.span, args.tokens), end = min(begin + args.span, args.tokens);
  }
};

__device__ __forceinline__ uint32_t piece_offset(uint32_t token, uint32_t piece) { return token * 64 + (piece ^ token / 2 % 4) * 16; }

template <int kDim, int kTokens, int kThreads>
struct Tile {
  static constexpr int kPanelBytes = kTokens * 64, kOperandBytes = kColumns / kWide * kPanelBytes, kBytes = 2 * kOperandBytes;

  // Starts the copies of tokens from `first` on; those that do not exist become zeros.
  static __device__ __forceinline__ void start(uint32_t tile, const SumsArgs& args, const Share& share, int32_t first) {
    const int32_t lane = threadIdx.x % 16, block = lane / 4, piece = lane % 4, of_group = block / kBlocksOf<kDim>;
    const int32_t head = share.head + of_group, column = block % kBlocksOf<kDim> * kWide + piece * 8;
    const auto source = [&](const HeadRows& x) {
      return static_cast<const __nv_bfloat16*>(x.data) + int64_t{share.sample} * x.batch_stride + head * x.head_stride + column;
    };
    constexpr int kStride = kThreads / 16;
    int32_t token = first + threadIdx.x / 16;
    const __nv_bfloat16 *left = source(args.left) + token * args.left.token_stride,
                        *right = source(args.right) + token * args.right.token_stride;
#pragma unroll
    for (int i = 0; i < kTokens; i += kStride) {
      bool exists = of_group < share.heads && token < share.end;
      if (exists && args.mask) exists = args.mask[int64_t{share.sample} * args.tokens + token] != 0;
      const uint32_t to = tile + block * kPanelBytes + piece_offset(i + threadIdx.x / 16, piece);
      copy_async_or_zero(to, left, exists);
      copy_async_or_zero(to + kOperandBytes, right, exists);
      token += kStride, left += kStride * args.left.token_stride, right += kStride * args.right.token_stride;
    }
    commit_copies();
  }
};

// A warp's part of the sums of its head: 32 rows of S, and of its columns one panel or two.
template <int kDim>
struct Sums {
  static constexpr int kBlocks = kBlocksOf<kDim>, kHeads = kHeadsOf<kDim>, kPanels = kDim == 128 ? 2 : 1;
  static constexpr int kWarpsOfHead = kBlocks * kBlocks / kPanels, kWarps = kHeads * kWarpsOfHead, kThreads = 32 * kWarps;
  // Left in shared memory: rows of which eight lie in different banks, [head][row], and the normalizers.
  static constexpr int kPitch = (kDim + 8) * 4, kNormalizers = kColumns * kPitch, kBytes = kNormalizers + 4 * kColumns;

  float state[2][4 * kPanels][4], normalizer[2][4];
  int32_t head, row_block, column_block;

  __device__ __forceinline__ Sums() {
    const int32_t warp = threadIdx.x / 32, of_head = warp % kWarpsOfHead;
    head = warp / kWarpsOfHead % kHeads, row_block = of_head / (kBlocks / kPanels), column_block = of_head % (kBlocks / kPanels) * kPanels;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) normalizer[i][j] = 0.0f;
#pragma unroll
      for (int j = 0; j < 16 * kPanels; ++j) state[i][j / 4][j % 4] = 0.0f;
    }
  }

  // Adds 16 tokens of a tile from `token` on; factors: a right operand of 8 columns, of which the first two count.
  template <class T>
  __device__ __forceinline__ void add(uint32_t tile, int32_t token, uint32_t factors0, uint32_t factors1) {
    const uint32_t lane = threadIdx.x % 32, of_four = lane / 8;
    const uint32_t left = tile + (head * kBlocks + row_block) * T::kPanelBytes;
    const uint32_t right = tile + T::kOperandBytes + (head * kBlocks + column_block) * T::kPanelBytes;
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_matrices_turned(a[i], left + piece_offset(token + lane % 8 + of_four / 2 * 8, 2 * i + of_four % 2));
#pragma unroll
      for (int j = 0; j < 4; ++j) a[i][j] = rectified(a[i][j]);
      mma_bf16(normalizer[i], a[i], factors0, factors1);
    }
#pragma unroll
    for (int j = 0; j < 4 * kPanels; j += 2) {
      uint32_t b[4];
      load_matrices_turned(b, right + j / 4 * T::kPanelBytes + piece_offset(token + lane % 8 + of_four % 2 * 8, j % 4 + of_four / 2));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma_bf16(state[i][j], a[i], b[0], b[1]);
        mma_bf16(state[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ void leave(uint32_t shared) const {
    const int32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t row = head * kDim + row_block * kWide + 8 * i + lane / 4;
      const uint32_t to = shared + row * kPitch + (column_block * kWide + lane % 4 * 2) * 4;
#pragma unroll
      for (int j = 0; j < 4 * kPanels; ++j)
        store_shared(to + 32 * j, make_float2(state[i / 2][j][i % 2 * 2], state[i / 2][j][i % 2 * 2 + 1]));
      if (column_block == 0 && lane % 4 == 0)
        store_shared(shared + kNormalizers + 4 * row, __fadd_rn(normalizer[i / 2][i % 2 * 2], normalizer[i / 2][i % 2 * 2 + 1]));
    }
  }

  // Adds what the cluster's blocks have left, in order, and writes it. The whole cluster; a block that others still read from stays.
  static __device__ __forceinline__ void fold(uint32_t shared, const SumsArgs& args, const Share& share, uint32_t rank) {
    const int64_t heads = args.heads, first = share.sample * heads + share.head, to = share.part * args.samples * heads + first;
    const int32_t states = share.heads * kDim * kDim, all = states + share.heads * kDim;
    cluster_meet_to_read();
    for (int32_t i = 4 * (rank * kThreads + threadIdx.x); i < all; i += 4 * kCluster * kThreads) {
      const bool of_state = i < states;
      const uint32_t from = shared + (of_state ? i / kDim * kPitch + i % kDim * 4 : kNormalizers + (i - states) * 4);
      float4 sum = load_cluster_floats(cluster_address(from, 0));
#pragma unroll
      for (uint32_t r = 1; r < kCluster; ++r) {
        const float4 more = load_cluster_floats(cluster_address(from, r));
        sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
      }
      const float* in = of_state ? args.state_in : args.normalizer_in;
      const int64_t at = of_state ? i : i - states, square = of_state ? kDim * kDim : kDim;
      if (in && args.parts == 1) {
        const float4 more = __ldcg(reinterpret_cast<const float4*>(in + first * square + at));
        sum = make_float4(more.x + sum.x, more.y + sum.y, more.z + sum.z, more.w + sum.w);
      }
      *reinterpret_cast<float4*>((of_state ? args.out.state : args.out.normalizer) + to * square + at) = sum;
    }
    cluster_meet();  // a block that others still read from stays
  }
};

// Of more parts than one: all heads', in order, and what came before. In linear_attention_sm90.cu.
void fold_parts(const SumsArgs& args, int64_t dim, const StateRows& to, cudaStream_t stream);

// Sums' arguments but for what is summed: into `to`, or, of more parts than one, into the workspace.
inline SumsArgs sums_args(const LinearAttention& op, const float* state_in, const float* normalizer_in, const StateRows& to,
                          void* workspace) {
  const Split split(op.tokens);
  SumsArgs args{};
  args.tokens = static_cast<int32_t>(op.tokens), args.heads = static_cast<int32_t>(op.heads), args.samples = static_cast<int32_t>(op.batch);
  args.groups = static_cast<int32_t>((op.heads * op.dim + kColumns - 1) / kColumns);
  args.parts = static_cast<int32_t>(split.parts), args.span = static_cast<int32_t>(split.span);
  args.state_in = state_in, args.normalizer_in = normalizer_in;
  args.out = to;
  if (args.parts > 1) {
    auto* parts = static_cast<float*>(workspace);
    args.out = {parts, parts + split.parts * op.batch * op.heads * op.dim * op.dim};
  }
  return args;
}

// Tokens of a block where each goes its own way: as many as leave every multiprocessor two turns of four blocks, so that states are seldom
// loaded. No number depends on it.
inline int64_t apply_span(int64_t tokens, int64_t groups, int device) {
  int64_t span = 512;
  while (span > 128 && (tokens + span - 1) / span * groups < 8 * multiprocessors(device)) span /= 2;
  return span;
}

inline int64_t apply_blocks(int64_t samples, int64_t spans, int64_t groups) {
  const int64_t blocks = samples * spans * groups;
  if (blocks > INT32_MAX) throw std::runtime_error("linear_attention: more than 2^31 - 1 blocks: too many samples and heads");
  return blocks;
}
inline int64_t cluster_blocks(const SumsArgs& args) { return apply_blocks(args.samples, int64_t{args.parts} * kCluster, args.groups); }

}  // namespace eightfold::linear
