// RMS norm of few rows, as a step of decoding has them. It is over about when it has been launched, so a row is a block, a slice of 256
// columns (row_sum.cuh) a warp, eight columns a lane: one trip to memory for all of x, residual and weight, and little to do in turn.
#include "core/dependent_launch.cuh"
#include "quant/norm_ahead.cuh"
#include "quant/norm_few.h"
#include "quant/row_cast.cuh"
#include "quant/row_sum.cuh"

namespace eightfold::quant {
namespace {

using T = __nv_bfloat16;

constexpr int kSlicesOfQuad = kQuadCols / kSliceCols, kMostQuads = kFewNormCols / kQuadCols;

// With four warps for each quad of a row.
template <bool kBf16Weight>
__global__ void __launch_bounds__(32 * kSlicesOfQuad * kMostQuads) norm_few_rows_kernel(const RmsNorm op) {
  __shared__ float4 slice_sums[kMostQuads];
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, cols = static_cast<int>(op.cols);
  const int col = warp * kSliceCols + lane * 8, count = min(cols - col, 8);
  const int64_t at = row * op.cols + col;
  ask_ahead<T>(op, row, 1);
  begin_rows(op.rows);

  Octet<T> s = load_octet<true, true>(static_cast<const T*>(op.x) + at, count);
  Octet<T> residual;
  if (op.residual) residual = load_octet<true, true>(static_cast<const T*>(op.residual) + at, count);
  float weight[8];
  load_weights<true>(op.weight, kBf16Weight, col, count, weight);
  if (op.residual) {
    s = add_octets(s, residual);
    if (count > 0) store_octet_whole(static_cast<T*>(op.sum) + at, s);
  }
  float sum = sum_of_squares(s);
#pragma unroll
  for (const int mask : {8, 4, 2, 1, 16}) add_across(sum, mask);
  if (lane == 0) reinterpret_cast<float*>(slice_sums)[warp] = sum;
  __syncthreads();
  float turns[2] = {};  // of even and of odd quads
  for (int quad = 0; quad < static_cast<int>(blockDim.x) / (32 * kSlicesOfQuad); ++quad) {
    const float4 slices = slice_sums[quad];
    float& turn = turns[quad & 1];
    turn = __fadd_rn(turn, __fadd_rn(__fadd_rn(slices.x, slices.z), __fadd_rn(slices.y, slices.w)));
  }
  const float rstd = rstd_of(__fadd_rn(turns[0], turns[1]), op.cols, op.eps);
  const Octet<T> y = normalise_octet(s, rstd, weight);
  if (op.y && count > 0) store_octet_whole(static_cast<T*>(op.y) + at, y);
  if (op.y_rows.codes) cast_row_octet(y, op.y_rows, row, col, cols, count, true);
}

}  // namespace

void norm_few_rows_sm90(const RmsNorm& op, cudaStream_t stream) {
  const int threads = 32 * kSlicesOfQuad * static_cast<int>((op.cols + kQuadCols - 1) / kQuadCols);
  const auto kernel = op.weight_dtype == DType::bf16 ? norm_few_rows_kernel<true> : norm_few_rows_kernel<false>;
  launch_kernel(true, "norm_few_rows_kernel", kernel, op.rows, threads, 0, stream, op);
}

}  // namespace eightfold::quant
