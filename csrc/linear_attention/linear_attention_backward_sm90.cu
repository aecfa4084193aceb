// The backward pass (linear_attention.h says how kernels go together).
#include <cuda_runtime.h>

#include "core/device.h"
#include "linear_attention/linear_attention_sums.cuh"

namespace eightfold {
namespace {

using namespace linear;

constexpr int kKeyThreads = 128;

template <int kDim>
struct QueryConfig {
  using T = Tile<kDim, kDim, Sums<kDim>::kThreads>;  // so many tokens that 8 warps, or twice 4, take 16 of a head each
  static constexpr int kStages = kDim == 32 ? 3 : kDim == 64 ? 4 : 2, kBlocks = kDim == 32 ? 3 : 1;  // blocks of a multiprocessor
  // dD of a token in two bf16 parts, the first of 8 columns: [head][token].
  static constexpr int kFactors = States<kDim>::kBytes, kRing = kFactors + kColumns * 16, kBytes = kRing + kStages * T::kBytes;
  static_assert(kRing % 128 == 0 && Sums<kDim>::kBytes <= kStages * T::kBytes && kBlocks * (kBytes + 1024) <= 233472);
};

struct QueryArgs {
  SumsArgs sums;  // of q and dout
  HeadRows dq;
  const float *state, *normalizer;
  float eps;
};

// 16 tokens of a head, `token` the first of them in the tile, `left` and `right` the head's panels of q and of g: writes dq, and dn in the
// place of g. to(h): dq of the lane's tokens, null where there is none.
template <int kDim, class To>
__device__ __forceinline__ void query_rows(uint32_t states, uint32_t normalizers, uint32_t left, uint32_t right, uint32_t factors,
                                           int32_t token, float eps, const To& to) {
  using T = typename QueryConfig<kDim>::T;
  constexpr int kBlocks = kBlocksOf<kDim>;
  const uint32_t lane = threadIdx.x % 32, piece = lane % 4, row = token + lane / 4;
  Words<kBlocks> q, dn;
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) {
    set(q[i / 2][i % 2], load_shared(left + i / 2 * T::kPanelBytes + piece_offset(row + i % 2 * 8, piece)));
  }
  rectify<kBlocks>(q);
  float inverse[2], dd[2] = {};
  States<kDim>::divisors(inverse, q, states, eps);
#pragma unroll
  for (int chunk = 0; chunk < kBlocks; ++chunk) {
    float n[4][4] = {};
    States<kDim>::template multiply<false>(n, q, states, chunk);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t at = right + chunk * T::kPanelBytes + piece_offset(row + h * 8, piece);
      uint32_t g[4];
      set(g, load_shared(at));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        dn[chunk][h][w] = pack_bf16(__fmul_rn(low_float(g[w]), inverse[h]), __fmul_rn(high_float(g[w]), inverse[h]));
        dd[h] = __fmaf_rn(__fmul_rn(n[w][2 * h], -inverse[h]), low_float(dn[chunk][h][w]), dd[h]);
        dd[h] = __fmaf_rn(__fmul_rn(n[w][2 * h + 1], -inverse[h]), high_float(dn[chunk][h][w]), dd[h]);
      }
      store_shared(at, four(dn[chunk][h]));
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    dd[h] = sum_of_quad(dd[h]);
    const uint32_t upper = pack_bf16(dd[h], 0.0f);
    if (piece == 0) store_shared(factors + (row + h * 8) * 16, make_uint4(pack_bf16(dd[h], dd[h] - low_float(upper)), 0, 0, 0));
  }
#pragma unroll
  for (int chunk = 0; chunk < kBlocks; ++chunk) {
    float d[4][4], z[8];
    const uint32_t at = normalizers + (chunk * kWide + piece * 8) * 4;
    const float4 first = load_shared_floats(at), second = load_shared_floats(at + 16);
    z[0] = first.x, z[1] = first.y, z[2] = first.z, z[3] = first.w, z[4] = second.x, z[5] = second.y, z[6] = second.z, z[7] = second.w;
#pragma unroll
    for (int i = 0; i < 16; ++i) d[i / 4][i % 4] = __fmul_rn(z[i / 4 * 2 + i % 2], dd[i % 4 / 2]);
    States<kDim>::template multiply<true>(d, dn, states, chunk);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = pack_where(q[chunk][h][w], d[w][2 * h], d[w][2 * h + 1]);
      if (uint4* place = to(chunk, h)) *place = four(words);
    }
  }
}

template <int kDim>
__global__ void __launch_bounds__(Sums<kDim>::kThreads, QueryConfig<kDim>::kBlocks)
    linear_attention_queries_kernel(const __grid_constant__ QueryArgs args) {
  using C = QueryConfig<kDim>;
  using T = typename C::T;
  constexpr int kTokens = kDim, kWarpsOfHead = Sums<kDim>::kWarpsOfHead, kBlocks = kBlocksOf<kDim>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory), ring = shared + C::kRing, rank = cluster_rank();
  wait_for_earlier_kernels();
  let_next_kernel_start();  // not earlier: what it reads before it waits is then there
  const Share share(args.sums, kHeadsOf<kDim>, rank);
  const int32_t tiles = (share.end - share.begin + kTokens - 1) / kTokens;
  const auto start = [&](int32_t tile) {
    if (tile < tiles)
      T::start(ring + tile % C::kStages * T::kBytes, args.sums, share, share.begin + tile * kTokens);
    else
      commit_copies();
  };
#pragma unroll
  for (int i = 0; i + 1 < C::kStages; ++i) start(i);
  const int64_t first = int64_t{share.sample} * args.sums.heads + share.head;
  States<kDim>::template place_all<Sums<kDim>::kThreads>(shared, args.state + first * kDim * kDim, args.normalizer + first * kDim,
                                                         share.heads);
  Sums<kDim> sums;
  const int32_t lane = threadIdx.x % 32, head = sums.head;
  const uint32_t states = shared + head * States<kDim>::kHeadBytes, normalizers = shared + States<kDim>::kNormalizers + head * kDim * 4;
  const uint32_t factors = shared + C::kFactors + head * kTokens * 16;
  const LaneRows<kDim> dq(args.dq, share.sample, share.head + head, share.begin);
  const int32_t count = share.end - share.begin;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    wait_for_copy_batches<C::kStages - 2>();
    __syncthreads();  // the tile is there, and the one before it read
    start(tile + C::kStages - 1);
    const uint32_t at = ring + tile % C::kStages * T::kBytes, left = at + head * kBlocks * T::kPanelBytes;
    if (head < share.heads) {
#pragma unroll 1
      for (int32_t token = threadIdx.x / 32 % kWarpsOfHead * kStep; token < kTokens; token += kWarpsOfHead * kStep)
        query_rows<kDim>(states, normalizers, left, left + T::kOperandBytes, factors, token, args.eps, [&](int block, int h) {
          const int32_t of_span = tile * kTokens + token;
          return of_span + lane / 4 + 8 * h < count ? dq.place(of_span, block, h) : nullptr;
        });
    }
    if constexpr (kWarpsOfHead == 1)
      __syncwarp();
    else
      __syncthreads();
#pragma unroll 1
    for (int32_t token = 0; token < kTokens; token += 2 * kStep) {
      uint32_t b[4];
      load_matrices_turned(b, factors + (token + lane) * 16);
      sums.template add<T>(at, token, b[0], b[1]);
      sums.template add<T>(at, token + kStep, b[2], b[3]);
    }
  }
  __syncthreads();
  sums.leave(ring);
  Sums<kDim>::fold(ring, args.sums, share, rank);
}

struct KeyArgs {
  HeadRows k, v, dk, dv;
  const uint8_t* mask;
  int32_t tokens, heads, groups, spans, span;
  const float *dstate, *dnormalizer;
};

template <int kDim>
__global__ void __launch_bounds__(kKeyThreads, kDim == 64 ? 2 : 3) linear_attention_keys_kernel(const __grid_constant__ KeyArgs args) {
  constexpr int kBlocks = kBlocksOf<kDim>, kHeads = kHeadsOf<kDim>, kAtOnce = kKeyThreads / 32 / kHeads * kStep;
  constexpr int kAhead = kDim == 32 ? 4 : kDim == 64 ? 2 : 1;  // pieces of 16 tokens that a warp holds or waits for
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const int32_t group = blockIdx.x % args.groups, span = blockIdx.x / args.groups % args.spans,
                sample = blockIdx.x / args.groups / args.spans;
  const int32_t first_head = group * kHeads, heads = min(args.heads - first_head, kHeads), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t head = warp % kHeads, end = min(args.tokens - span * args.span, args.span);  // counted from the span's first
  const int64_t first = int64_t{span} * args.span;
  const auto rows = [&](const HeadRows& x) { return LaneRows<kDim>(x, sample, first_head + head, first); };
  const LaneRows<kDim> k_rows = rows(args.k), v_rows = rows(args.v), dk_rows = rows(args.dk), dv_rows = rows(args.dv);
  const uint8_t* mask = args.mask ? args.mask + int64_t{sample} * args.tokens + first + lane / 4 : nullptr;
  const auto exists = [&](int32_t token, int h) {
    return head < heads && token + lane / 4 + 8 * h < end && (mask == nullptr || mask[token + 8 * h] != 0);
  };
  const auto load = [&](Words<kBlocks>& k, Words<kBlocks>& v, int32_t token) {
    const bool there[2] = {exists(token, 0), exists(token, 1)};
    k_rows.load(k, token, [&](int, int h) { return there[h]; });
    v_rows.load(v, token, [&](int, int h) { return there[h]; });
  };
  int32_t token = warp / kHeads * kStep;
  Words<kBlocks> ks[kAhead], vs[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(ks[i], vs[i], token + i * kAtOnce);
  wait_for_earlier_kernels();
  const int64_t of_all = int64_t{sample} * args.heads + first_head;
  States<kDim>::template place_all<kKeyThreads>(shared, args.dstate + of_all * kDim * kDim, args.dnormalizer + of_all * kDim, heads);
  __syncthreads();
  if (head >= heads) return;
  const uint32_t states = shared + head * States<kDim>::kHeadBytes, normalizers = shared + States<kDim>::kNormalizers + head * kDim * 4;
  const auto turn = [&](Words<kBlocks>& k, Words<kBlocks>& v) {
    rectify<kBlocks>(k);
    const bool there[2] = {exists(token, 0), exists(token, 1)};  // a state may hold a NaN, which zeros would let through
#pragma unroll
    for (int chunk = 0; chunk < kBlocks; ++chunk) {
      float d[4][4], dv[4][4] = {};
      const uint32_t at = normalizers + (chunk * kWide + lane % 4 * 8) * 4;
      const float4 first = load_shared_floats(at), second = load_shared_floats(at + 16);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        d[0][2 * h] = first.x, d[0][2 * h + 1] = first.y, d[1][2 * h] = first.z, d[1][2 * h + 1] = first.w;
        d[2][2 * h] = second.x, d[2][2 * h + 1] = second.y, d[3][2 * h] = second.z, d[3][2 * h + 1] = second.w;
      }
      States<kDim>::template multiply<true>(d, v, states, chunk);
      States<kDim>::template multiply<false>(dv, k, states, chunk);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t words[4], others[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          words[w] = pack_where(k[chunk][h][w], d[w][2 * h], d[w][2 * h + 1]);
          others[w] = there[h] ? pack_bf16(dv[w][2 * h], dv[w][2 * h + 1]) : 0;
        }
        if (token + lane / 4 + 8 * h >= end) continue;
        *dk_rows.place(token, chunk, h) = four(words);
        *dv_rows.place(token, chunk, h) = four(others);
      }
    }
    load(k, v, token + kAhead * kAtOnce);
    token += kAtOnce;
  };
  while (token < end) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (token < end) turn(ks[i], vs[i]);
  }
}

template <int kDim>
void launch(const LinearAttentionBackward& op, void* workspace, cudaStream_t stream) {
  constexpr auto queries = linear_attention_queries_kernel<kDim>;
  constexpr auto keys = linear_attention_keys_kernel<kDim>;
  const char* reserving = "linear_attention_backward: reserving shared memory (this kernel needs a Hopper GPU)";
  const LinearAttention& forward = op.forward;
  const int device = current_device();
  const StateRows states{op.dstate, op.dnormalizer};
  QueryArgs query{};
  query.sums = sums_args(forward, op.dstate_out, op.dnormalizer_out, states, workspace);
  query.sums.left = forward.q, query.sums.right = op.dout;
  query.dq = op.dq;
  query.state = forward.state, query.normalizer = forward.normalizer;
  query.eps = forward.eps;
  allow_shared_memory<queries>(QueryConfig<kDim>::kBytes, device, reserving);
  launch_clusters(true, kCluster, "linear_attention_queries_kernel", queries, cluster_blocks(query.sums), Sums<kDim>::kThreads,
                  QueryConfig<kDim>::kBytes, stream, query);
  if (query.sums.parts > 1) fold_parts(query.sums, kDim, states, stream);
  if (forward.tokens == 0) return;
  KeyArgs args{};
  args.k = forward.k, args.v = forward.v, args.dk = op.dk, args.dv = op.dv;
  args.mask = forward.key_mask;
  const int64_t groups = query.sums.groups, span = apply_span(forward.tokens, forward.batch * groups, device);
  const int64_t spans = (forward.tokens + span - 1) / span;
  args.tokens = query.sums.tokens, args.heads = query.sums.heads, args.groups = query.sums.groups;
  args.spans = static_cast<int32_t>(spans), args.span = static_cast<int32_t>(span);
  args.dstate = op.dstate, args.dnormalizer = op.dnormalizer;
  allow_shared_memory<keys>(States<kDim>::kBytes, device, reserving);
  launch_kernel(true, "linear_attention_keys_kernel", keys, apply_blocks(forward.batch, spans, groups), kKeyThreads, States<kDim>::kBytes,
                stream, args);
}

}  // namespace

void linear_attention_backward_sm90(const LinearAttentionBackward& op, void* workspace, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (op.forward.dim == 32) return launch<32>(op, workspace, s);
  if (op.forward.dim == 64) return launch<64>(op, workspace, s);
  launch<128>(op, workspace, s);
}

}  // namespace eightfold
