// CAME's sums over rows and columns, and what they are folded into. came8bit.cuh has the phases.
#include <type_traits>

#include "core/launch.cuh"
#include "optim/came8bit.cuh"
#include "quant/row_sum.cuh"

namespace eightfold::came {
namespace {

constexpr int kWarpRows = kTile / kWarps;
constexpr int kLaneCols = kTile / 32;

// Sums of products over the rows and the columns of one tile. Lanes hold packs of kWidth columns, interleaved.
template <int kSums, int kWidth, int kGroup>
struct TileSums {
  static constexpr int kLanesOfRow = 32 / kGroup;  // that hold the same row's sum in the end
  float cols[kSums][kLaneCols] = {};
  float rows[kSums][kGroup];

  // A lane's sums of kGroup rows become one row's sum over the tile.
  __device__ __forceinline__ float row_sum(int which, int lane) {
    if constexpr (kGroup == 8) {
      quant::split_sums<16, 4>(rows[which], lane);
      quant::split_sums<8, 2>(rows[which], lane);
      quant::split_sums<4, 1>(rows[which], lane);
    } else {
      static_assert(kGroup == 4);
      quant::split_sums<16, 2>(rows[which], lane);
      quant::split_sums<8, 1>(rows[which], lane);
      quant::add_across(rows[which][0], 4);
    }
    quant::add_across(rows[which][0], 2);
    quant::add_across(rows[which][0], 1);
    return rows[which][0];
  }

  __device__ __forceinline__ void store_rows(const Entry& t, const Layout& layout, int tile_col, int64_t first_row, int lane) {
    const int64_t row = first_row + lane / kLanesOfRow;
#pragma unroll
    for (int which = 0; which < kSums; ++which) {
      const float sum = row_sum(which, lane);
      if (lane % kLanesOfRow == 0 && row < t.rows)
        t.scratch[layout.row_parts + (which * layout.col_tiles + tile_col) * layout.row_stride + row] = sum;
    }
  }

  // Adds up the warps' columns, a thread each; returns what this thread's column has of the last sum.
  __device__ __forceinline__ float store_cols(const Entry& t, const Layout& layout, int64_t tile_row, int tile_col, int lane) {
    __shared__ float shared[kSums][kWarps][kTile];
#pragma unroll
    for (int which = 0; which < kSums; ++which)
#pragma unroll
      for (int i = 0; i < kLaneCols; ++i) shared[which][threadIdx.x / 32][(i / kWidth * 32 + lane) * kWidth + i % kWidth] = cols[which][i];
    __syncthreads();
    const int64_t col = static_cast<int64_t>(tile_col) * kTile + threadIdx.x;
    float sum = 0.0f;
#pragma unroll
    for (int which = 0; which < kSums; ++which) {
      sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += shared[which][warp][threadIdx.x];
      if (col < t.cols) t.scratch[layout.col_parts + (which * layout.row_tiles + tile_row) * layout.col_stride + col] = sum;
    }
    return sum;
  }
};

template <class Grad, bool kVector>
__global__ void __launch_bounds__(kThreads) came_squares_kernel(const __grid_constant__ Launch launch) {
  constexpr int kWidth = 16 / static_cast<int>(sizeof(Grad)), kPacks = kLaneCols / kWidth, kGroup = 8;
  const int index = tensor_of(launch, blockIdx.x);
  const Entry& t = launch.entries[index];
  const Layout layout(t.rows, t.cols);
  const uint32_t tile = blockIdx.x - launch.first_block[index], col_tiles = static_cast<uint32_t>(layout.col_tiles);
  const uint32_t tile_row = tile / col_tiles, tile_col = tile - tile_row * col_tiles;
  const int lane = threadIdx.x % 32;
  const int64_t first_row = static_cast<int64_t>(tile_row) * kTile + threadIdx.x / 32 * kWarpRows;
  const int64_t first_col = static_cast<int64_t>(tile_col) * kTile + lane * kWidth;
  const int left = static_cast<int>(t.cols - first_col);

  TileSums<1, kWidth, kGroup> sums;
#pragma unroll 1
  for (int64_t row = first_row; row < min(first_row + kWarpRows, static_cast<int64_t>(t.rows)); row += kGroup) {
    optim::Pack<Grad, kWidth> g[kGroup][kPacks];
#pragma unroll
    for (int r = 0; r < kGroup; ++r)
#pragma unroll
      for (int j = 0; j < kPacks; ++j)
        g[r][j] = optim::load_pack<Grad, kWidth>(static_cast<const Grad*>(t.grad) + (row + r) * t.cols + first_col + 32 * kWidth * j,
                                                 row + r < t.rows ? left - 32 * kWidth * j : 0, kVector);
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      sums.rows[0][r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kLaneCols; ++i) {
        const float x = g[r][i / kWidth].value(i % kWidth);
        sums.cols[0][i] = __fmaf_rn(x, x, sums.cols[0][i]);
        sums.rows[0][r] = __fmaf_rn(x, x, sums.rows[0][r]);
      }
    }
    sums.store_rows(t, layout, tile_col, row, lane);
  }
  sums.store_cols(t, layout, tile_row, tile_col, lane);
}

template <class Grad, bool kBytes, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) came_instabilities_kernel(const __grid_constant__ Launch launch) {
  constexpr int kWidth = 16 / static_cast<int>(sizeof(Grad)), kPacks = kLaneCols / kWidth;
  constexpr int kGroup = sizeof(Grad) == 2 && kBytes ? 8 : 4;  // rows whose loads are under way together
  const uint32_t block = gridDim.x - 1 - blockIdx.x;
  const int index = tensor_of(launch, block);
  const Entry& t = launch.entries[index];
  const Layout layout(t.rows, t.cols);
  const uint32_t tile = block - launch.first_block[index], col_tiles = static_cast<uint32_t>(layout.col_tiles);
  const uint32_t tile_row = tile / col_tiles, tile_col = tile - tile_row * col_tiles;
  const int lane = threadIdx.x % 32;
  const int64_t first_row = static_cast<int64_t>(tile_row) * kTile + threadIdx.x / 32 * kWarpRows;
  const int64_t first_col = static_cast<int64_t>(tile_col) * kTile + lane * kWidth;
  const int left = static_cast<int>(t.cols - first_col);
  const Guess guess(launch, t, layout);
  const float* col_factors = t.scratch + layout.col_v + first_col;
  const float* row_factors = t.scratch + layout.row_v;

  float col_factor[kLaneCols];
#pragma unroll
  for (int i = 0; i < kLaneCols; ++i) {
    const int col = i / kWidth * 32 * kWidth + i % kWidth;
    col_factor[i] = col < left ? col_factors[col] * guess.factor : 0.0f;
  }
  TileSums<3, kWidth, kGroup> sums;
#pragma unroll 1
  for (int64_t row = first_row; row < min(first_row + kWarpRows, static_cast<int64_t>(t.rows)); row += kGroup) {
    optim::Pack<Grad, kWidth> g[kGroup][kPacks];
    Moments<kBytes, kWidth, kVector> m[kGroup][kPacks];
    float row_factor[kGroup];
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      row_factor[r] = row + r < t.rows ? row_factors[row + r] : 0.0f;
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const int64_t at = (row + r) * t.cols + first_col + 32 * kWidth * j;
        const int count = row + r < t.rows ? left - 32 * kWidth * j : 0;
        g[r][j] = optim::load_pack<Grad, kWidth>(static_cast<const Grad*>(t.grad) + at, count, kVector);
        m[r][j].load(t, at, count);
      }
    }
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
#pragma unroll
      for (int which = 0; which < 3; ++which) sums.rows[which][r] = 0.0f;
      const int count = row + r < t.rows ? left : 0;
#pragma unroll
      for (int i = 0; i < kLaneCols; ++i) {
        const float w = g[r][i / kWidth].value(i % kWidth) * col_factor[i] * row_factor[r];
        float d = w - m[r][i / kWidth].value(i % kWidth);
        if (!kVector && i / kWidth * 32 * kWidth + i % kWidth >= count) d = 0.0f;
        const float products[3] = {d, d, w}, others[3] = {d, w, w};
#pragma unroll
        for (int which = 0; which < 3; ++which) {
          sums.cols[which][i] = __fmaf_rn(products[which], others[which], sums.cols[which][i]);
          sums.rows[which][r] = __fmaf_rn(products[which], others[which], sums.rows[which][r]);
        }
      }
    }
    sums.store_rows(t, layout, tile_col, row, lane);
  }
  const float ww = sums.store_cols(t, layout, tile_row, tile_col, lane);
  __shared__ float room[kWarps];
  const float total = block_sum(ww, room);
  if (threadIdx.x == 0) t.scratch[layout.tile_sums + tile] = total;
}

// Sum `which` of this thread's row or column, over tiles.
__device__ __forceinline__ float fold(const float* parts, int64_t tiles, int64_t stride, int64_t i) {
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t tile = 0; tile < tiles; ++tile) sum += parts[tile * stride + i];
  return sum;
}

// Which rows or columns a block of threads folds.
struct Share {
  const float* parts;
  int64_t tiles, stride, count, length;  // of each row, or column
  int64_t fold, i;
  bool is_row;

  __device__ __forceinline__ Share(const Launch& launch, const Entry& t, const Layout& layout, int index) {
    fold = blockIdx.x - launch.first_block[index];
    is_row = fold < layout.row_folds;
    if (is_row) {
      parts = t.scratch + layout.row_parts, tiles = layout.col_tiles, stride = layout.row_stride, count = t.rows, length = t.cols;
    } else {
      fold -= layout.row_folds;
      parts = t.scratch + layout.col_parts, tiles = layout.row_tiles, stride = layout.col_stride, count = t.cols, length = t.rows;
    }
    i = fold * kThreads + threadIdx.x;
  }
};

__global__ void __launch_bounds__(kThreads) came_fold_squares_kernel(const __grid_constant__ Launch launch) {
  const int index = tensor_of(launch, blockIdx.x);
  const Entry& t = launch.entries[index];
  const CameConstants& c = launch.constants;
  const Layout layout(t.rows, t.cols);
  const Share share(launch, t, layout, index);
  float v = 0.0f, ratio = 0.0f, fresh = 0.0f;
  if (share.i < share.count) {
    const float grad_scale = launch.grad_scale ? *launch.grad_scale : 1.0f;
    float* state = (share.is_row ? t.v_rows : t.v_cols) + share.i;
    const float mean = fold(share.parts, share.tiles, share.stride, share.i) / static_cast<float>(share.length);
    fresh = mean * (grad_scale * grad_scale) + c.eps1;
    v = *state = c.beta2 * *state + c.one_minus_beta2 * fresh;
    ratio = fresh / v;
    t.scratch[(share.is_row ? layout.row_v : layout.col_v) + share.i] = rsqrtf(v);
  }
  __shared__ float room[3][kWarps];
  float* sums = t.scratch + layout.folds;
  ratio = block_sum(ratio, room[0]);
  if (share.is_row) {
    v = block_sum(v, room[1]);
    fresh = block_sum(fresh, room[2]);
    if (threadIdx.x == 0) {
      sums[share.fold] = v;
      sums[layout.row_folds + share.fold] = ratio;
      sums[2 * layout.row_folds + share.fold] = fresh;
    }
  } else if (threadIdx.x == 0) {
    sums[4 * layout.row_folds + share.fold] = ratio;
  }
}

__global__ void __launch_bounds__(kThreads) came_fold_kernel(const __grid_constant__ Launch launch) {
  const int index = tensor_of(launch, blockIdx.x);
  const Entry& t = launch.entries[index];
  const CameConstants& c = launch.constants;
  const Layout layout(t.rows, t.cols);
  const Share share(launch, t, layout, index);
  const Guess guess(launch, t, layout);
  __shared__ float room[2][kWarps];
  float ww = 0.0f;
  for (int64_t tile = threadIdx.x; tile < layout.row_tiles * layout.col_tiles; tile += kThreads) ww += t.scratch[layout.tile_sums + tile];
  ww = block_sum(ww, room[0]) / (static_cast<float>(t.rows) * static_cast<float>(t.cols));
  const float e = came_correction(c, guess.scale, ww);
  float u = 0.0f;
  if (share.i < share.count) {
    const float length = static_cast<float>(share.length);
    const int64_t next = share.tiles * share.stride;
    float means[3];
#pragma unroll
    for (int which = 0; which < 3; ++which) means[which] = fold(share.parts + which * next, share.tiles, share.stride, share.i) / length;
    float* state = (share.is_row ? t.u_rows : t.u_cols) + share.i;
    u = *state = c.beta3 * *state + c.one_minus_beta3 * came_instability(c, e, means[0], means[1], means[2]);
    t.scratch[(share.is_row ? layout.row_u : layout.col_u) + share.i] = rsqrtf(u);
  }
  if (share.is_row) {
    u = block_sum(u, room[1]);
    if (threadIdx.x == 0) t.scratch[layout.folds + 3 * layout.row_folds + share.fold] = u;
    if (threadIdx.x == 0 && share.fold == 0) *t.scratch = guess.factor * (1.0f + e);
  }
}

template <class Grad, bool kVector>
void launch_sums_of(bool instabilities, bool bytes, uint32_t blocks, const Launch& launch, cudaStream_t stream) {
  if (!instabilities)
    came_squares_kernel<Grad, kVector><<<blocks, kThreads, 0, stream>>>(launch);
  else if (bytes)
    came_instabilities_kernel<Grad, true, kVector><<<blocks, kThreads, 0, stream>>>(launch);
  else
    came_instabilities_kernel<Grad, false, kVector><<<blocks, kThreads, 0, stream>>>(launch);
  check_launch(instabilities ? "came8bit_ (instabilities)" : "came8bit_ (squares)");
}

}  // namespace

void launch_sums(int kind, bool instabilities, uint32_t blocks, const Launch& launch, cudaStream_t stream) {
  const bool bytes = kind & kByteMoments;
  if (kind & kBf16Grad)
    kind& kAligned ? launch_sums_of<uint16_t, true>(instabilities, bytes, blocks, launch, stream)
                   : launch_sums_of<uint16_t, false>(instabilities, bytes, blocks, launch, stream);
  else
    kind& kAligned ? launch_sums_of<float, true>(instabilities, bytes, blocks, launch, stream)
                   : launch_sums_of<float, false>(instabilities, bytes, blocks, launch, stream);
}

void launch_folds(bool instabilities, uint32_t blocks, const Launch& launch, cudaStream_t stream) {
  if (instabilities)
    came_fold_kernel<<<blocks, kThreads, 0, stream>>>(launch);
  else
    came_fold_squares_kernel<<<blocks, kThreads, 0, stream>>>(launch);
  check_launch("came8bit_ (fold)");
}

}  // namespace eightfold::came
