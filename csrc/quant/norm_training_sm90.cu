// The training norm in one launch. Column groups span 128 rows and y needs the statistics of whole rows, so there are two kinds of
// blocks:
//
//   rows   8 rows, a warp each: s = x + residual, its codes, and at last rstd, which is also the sign that the row is done
//   tile   128 x 128: waits for the rstd of its rows, makes y, its row and its column codes (tile_cast.cuh)
//
// The rows of band b (128 rows) are `ahead` bands before the tiles of band b in the grid: far enough to be done when the tiles come,
// near enough for the tiles to find s in L2. So an element of bf16 costs 2 bytes read and 3 written (2 + 2 and 2 + 3 with a residual)
// of device memory, and 2 more of L2. Blocks start in the order of the grid, and only tiles wait, for rows before them in it.
//
// rstd is marked as unwritten by a kernel of its own, which this one's start overlaps.
#include <algorithm>

#include "core/dependent_launch.cuh"
#include "core/publish.cuh"
#include "quant/norm_training.h"
#include "quant/row_cast.cuh"
#include "quant/row_sum.cuh"

namespace eightfold::quant {
namespace {

constexpr uint32_t kUnwritten = 0xFFFFFFFFu;  // a NaN that no arithmetic of the GPU gives
constexpr int kBand = 8, kThreads = tile_threads(kBand), kRowsWarps = kThreads / 32;
constexpr int kRowsBlocks = kTile / kRowsWarps;  // to a band
constexpr int64_t kAhead = 8;

// The grid: the rows of `ahead` bands; the rows of band b + ahead and the tiles of band b; the tiles of the last `ahead` bands.
struct TrainingGrid {
  uint32_t bands, across, ahead;

  struct Item {
    bool rows;
    uint32_t band, index;
  };
  __device__ Item item(uint32_t block) const {
    const uint32_t first = ahead * kRowsBlocks, each = kRowsBlocks + across;
    if (block < first) return {true, block / kRowsBlocks, block % kRowsBlocks};
    block -= first;
    const uint32_t band = block / each, index = block % each;
    if (band < bands - ahead) return index < kRowsBlocks ? Item{true, band + ahead, index} : Item{false, band, index - kRowsBlocks};
    block -= (bands - ahead) * each;
    return {false, bands - ahead + block / across, block % across};
  }
  uint32_t blocks() const { return bands * (kRowsBlocks + across); }
};

__global__ void unwrite_kernel(uint32_t* rstd, int64_t rows) {
  let_next_kernel_start();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows) rstd[row] = kUnwritten;
}

template <class T, bool kVector, bool kResidual>
__device__ __forceinline__ void norm_rows(const RmsNorm& op, int64_t row) {
  constexpr int kQuads = kResidual || sizeof(T) == 4 ? 1 : 2;  // at once
  if (row >= op.rows) return;
  const int lane = threadIdx.x % 32, cols = static_cast<int>(op.cols);
  const T* x = static_cast<const T*>(op.x) + row * op.cols;
  const T* residual = static_cast<const T*>(op.residual) + row * op.cols;
  T* sum = static_cast<T*>(op.sum) + row * op.cols;
  float squares = 0.0f;
#pragma unroll 1
  for (int first = 0; first < cols; first += kQuads * kQuadCols) {
    Octet<T> s[4 * kQuads], other[4 * kQuads];
    const int col = first + lane * 8;
#pragma unroll
    for (int k = 0; k < 4 * kQuads; ++k) {
      const int at = col + k * kSliceCols;
      s[k] = load_octet<kVector>(x + at, min(cols - at, 8));
      if (kResidual) other[k] = load_octet<kVector>(residual + at, min(cols - at, 8));
    }
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      float parts[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = col + (quad * 4 + k) * kSliceCols;
        Octet<T>& octet = s[quad * 4 + k];
        if (kResidual) {
          octet = add_octets(octet, other[quad * 4 + k]);
          if (at < cols) store_octet(sum + at, octet, kVector ? 8 : min(cols - at, 8), kVector);
        }
        parts[k] = sum_of_squares(octet);
      }
      squares = __fadd_rn(squares, fold_quad(parts, lane));
      cast_row_octets(s + quad * 4, op.x_rows, row, col + quad * kQuadCols, cols, kVector);
    }
  }
  float rstd = rstd_of(squares, op.cols, op.eps);
  if (__float_as_uint(rstd) == kUnwritten) rstd = __uint_as_float(kQuietNaN);
  wait_for_earlier_kernels();
  if (kResidual) {  // with it goes the row of s
    __threadfence();
    __syncwarp();
  }
  if (lane == 0) publish<kResidual>(op.rstd + row, rstd);
}

template <class T>
struct TrainingShared {
  TileShared<kBand> tile;
  float rstd[kTile];
};

template <class T, bool kFull, bool kVector, bool kResidual>
__device__ __forceinline__ void norm_tile(const RmsNorm& op, const TileShape& tile, TrainingShared<T>& shared) {
  const TileThread<kBand> me;
  const int64_t row = me.row(tile), col = me.col(tile);
  Octet<T> values[kBand];
  auto load = [&] {
    const T* s = static_cast<const T*>(kResidual ? op.sum : op.x) + row * op.cols + col;
#pragma unroll
    for (int p = 0; p < kBand; ++p)
      values[p] = load_octet<kVector, kResidual>(s + p * op.cols, kFull ? 8 : octet_count(row + p, col, op.rows, op.cols));
  };
  if (!kResidual) load();
  wait_for_earlier_kernels();
  if (me.thread < kTile)
    shared.rstd[me.thread] = tile.row + me.thread < op.rows ? await_published<kResidual>(op.rstd + tile.row + me.thread, kUnwritten) : 0.0f;
  __syncthreads();
  if (kResidual) load();

  float weight[8];
  load_weights<kVector>(op.weight, op.weight_dtype == DType::bf16, col, kFull ? 8 : octet_count(0, col, 1, op.cols), weight);
#pragma unroll
  for (int p = 0; p < kBand; ++p) values[p] = normalise_octet(values[p], shared.rstd[me.band * kBand + p], weight);
  cast_tile<kRows128 | kCols, kFull>(values, tile_output(op.y_rows, op.y_cols), tile, shared.tile.stats, shared.tile.codes, false);
}

template <class T, bool kVector, bool kResidual>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 3 : 2) norm_training_kernel(const RmsNorm op, const TrainingGrid grid) {
  __shared__ __align__(16) TrainingShared<T> shared;
  const TrainingGrid::Item item = grid.item(blockIdx.x);
  const int64_t row = static_cast<int64_t>(item.band) * kTile;
  if (item.rows) {
    norm_rows<T, kVector, kResidual>(op, row + item.index * kRowsWarps + threadIdx.x / 32);
    return;
  }
  const TileShape tile = {op.rows, op.cols, row, static_cast<int64_t>(item.index) * kTile};
  if (kVector && tile.full())
    norm_tile<T, true, kVector, kResidual>(op, tile, shared);
  else
    norm_tile<T, false, kVector, kResidual>(op, tile, shared);
}

template <class T, bool kVector>
void launch(const RmsNorm& op, cudaStream_t stream) {
  unwrite_kernel<<<static_cast<unsigned>((op.rows + 255) / 256), 256, 0, stream>>>(reinterpret_cast<uint32_t*>(op.rstd), op.rows);
  check_launch("unwrite_kernel");
  const int64_t bands = (op.rows + kTile - 1) / kTile;
  const TrainingGrid grid = {static_cast<uint32_t>(bands), static_cast<uint32_t>((op.cols + kTile - 1) / kTile),
                             static_cast<uint32_t>(std::min(bands, kAhead))};
  cudaLaunchAttribute early = early_start();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks());
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, op.residual ? norm_training_kernel<T, kVector, true> : norm_training_kernel<T, kVector, false>, op, grid);
  check_launch("norm_training_kernel");
}

}  // namespace

void launch_norm_training(const RmsNorm& op, bool vector, cudaStream_t stream) {
  if (op.dtype == DType::bf16)
    vector ? launch<__nv_bfloat16, true>(op, stream) : launch<__nv_bfloat16, false>(op, stream);
  else
    vector ? launch<float, true>(op, stream) : launch<float, false>(op, stream);
}

}  // namespace eightfold::quant
