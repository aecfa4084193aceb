// The training norm from one read. Column groups span 128 rows and y needs the statistics of whole rows, so a block reads a 128 x 128
// tile and keeps it in registers until the sums of squares of all tiles of its band (128 rows) have come together in device memory:
//
//   leave   s = x + residual; sums of squares of its rows over its 128 columns; row codes of s
//   wait    until every tile of the band has left its sums; every block then adds them up, in one order (row_sum.cuh), and has rstd
//   cast    y, its row and its column codes (tile_cast.cuh)
//
// So an element of bf16 costs 2 bytes read and 3 written (4 and 5 with a residual), and the sums 1/4 byte of L2. Blocks start in the
// order of the grid and several share a multiprocessor: while some bands wait, others load and cast. The tiles of a band must all run at
// once; where a device is too small for that, the rows kernel (norm_sm90.cu) finds rstd first.
//
// The counts of tiles are zeroed by a kernel of its own, which this one's start overlaps.
#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "core/publish.cuh"
#include "quant/norm_training.h"
#include "quant/row_cast.cuh"
#include "quant/row_sum.cuh"

namespace eightfold::quant {
namespace {

constexpr int kBand = 8, kThreads = tile_threads(kBand);
template <class T>
constexpr int kSharing = sizeof(T) == 4 ? 2 : 4;  // blocks on a multiprocessor

struct TrainingGrid {
  uint32_t across;   // tiles in a band
  bool rstd_known;   // nothing to wait for
  uint32_t* counts;  // of the tiles of a band that have left their sums
  float* sums;       // [band][tile][row]
};

template <class T>
struct TrainingShared {
  TileShared<T, kBand> tile;
  float rstd[kTile];
};

__global__ void zero_kernel(uint32_t* counts, uint32_t bands) {
  let_next_kernel_start();
  const uint32_t band = blockIdx.x * blockDim.x + threadIdx.x;
  if (band < bands) counts[band] = 0;
}

template <class T, bool kFull, bool kVector, bool kResidual>
__device__ __forceinline__ void load_tile(const RmsNorm& op, const TrainingGrid& grid, const TileShape& tile, Octet<T> (&s)[kBand]) {
  const TileThread<kBand> me;
  const int64_t row = me.row(tile), col = me.col(tile), at = row * op.cols + col;
  const bool sum_known = kResidual && grid.rstd_known;
  const T* x = static_cast<const T*>(sum_known ? op.sum : op.x) + at;
  int counts[kBand];
#pragma unroll
  for (int p = 0; p < kBand; ++p) {
    counts[p] = kFull ? 8 : octet_count(row + p, col, op.rows, op.cols);
    s[p] = load_octet<kVector>(x + p * op.cols, counts[p]);
  }
  if (!kResidual || sum_known) return;
  const T* residual = static_cast<const T*>(op.residual) + at;
  T* sum = static_cast<T*>(op.sum) + at;
#pragma unroll
  for (int p = 0; p < kBand; ++p) {
    s[p] = add_octets(s[p], load_octet<kVector>(residual + p * op.cols, counts[p]));
    if (counts[p] > 0) store_octet(sum + p * op.cols, s[p], kVector ? 8 : counts[p], kVector);
  }
}

// 1 / rms of row `row` of the band, in two lanes: each adds up every other quad.
__device__ __forceinline__ float rstd_of_row(const RmsNorm& op, const TrainingGrid& grid, uint32_t band, int row, int parity) {
  const float* sums = grid.sums + static_cast<int64_t>(band) * grid.across * kTile + row;
  float squares = 0.0f;
#pragma unroll 2
  for (uint32_t first = parity * kQuadGroups; first < grid.across; first += 2 * kQuadGroups) {
    const float* at = sums + first * kTile;
    const uint32_t left = grid.across - first;
    float groups[kQuadGroups];
#pragma unroll
    for (uint32_t i = 0; i < kQuadGroups; ++i) groups[i] = left >= kQuadGroups || i < left ? __ldcg(at + i * kTile) : 0.0f;
    squares = __fadd_rn(squares, sum_of_quad(groups));
  }
  add_across(squares, 1);
  return rstd_of(squares, op.cols, op.eps);
}

template <class T, bool kFull, bool kVector, bool kResidual>
__device__ __forceinline__ void norm_tile(const RmsNorm& op, const TrainingGrid& grid, uint32_t band, uint32_t index,
                                          TrainingShared<T>& shared) {
  const TileThread<kBand> me;
  const TileShape tile = {op.rows, op.cols, static_cast<int64_t>(band) * kTile, static_cast<int64_t>(index) * kTile, op.cols};
  Octet<T> values[kBand];
  load_tile<T, kFull, kVector, kResidual>(op, grid, tile, values);
  if (!grid.rstd_known) {
    float squares[kBand];
#pragma unroll
    for (int p = 0; p < kBand; ++p) squares[p] = sum_of_squares(values[p]);
    const float sum = fold_group_rows(squares, me.lane);
    if (me.lane % 2 == 0) grid.sums[(static_cast<int64_t>(band) * grid.across + index) * kTile + me.band * kBand + me.octet / 2] = sum;
    __syncthreads();
    if (me.thread == 0) {
      wait_for_earlier_kernels();
      count_one(grid.counts + band);
    }
    cast_tile<kRows128, kFull>(values, tile_output(op.x_rows, {}), tile, shared.tile, false);
    if (me.thread == 0) await_count(grid.counts + band, grid.across);
    __syncthreads();
    const int row = me.thread / 2;
    const float rstd = rstd_of_row(op, grid, band, row, me.thread % 2);
    if (me.thread % 2 == 0) {
      const bool exists = tile.row + row < tile.rows;
      shared.rstd[row] = exists ? rstd : 0.0f;
      if (index == 0 && exists) op.rstd[tile.row + row] = rstd;
    }
  } else if (me.thread < kTile) {
    shared.rstd[me.thread] = tile.row + me.thread < op.rows ? op.rstd[tile.row + me.thread] : 0.0f;
  }
  __syncthreads();

  float weight[8];
  const int64_t col = me.col(tile);
  load_weights<kVector>(op.weight, op.weight_dtype == DType::bf16, col, kFull ? 8 : octet_count(0, col, 1, op.cols), weight);
#pragma unroll
  for (int p = 0; p < kBand; ++p) values[p] = normalise_octet(unpacked_anew(values[p]), shared.rstd[me.band * kBand + p], weight);
  cast_tile<kRows128 | kCols | kTogether, kFull>(values, tile_output(op.y_rows, op.y_cols), tile, shared.tile, false);
}

template <class T, bool kVector, bool kResidual>
__global__ void __launch_bounds__(kThreads, kSharing<T>) norm_training_kernel(const RmsNorm op, const TrainingGrid grid) {
  __shared__ __align__(16) TrainingShared<T> shared;
  const uint32_t band = blockIdx.x / grid.across, index = blockIdx.x % grid.across;
  const bool whole = static_cast<int64_t>(band + 1) * kTile <= op.rows && static_cast<int64_t>(index + 1) * kTile <= op.cols;
  if (kVector && whole)
    norm_tile<T, true, kVector, kResidual>(op, grid, band, index, shared);
  else
    norm_tile<T, false, kVector, kResidual>(op, grid, band, index, shared);
}

template <class T, bool kVector, bool kResidual>
void launch(const RmsNorm& op, cudaStream_t stream) {
  const uint32_t bands = static_cast<uint32_t>((op.rows + kTile - 1) / kTile),
                 across = static_cast<uint32_t>((op.cols + kTile - 1) / kTile);
  const bool fits = across <= static_cast<uint32_t>(kSharing<T> * multiprocessors(current_device()));
  const TrainingGrid grid = {across, !fits, reinterpret_cast<uint32_t*>(op.workspace), op.workspace + training_counts(op.rows)};
  if (fits) {
    zero_kernel<<<(bands + 255) / 256, 256, 0, stream>>>(grid.counts, bands);
    check_launch("zero_kernel");
  } else {
    RmsNorm rows = op;
    rows.y_rows = rows.y_cols = {};
    rms_norm_sm90(rows, stream);
  }
  cudaLaunchAttribute early = early_start();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(bands * across);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = fits ? 1 : 0;
  cudaLaunchKernelEx(&config, norm_training_kernel<T, kVector, kResidual>, op, grid);
  check_launch("norm_training_kernel");
}

template <class T>
void launch_typed(const RmsNorm& op, bool vector, cudaStream_t stream) {
  if (op.residual)
    vector ? launch<T, true, true>(op, stream) : launch<T, false, true>(op, stream);
  else
    vector ? launch<T, true, false>(op, stream) : launch<T, false, false>(op, stream);
}

}  // namespace

void launch_norm_training(const RmsNorm& op, bool vector, cudaStream_t stream) {
  op.dtype == DType::bf16 ? launch_typed<__nv_bfloat16>(op, vector, stream) : launch_typed<float>(op, vector, stream);
}

}  // namespace eightfold::quant
