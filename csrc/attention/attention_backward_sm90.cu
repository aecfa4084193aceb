// Gradients of attention on Hopper. With p = exp2(z - lse), computed again, and delta = sum(dout * out) of a row:
//
//   dv = p^T dout     ds = p (dout v^T - delta)     dq = scale ds k     dk = scale ds^T q
//
// in two kernels, each with sums of its own in one order and nothing added up in memory: one walks the queries for a block of keys (dk and
// dv, four products), one the keys for a block of queries (dq, three). Seven products where a single pass has five, but that pass adds
// parts of dq up in memory, in an order of its own making or one block after another. p and ds are rounded to bf16 as left operands and
// never leave the registers: the first kernel computes scores transposed for it. Before both a small kernel makes a row's sums.
//
// Floor: 14 * dim FLOP for a query and key that it sees, at the tensor cores' 4,096 a clock.
#include <cuda_runtime.h>

#include "attention/attention_backward.cuh"
#include "core/launch.cuh"

namespace eightfold {
namespace {

using namespace attention;

constexpr int kThreads = 256;

struct SumsArgs {
  const __nv_bfloat16 *out, *dout;
  int64_t out_token_stride, out_head_stride, dout_token_stride, dout_head_stride, tokens;
  const float* lse;
  RowSums sums;
  const int32_t* starts;
  int32_t heads, tiles;  // tiles: of the longest sequence
};

// A tile of a head of a sequence: kLanes lanes a row, 8 of the dimension each.
template <int kDim>
__global__ void __launch_bounds__(kThreads) attention_row_sums_kernel(const SumsArgs args) {
  constexpr int kLanes = kDim == 64 ? 8 : 16, kAtOnce = kThreads / kLanes, kPasses = kSumsTile / kAtOnce;
  const int32_t tile = blockIdx.x % args.tiles, head = blockIdx.x / args.tiles % args.heads,
                sequence = blockIdx.x / args.tiles / args.heads;
  const int32_t begin = __ldg(args.starts + sequence), length = __ldg(args.starts + sequence + 1) - begin;
  if (tile * kSumsTile >= length) return;
  const int32_t lane = threadIdx.x % kLanes, first = tile * kSumsTile + threadIdx.x / kLanes;
  uint4 x[kPasses], y[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    x[i] = y[i] = make_uint4(0, 0, 0, 0);
    const int64_t row = begin + first + i * kAtOnce;
    if (first + i * kAtOnce < length && 8 * lane < kDim) {
      x[i] = __ldg(reinterpret_cast<const uint4*>(args.out + row * args.out_token_stride + head * args.out_head_stride) + lane);
      y[i] = __ldg(reinterpret_cast<const uint4*>(args.dout + row * args.dout_token_stride + head * args.dout_head_stride) + lane);
    }
  }
  const int64_t to = head * args.sums.places + RowSums::padded(begin, sequence);
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const uint32_t a[4] = {x[i].x, x[i].y, x[i].z, x[i].w}, b[4] = {y[i].x, y[i].y, y[i].z, y[i].w};
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // a bf16 is the upper half of a float
      sum = __fmaf_rn(__uint_as_float(a[j] << 16), __uint_as_float(b[j] << 16), sum);
      sum = __fmaf_rn(__uint_as_float(a[j] & 0xFFFF0000u), __uint_as_float(b[j] & 0xFFFF0000u), sum);
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, step));
    if (lane != 0) continue;
    const int32_t place = first + i * kAtOnce;
    const bool exists = place < length;
    args.sums.lse[to + place] = exists ? args.lse[head * args.tokens + begin + place] * 1.4426950408889634f : __builtin_inff();
    args.sums.delta[to + place] = exists ? sum : 0.0f;
  }
}

template <int kDim>
void make_sums(const SumsArgs& args, int64_t sequences, cudaStream_t stream) {
  attention_row_sums_kernel<kDim><<<static_cast<uint32_t>(sequences * args.heads * args.tiles), kThreads, 0, stream>>>(args);
  check_launch("attention_row_sums_kernel");
}

}  // namespace

int64_t attention_backward_workspace_sm90(const Attention& op) { return 2 * op.heads * RowSums::places_of(op) * sizeof(float); }

void attention_backward_sm90(const AttentionBackward& op, void* workspace, void* stream) {
  const Attention& forward = op.forward;
  if (forward.tokens == 0 || forward.heads == 0) return;
  const int64_t places = RowSums::places_of(forward);
  const RowSums sums{static_cast<float*>(workspace), static_cast<float*>(workspace) + forward.heads * places, places};
  SumsArgs args{};
  args.out = static_cast<const __nv_bfloat16*>(forward.out.data), args.dout = static_cast<const __nv_bfloat16*>(op.dout.data);
  args.out_token_stride = forward.out.token_stride, args.out_head_stride = forward.out.head_stride;
  args.dout_token_stride = op.dout.token_stride, args.dout_head_stride = op.dout.head_stride;
  args.tokens = forward.tokens;
  args.lse = forward.lse;
  args.sums = sums;
  args.starts = forward.starts;
  args.heads = static_cast<int32_t>(forward.heads);
  args.tiles = static_cast<int32_t>((forward.longest + kSumsTile - 1) / kSumsTile);
  const auto s = static_cast<cudaStream_t>(stream);
  if (forward.dim == 64)
    make_sums<64>(args, forward.sequences, s);
  else if (forward.dim == 96)
    make_sums<96>(args, forward.sequences, s);
  else
    make_sums<128>(args, forward.sequences, s);
  keys_gradients_sm90(op, sums, stream);
  queries_gradients_sm90(op, sums, stream);
}

}  // namespace eightfold
