// RMS norm row by row: inference, and y alone. Training is in norm_training_sm90.cu.
//
// A row waits in the registers of one warp, or of a few where it is long or rows are few: all of its loads are in flight at once, and a
// row of one warp meets no barrier between its loads and its stores. Many short-lived blocks keep the memory busy while some compute.
#include <algorithm>

#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "quant/norm.h"
#include "quant/norm_ahead.cuh"
#include "quant/norm_few.h"
#include "quant/norm_short.h"
#include "quant/norm_training.h"
#include "quant/row_cast.cuh"
#include "quant/row_sum.cuh"

namespace eightfold::quant {
namespace {

constexpr int kMaxQuads = kMaxNormCols / kQuadCols;
constexpr int kRowsTogether = 4;  // rows of one warp share a block

enum class Weights { bf16, f32, either };  // known when compiled, or asked for every eight

constexpr int most_threads(int quads) { return 32 * std::max(kMaxQuads / quads, kRowsTogether); }
template <class T>
constexpr int least_blocks(int quads, bool residual, bool codes_only) {
  const int words = quads * 4 * Octet<T>::kWords * (residual ? 2 : 1), registers = words <= 32 ? 64 : words <= 64 ? 100 : 128;
  return 65536 / (most_threads(quads) * (codes_only ? registers : 128));
}

// kCodesOnly: of what a row may give, y's codes alone are wanted. Warp w of `warps` has quads w, w + warps, ... of its row.
template <class T, int kQuads, bool kVector, bool kResidual, bool kCodesOnly, Weights kWeights>
__global__ void __launch_bounds__(most_threads(kQuads), least_blocks<T>(kQuads, kResidual, kCodesOnly))
    norm_rows_kernel(const RmsNorm op, int warps) {
  __shared__ float quad_sums[kMaxQuads];
  const int together = warps == 1 ? kRowsTogether : 1;
  if (op.rows <= kFewRows) ask_ahead<T>(op, static_cast<int64_t>(blockIdx.x) * together, together);
  begin_rows(op.rows);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, member = warps == 1 ? 0 : warp;
  const int64_t row = warps == 1 ? static_cast<int64_t>(blockIdx.x) * kRowsTogether + warp : blockIdx.x;
  if (row >= op.rows) return;
  const int cols = static_cast<int>(op.cols);
  const T* x = static_cast<const T*>(op.x) + row * op.cols;
  auto col_of = [&](int quad) { return (quad * warps + member) * kQuadCols + lane * 8; };

  // s = x (+ residual), and rstd
  Octet<T> s[kQuads][4];
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    const T* at = x + col_of(quad);
    const int left = cols - col_of(quad);
#pragma unroll
    for (int k = 0; k < 4; ++k) s[quad][k] = load_octet<kVector, true>(at + k * kSliceCols, min(left - k * kSliceCols, 8));
  }
  if (kResidual) {
    const T* residual = static_cast<const T*>(op.residual) + row * op.cols;
    Octet<T> other[kQuads][4];
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const T* at = residual + col_of(quad);
      const int left = cols - col_of(quad);
#pragma unroll
      for (int k = 0; k < 4; ++k) other[quad][k] = load_octet<kVector, true>(at + k * kSliceCols, min(left - k * kSliceCols, 8));
    }
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      T* at = static_cast<T*>(op.sum) + row * op.cols + col_of(quad);
      const int left = cols - col_of(quad);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        s[quad][k] = add_octets(s[quad][k], other[quad][k]);
        if (k * kSliceCols < left) store_octet(at + k * kSliceCols, s[quad][k], kVector ? 8 : left - k * kSliceCols, kVector);
      }
    }
  }
  float turns[2] = {};  // of even and of odd quads
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    float parts[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) parts[k] = sum_of_squares(s[quad][k]);
    const float sum = fold_quad(parts, lane);
    turns[quad & 1] = __fadd_rn(turns[quad & 1], sum);
    if (warps > 1 && lane == 0 && quad * warps + warp < kMaxQuads) quad_sums[quad * warps + warp] = sum;
  }
  if (warps > 1) {
    __syncthreads();
    turns[0] = turns[1] = 0.0f;
    const int quads = (cols + kQuadCols - 1) / kQuadCols;
#pragma unroll 1
    for (int quad = 0; quad < quads; quad += 2) {
      turns[0] = __fadd_rn(turns[0], quad_sums[quad]);
      if (quad + 1 < quads) turns[1] = __fadd_rn(turns[1], quad_sums[quad + 1]);
    }
  }
  const float rstd = rstd_of(__fadd_rn(turns[0], turns[1]), op.cols, op.eps);
  if (!kCodesOnly && op.rstd && member == 0 && lane == 0) op.rstd[row] = rstd;

  // codes of s, then y and its codes
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    const int col = col_of(quad), left = cols - col;
    const bool bf16_weight = kWeights == Weights::either ? op.weight_dtype == DType::bf16 : kWeights == Weights::bf16;
    const void* weights = static_cast<const char*>(op.weight) + col * (bf16_weight ? 2 : 4);
    Octet<T> y[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float weight[8];
      load_weights<kVector>(weights, bf16_weight, k * kSliceCols, min(left - k * kSliceCols, 8), weight);
      y[k] = normalise_octet(unpacked_anew(s[quad][k]), rstd, weight);
    }
    if (!kCodesOnly && op.x_rows.codes) cast_row_octets(s[quad], op.x_rows, row, col, cols, kVector);
    if (!kCodesOnly && op.y) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k * kSliceCols < left)
          store_octet(static_cast<T*>(op.y) + row * op.cols + col + k * kSliceCols, y[k], kVector ? 8 : left - k * kSliceCols, kVector);
    }
    if (kCodesOnly || op.y_rows.codes) cast_row_octets(y, op.y_rows, row, col, cols, kVector);
  }
}

template <class T, int kQuads, bool kVector, bool kResidual, bool kCodesOnly, Weights kWeights>
void launch_rows(const RmsNorm& op, cudaStream_t stream) {
  const int64_t held = int64_t{kQuads} * kQuadCols;
  const int warps = static_cast<int>(std::max<int64_t>((op.cols + held - 1) / held, 1));
  const int64_t together = warps == 1 ? kRowsTogether : 1, blocks = (op.rows + together - 1) / together;
  launch_kernel(op.rows <= kFewRows, "norm_rows_kernel", norm_rows_kernel<T, kQuads, kVector, kResidual, kCodesOnly, kWeights>, blocks,
                static_cast<int>(32 * warps * together), 0, stream, op, warps);
}

template <class T, bool kVector, bool kResidual, bool kCodesOnly, Weights kWeights>
void launch_quads(const RmsNorm& op, cudaStream_t stream) {
  constexpr int kMost = sizeof(T) == 4 || !kVector || kResidual ? 1 : 2;
  const bool many = op.rows >= 16 * multiprocessors(current_device());
  if (kMost == 2 && many && op.cols > kQuadCols)
    launch_rows<T, kMost, kVector, kResidual, kCodesOnly, kWeights>(op, stream);
  else
    launch_rows<T, 1, kVector, kResidual, kCodesOnly, kWeights>(op, stream);
}

template <class T, bool kVector, bool kCodesOnly, Weights kWeights>
void launch_residual(const RmsNorm& op, cudaStream_t stream) {
  op.residual ? launch_quads<T, kVector, true, kCodesOnly, kWeights>(op, stream)
              : launch_quads<T, kVector, false, kCodesOnly, kWeights>(op, stream);
}

template <class T>
void rms_norm_typed(const RmsNorm& op, cudaStream_t stream) {
  const bool vector = op.cols % 8 == 0 && aligned16(op.x) && aligned16(op.residual) && aligned16(op.weight);
  if (op.y_cols.codes) return launch_norm_training(op, vector, stream);
  if (vector && is_short(op) && !op.residual) return norm_short_rows_sm90(op, stream);
  if (vector && is_of_few_rows(op)) return norm_few_rows_sm90(op, stream);
  if (!vector) return launch_residual<T, false, false, Weights::either>(op, stream);
  const bool codes_only = op.y_rows.codes && !op.y && !op.x_rows.codes && !op.rstd;
  if (!codes_only) return launch_residual<T, true, false, Weights::either>(op, stream);
  if (op.weight_dtype == DType::bf16)
    launch_residual<T, true, true, Weights::bf16>(op, stream);
  else
    launch_residual<T, true, true, Weights::f32>(op, stream);
}

}  // namespace

void rms_norm_sm90(const RmsNorm& op, void* stream) {
  if (op.rows == 0) return;
  if (op.dtype == DType::bf16)
    rms_norm_typed<__nv_bfloat16>(op, static_cast<cudaStream_t>(stream));
  else
    rms_norm_typed<float>(op, static_cast<cudaStream_t>(stream));
}

}  // namespace eightfold::quant
