// Attention over pages: the parts of sequences of several spans (attention_units.cuh) become results, in the order of their chunks.
#pragma once

#include "attention/attention_units.cuh"
#include "core/dependent_launch.cuh"
#include "quant/row_cast.cuh"

namespace eightfold::attention {

constexpr int kCodesDim = quant::kTile;  // of a head that is a group of codes

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

}  // namespace eightfold::attention
