// RMS norm of short rows, and its backward pass: the heads of q and k. A row is one group of columns or less, 16 lanes and eight elements
// each, and a warp has several on their way at once; bits are those of norm_sm90.cu and norm_backward_sm90.cu, which give a row a warp
// or a block and leave most of its lanes idle here.
#include <cuda_bf16.h>

#include "core/dependent_launch.cuh"
#include "quant/norm.h"
#include "quant/norm_short.cuh"
#include "quant/norm_short.h"
#include "quant/row_cast.cuh"

namespace eightfold::quant {
namespace {

using T = __nv_bfloat16;

constexpr int kLanes = kShortLanes, kThreads = 128, kRowsAtOnce = 4;  // rows at once: of 16 lanes
constexpr int kRowsOfBlock = kThreads / kLanes * kRowsAtOnce;

__global__ void __launch_bounds__(kThreads) norm_short_rows_kernel(const RmsNorm op) {
  begin_rows(op.rows);
  const int lane = threadIdx.x % kLanes, cols = static_cast<int>(op.cols), count = min(cols - 8 * lane, 8);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / kLanes;
  Octet<T> x[kRowsAtOnce];
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) {
    const int64_t row = first + i * (kThreads / kLanes);
    x[i] = load_octet<true, true>(static_cast<const T*>(op.x) + row * cols + 8 * lane, row < op.rows ? count : 0);
  }
  float weight[8];
  load_weights<true>(op.weight, op.weight_dtype == DType::bf16, 8 * lane, count, weight);
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) {
    const int64_t row = first + i * (kThreads / kLanes);
    const int here = row < op.rows ? count : 0;
    const float rstd = rstd_of(squares_of_group(x[i]), op.cols, op.eps);
    if (op.rstd && here > 0 && lane == 0) op.rstd[row] = rstd;
    if (here > 0 && op.y) store_octet_whole(static_cast<T*>(op.y) + row * cols + 8 * lane, normalise_octet(x[i], rstd, weight));
    if (op.x_rows.codes) cast_row_octet(x[i], op.x_rows, row, 8 * lane, cols, here, true);
    if (op.y_rows.codes) cast_row_octet(normalise_octet(x[i], rstd, weight), op.y_rows, row, 8 * lane, cols, here, true);
  }
}

// Eight elements of s as they were saved.
template <class X>
struct Saved {
  Octet<T> octet;
  __device__ __forceinline__ void load(const RmsNormBackward& op, int64_t row, int col, int count) {
    octet = load_octet<true>(static_cast<const T*>(op.x) + row * op.cols + col, count);
  }
  __device__ __forceinline__ void decode(float (&out)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = octet.value(j);
  }
};

template <>
struct Saved<uint8_t> {
  uint2 codes;
  float scale;
  __device__ __forceinline__ void load(const RmsNormBackward& op, int64_t row, int col, int count) {
    codes = load_codes8<true>(op.x_codes.codes + row * op.cols + col, count);
    scale = count > 0 ? __ldg(op.x_codes.scales + row) : 0.0f;
  }
  __device__ __forceinline__ void decode(float (&out)[8]) const { decode_octet(codes, scale, out); }
};

// 16 lanes take a run of rows one after the other, asked for kRowsAtOnce at a time.
template <class X>
__global__ void __launch_bounds__(kThreads, 5) norm_short_backward_kernel(const RmsNormBackward op, int64_t runs) {
  let_next_kernel_start();
  const int lane = threadIdx.x % kLanes, cols = static_cast<int>(op.cols), count = min(cols - 8 * lane, 8);
  const int64_t run = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t begin = run < runs ? op.rows * run / runs : 0, end = run < runs ? op.rows * (run + 1) / runs : 0;
  const int64_t longest = (op.rows + runs - 1) / runs;  // so that the lanes of a warp, of two runs, stay together
  float weight[8], dweight[8] = {};
  load_weights<true>(op.weight, op.weight_dtype == DType::bf16, 8 * lane, count, weight);
  for (int64_t first = begin; first < begin + longest; first += kRowsAtOnce) {
    Octet<T> dy[kRowsAtOnce];
    Saved<X> s[kRowsAtOnce];
    float rstd[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64_t row = first + i;
      const int here = row < end ? count : 0;
      dy[i] = load_octet<true>(static_cast<const T*>(op.dy) + row * cols + 8 * lane, here);
      s[i].load(op, row, 8 * lane, here);
      rstd[i] = row < end ? __ldg(op.rstd + row) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const bool exists = first + i < end;
      float value[8];
      s[i].decode(value);
      const Octet<T> dx = short_row_gradient(dy[i], value, rstd[i], weight, dweight, cols, exists);
      if (!exists || count <= 0) continue;
      store_octet_whole(static_cast<T*>(op.dx) + (first + i) * cols + 8 * lane, dx);
    }
  }
  if (run >= runs || count <= 0) return;
  Octet<float> sums;
  sums.set(dweight);
  store_octet_whole(op.partials + run * cols + 8 * lane, sums);
}

}  // namespace

void norm_short_rows_sm90(const RmsNorm& op, cudaStream_t stream) {
  launch_kernel(op.rows <= kFewRows, "norm_short_rows_kernel", norm_short_rows_kernel, (op.rows + kRowsOfBlock - 1) / kRowsOfBlock,
                kThreads, 0, stream, op);
}

void norm_short_backward_sm90(const RmsNormBackward& op, cudaStream_t stream) {
  const int64_t runs = backward_runs(op.rows, op.cols), together = kThreads / kLanes;
  const auto kernel = op.x ? norm_short_backward_kernel<T> : norm_short_backward_kernel<uint8_t>;
  launch_kernel(false, "norm_short_backward_kernel", kernel, (runs + together - 1) / together, kThreads, 0, stream, op, runs);
}

}  // namespace eightfold::quant
