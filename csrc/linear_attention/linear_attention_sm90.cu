// The forward pass, and the fold of both (linear_attention.h says how kernels go together).
#include <cuda_runtime.h>

#include "core/device.h"
#include "core/fp8_vector.cuh"
#include "linear_attention/linear_attention_sums.cuh"

namespace eightfold {
namespace {

using namespace linear;

constexpr int kSumTokens = 32, kFoldThreads = 256, kApplyThreads = 128;

template <int kDim>
struct SumConfig {
  using T = Tile<kDim, kSumTokens, Sums<kDim>::kThreads>;
  static constexpr int kStages = kDim == 32 ? 3 : 5, kBlocks = kDim == 32 ? 4 : 2;  // blocks of a multiprocessor
  static constexpr int kBytes = std::max(kStages * T::kBytes, Sums<kDim>::kBytes);
  static_assert(kBlocks * (kBytes + 1024) <= 233472);
};

template <int kDim>
__global__ void __launch_bounds__(Sums<kDim>::kThreads, SumConfig<kDim>::kBlocks)
    linear_attention_sums_kernel(const __grid_constant__ SumsArgs args) {
  using C = SumConfig<kDim>;
  using T = typename C::T;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory), rank = cluster_rank();
  wait_for_earlier_kernels();
  let_next_kernel_start();  // not earlier: what it reads before it waits is then there
  const Share share(args, kHeadsOf<kDim>, rank);
  const int32_t tiles = (share.end - share.begin + kSumTokens - 1) / kSumTokens;
  const auto start = [&](int32_t tile) {
    if (tile < tiles)
      T::start(shared + tile % C::kStages * T::kBytes, args, share, share.begin + tile * kSumTokens);
    else
      commit_copies();
  };
#pragma unroll
  for (int i = 0; i + 1 < C::kStages; ++i) start(i);
  Sums<kDim> sums;
  const uint32_t ones = threadIdx.x % 32 / 4 == 0 ? kOnes : 0;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    wait_for_copy_batches<C::kStages - 2>();
    __syncthreads();  // the tile is there, and the one before it read
    start(tile + C::kStages - 1);
#pragma unroll(kDim == 128 ? 1 : 2)
    for (int token = 0; token < kSumTokens; token += kStep) sums.template add<T>(shared + tile % C::kStages * T::kBytes, token, ones, ones);
  }
  __syncthreads();
  sums.leave(shared);
  Sums<kDim>::fold(shared, args, share, rank);
}

struct FoldArgs {
  const float *parts, *in;  // [part][count]; may be null
  float* to;
  int64_t count, parts_count;
};

__device__ __forceinline__ void fold_four(const FoldArgs& args, int64_t i) {
  float4 sum = __ldcg(reinterpret_cast<const float4*>(args.parts + i));
#pragma unroll 4
  for (int64_t p = 1; p < args.parts_count; ++p) {
    const float4 more = __ldcg(reinterpret_cast<const float4*>(args.parts + p * args.count + i));
    sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
  }
  if (args.in) {
    const float4 more = __ldcg(reinterpret_cast<const float4*>(args.in + i));
    sum = make_float4(more.x + sum.x, more.y + sum.y, more.z + sum.z, more.w + sum.w);
  }
  *reinterpret_cast<float4*>(args.to + i) = sum;
}

__global__ void __launch_bounds__(kFoldThreads)
    linear_attention_fold_kernel(const __grid_constant__ FoldArgs states, const __grid_constant__ FoldArgs normalizers) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t i = 4 * (int64_t{blockIdx.x} * kFoldThreads + threadIdx.x);
  if (i < states.count)
    fold_four(states, i);
  else if (i - states.count < normalizers.count)
    fold_four(normalizers, i - states.count);
}

struct ApplyArgs {
  HeadRows q;
  int32_t tokens, heads, groups, spans, span;  // span: tokens of a block, a multiple of those its warps take at a time
  const float *state, *normalizer;
  float eps;
  __nv_bfloat16* out;
  quant::Quantized codes;
};

// The group's results of 16 tokens: store(block, token, words) of each block, and of each of the lane's tokens.
template <int kDim, class Store>
__device__ __forceinline__ void attend(BlockWords q, uint32_t shared, int32_t heads, float eps, const Store& store) {
  constexpr int kBlocks = kBlocksOf<kDim>;
#pragma unroll
  for (int head = 0; head < kHeadsOf<kDim>; ++head) {
    if (head >= heads) break;
    const uint32_t states = shared + head * States<kDim>::kHeadBytes;
    float inverse[2];
    States<kDim>::divisors(inverse, q + head * kBlocks, states, eps);
#pragma unroll
    for (int chunk = 0; chunk < kBlocks; ++chunk) {
      float n[4][4] = {};
      States<kDim>::template multiply<false>(n, q + head * kBlocks, states, chunk);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) words[w] = pack_bf16(__fmul_rn(n[w][2 * h], inverse[h]), __fmul_rn(n[w][2 * h + 1], inverse[h]));
        store(head * kBlocks + chunk, h, words);
      }
    }
  }
}

// A token's codes and their scale: its 128 columns are with the four lanes of a row.
__device__ __forceinline__ void store_codes(const uint32_t (&words)[4][4], uint8_t* to, float* scale_to, int32_t blocks, bool exists) {
  using Eight = Octet<__nv_bfloat16>;
  Eight octets[4];
  uint32_t most = 0;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
#pragma unroll
    for (int w = 0; w < 4; ++w) octets[b].words[w] = words[b][w];
    most = Eight::larger(most, octet_maximum(octets[b]));
  }
  most = Eight::larger(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
  most = Eight::larger(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
  const float scale = group_scale(__uint_as_float(Eight::widest_bits(most)), false);
  const auto by = GroupDivider<__nv_bfloat16>::of(scale);
  if (!exists) return;
  if (threadIdx.x % 4 == 0) *scale_to = scale;
#pragma unroll
  for (int b = 0; b < 4; ++b)
    if (b < blocks) *reinterpret_cast<uint2*>(to + b * kWide) = encode_octet(octets[b], by);
}

template <int kDim, bool kCodes>
__global__ void __launch_bounds__(kApplyThreads, kDim == 32 ? 3 : 2) linear_attention_apply_kernel(const __grid_constant__ ApplyArgs args) {
  constexpr int kAtOnce = kApplyThreads / 32 * kStep;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const int32_t group = blockIdx.x % args.groups, span = blockIdx.x / args.groups % args.spans,
                sample = blockIdx.x / args.groups / args.spans;
  const int32_t first_head = group * kHeadsOf<kDim>, heads = min(args.heads - first_head, kHeadsOf<kDim>), lane = threadIdx.x % 32;
  const int32_t blocks = heads * kBlocksOf<kDim>, end = min(args.tokens - span * args.span, args.span);  // counted from the span's first
  const int64_t first = int64_t{span} * args.span;
  const LaneRows<kDim> rows(args.q, sample, first_head, first);
  const auto load = [&](Words<4>& words, int32_t token) {
    rows.load(words, token, [&](int b, int h) { return b < blocks && token + lane / 4 + 8 * h < end; });
  };
  int32_t token = threadIdx.x / 32 * kStep;
  Words<4> ahead[2];
  load(ahead[0], token);
  load(ahead[1], token + kAtOnce);
  wait_for_earlier_kernels();
  const int64_t head = int64_t{sample} * args.heads + first_head;
  States<kDim>::template place_all<kApplyThreads>(shared, args.state + head * kDim * kDim, args.normalizer + head * kDim, heads);
  __syncthreads();
  const int64_t width = int64_t{args.heads} * kDim, row = int64_t{sample} * args.tokens + first + lane / 4;
  const int64_t at = row * width + first_head * kDim + lane % 4 * 8;
  const auto turn = [&](Words<4>& q) {
    rectify<4>(q);
    if constexpr (kCodes) {
      uint32_t out[2][4][4] = {};
      attend<kDim>(q, shared, heads, args.eps, [&](int b, int h, const uint32_t (&words)[4]) {
#pragma unroll
        for (int w = 0; w < 4; ++w) out[h][b][w] = words[w];
      });
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_codes(out[h], args.codes.codes + at + (token + 8 * h) * width,
                    args.codes.scales + row + token + 8 * h + group * args.codes.scale_ld, blocks, token + lane / 4 + 8 * h < end);
    } else {
      attend<kDim>(q, shared, heads, args.eps, [&](int b, int h, const uint32_t (&words)[4]) {
        if (token + lane / 4 + 8 * h < end) *reinterpret_cast<uint4*>(args.out + at + (token + 8 * h) * width + b * kWide) = four(words);
      });
    }
    load(q, token + 2 * kAtOnce);
    token += kAtOnce;
  };
  while (token < end) {
    turn(ahead[0]);
    if (token < end) turn(ahead[1]);
  }
}

template <int kDim, bool kCodes>
void launch_apply(const ApplyArgs& args, int64_t samples, int device, cudaStream_t stream) {
  constexpr auto kernel = linear_attention_apply_kernel<kDim, kCodes>;
  constexpr int kBytes = States<kDim>::kBytes;
  allow_shared_memory<kernel>(kBytes, device, "linear_attention: reserving shared memory (this kernel needs a Hopper GPU)");
  launch_kernel(true, "linear_attention_apply_kernel", kernel, apply_blocks(samples, args.spans, args.groups), kApplyThreads, kBytes,
                stream, args);
}

template <int kDim>
void launch(const LinearAttention& op, void* workspace, cudaStream_t stream) {
  using C = SumConfig<kDim>;
  constexpr auto kernel = linear_attention_sums_kernel<kDim>;
  const int device = current_device();
  const StateRows states{op.state, op.normalizer};
  SumsArgs sums = sums_args(op, op.state_in, op.normalizer_in, states, workspace);
  sums.left = op.k, sums.right = op.v, sums.mask = op.key_mask;
  allow_shared_memory<kernel>(C::kBytes, device, "linear_attention: reserving shared memory (this kernel needs a Hopper GPU)");
  launch_clusters(true, kCluster, "linear_attention_sums_kernel", kernel, cluster_blocks(sums), Sums<kDim>::kThreads, C::kBytes, stream,
                  sums);
  if (sums.parts > 1) fold_parts(sums, kDim, states, stream);
  if (op.tokens == 0) return;
  ApplyArgs args{};
  args.q = op.q;
  const int64_t span = apply_span(op.tokens, op.batch * sums.groups, device), spans = (op.tokens + span - 1) / span;
  args.tokens = static_cast<int32_t>(op.tokens), args.heads = static_cast<int32_t>(op.heads),
  args.groups = static_cast<int32_t>(sums.groups);
  args.span = static_cast<int32_t>(span), args.spans = static_cast<int32_t>(spans);
  args.state = op.state, args.normalizer = op.normalizer;
  args.eps = op.eps;
  args.out = static_cast<__nv_bfloat16*>(op.out);
  args.codes = op.codes;
  if (op.out)
    launch_apply<kDim, false>(args, op.batch, device, stream);
  else
    launch_apply<kDim, true>(args, op.batch, device, stream);
}

}  // namespace

namespace linear {

void fold_parts(const SumsArgs& args, int64_t dim, const StateRows& to, cudaStream_t stream) {
  const int64_t heads = int64_t{args.samples} * args.heads;
  const FoldArgs states{args.out.state, args.state_in, to.state, heads * dim * dim, args.parts};
  const FoldArgs normalizers{args.out.normalizer, args.normalizer_in, to.normalizer, heads * dim, args.parts};
  const int64_t fours = (states.count + normalizers.count) / 4;
  launch_kernel(true, "linear_attention_fold_kernel", linear_attention_fold_kernel, (fours + kFoldThreads - 1) / kFoldThreads, kFoldThreads,
                0, stream, states, normalizers);
}

}  // namespace linear

int64_t linear_attention_workspace_sm90(const LinearAttention& op) {
  const int64_t parts = Split(op.tokens).parts;
  return parts > 1 ? parts * op.batch * op.heads * (op.dim * op.dim + op.dim) * 4 : 0;
}

void linear_attention_sm90(const LinearAttention& op, void* workspace, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (op.dim == 32) return launch<32>(op, workspace, s);
  if (op.dim == 64) return launch<64>(op, workspace, s);
  launch<128>(op, workspace, s);
}

}  // namespace eightfold
