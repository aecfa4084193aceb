// What the CUDA phases of CAME share: tensors in a launch's parameter block, scratch memory, and sums in one order.
//
// A matrix goes through five launches, each over all tensors of a batch:
//   squares        tiles of 256 x 256: sums of g^2 of a tile's rows and of its columns (came8bit_sums_sm90.cu)
//   fold squares   a thread a row or column: v, rsqrt(v), and what the guess is made of
//   instabilities  tiles: sums of d^2, d w', w'^2, against the order of the first phase, so that L2 still has what that read last
//   fold           a thread a row or column: u, rsqrt(u)
//   step           a warp for 2,048 elements: m, parameters, bytes (came8bit_step_sm90.cu), against the order of the third phase
// any other tensor through two (came8bit_vectors_sm90.cu). In a tile a warp has 32 rows and a lane 8 columns: columns are added up in
// registers, rows by shuffles of which each halves what a lane holds.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "optim/came8bit.h"
#include "optim/packs.cuh"

namespace eightfold::came {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 256;              // rows, and columns
constexpr int kMaxTensors = 280;        // a launch's parameter block stays under 32,764 bytes
constexpr int64_t kVectorChunk = 8192;  // elements of a tensor that is no matrix, a block of threads

struct Entry {
  void* param;
  const void* grad;
  void* m;
  float2* m_scales;
  float *v_rows, *v_cols, *u_rows, *u_cols;
  const float* step;
  float* scratch;
  int64_t offset;
  int64_t numel;
  uint32_t rows, cols;
  uint32_t inverse;  // (2^32 - 1) / cols
};

struct Launch {
  const float *lr, *grad_scale;
  CameConstants constants;
  PhiloxKeys keys;
  int count;
  uint32_t first_block[kMaxTensors];
  Entry entries[kMaxTensors];
};
static_assert(sizeof(Launch) <= 32764);

EF_HD int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
EF_HD int64_t padded(int64_t n) { return parts_of(n, 4) * 4; }

// A matrix's scratch memory, in floats; every array starts at a multiple of 16 bytes.
struct Layout {
  int64_t row_tiles, col_tiles, row_folds, col_folds;
  int64_t row_stride, col_stride;      // of partial sums
  int64_t row_v, col_v, row_u, col_u;  // what elements are multiplied by: rsqrt
  int64_t folds;                       // row_folds each of v, fresh / v, fresh, u; col_folds of fresh / v
  int64_t tile_sums;                   // of w'^2
  int64_t row_parts, col_parts;        // [sum][tile][row], [sum][tile][col]
  int64_t total;

  EF_HD Layout(int64_t rows, int64_t cols)
      : row_tiles(parts_of(rows, kTile)),
        col_tiles(parts_of(cols, kTile)),
        row_folds(parts_of(rows, kThreads)),
        col_folds(parts_of(cols, kThreads)),
        row_stride(padded(rows)),
        col_stride(padded(cols)),
        row_v(4),  // after the factor of w, its own line
        col_v(row_v + row_stride),
        row_u(col_v + col_stride),
        col_u(row_u + row_stride),
        folds(col_u + col_stride),
        tile_sums(folds + padded(4 * row_folds + col_folds)),
        row_parts(tile_sums + padded(row_tiles * col_tiles)),
        col_parts(row_parts + 3 * col_tiles * row_stride),
        total(col_parts + 3 * row_tiles * col_stride) {}
};

// The last tensor that starts at or before this block.
__device__ __forceinline__ int tensor_of(const Launch& launch, uint32_t block) {
  int low = 0, high = launch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (launch.first_block[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(optim::kWarp, x, mask);
  return x;
}

// Of a list in memory, by one warp; every lane has it.
__device__ __forceinline__ float list_sum(const float* list, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % 32; i < count; i += 32) sum += list[i];
  return warp_sum(sum);
}

// Over a block of threads; every thread has it. `room`: kWarps floats that nothing else uses.
__device__ __forceinline__ float block_sum(float x, float* room) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += room[warp];
  return sum;
}

// The squared gradients' scale, and what g is multiplied by for w' together with rsqrt(v_rows) and rsqrt(v_cols). By one warp.
struct Guess {
  float scale;  // s'
  float factor;

  __device__ __forceinline__ Guess(const Launch& launch, const Entry& t, const Layout& layout) {
    const float* folds = t.scratch + layout.folds;
    const float rows = static_cast<float>(t.rows), cols = static_cast<float>(t.cols);
    const float mean_v = list_sum(folds, layout.row_folds) / rows;
    const float row_ratio = list_sum(folds + layout.row_folds, layout.row_folds) / rows;
    const float mean_fresh = list_sum(folds + 2 * layout.row_folds, layout.row_folds) / rows;
    const float col_ratio = list_sum(folds + 4 * layout.row_folds, layout.col_folds) / cols;
    scale = came_guess(launch.constants, mean_v, mean_fresh, row_ratio, col_ratio);
    factor = sqrtf(mean_v) * scale * (launch.grad_scale ? *launch.grad_scale : 1.0f);
  }
};

// Stored first moments of kWidth neighbours. Without kVector their block may end among them.
template <bool kBytes, int kWidth, bool kVector, bool kPast = false>
struct Moments {
  using Stored = std::conditional_t<kBytes, uint8_t, float>;
  optim::Pack<Stored, kWidth> pack;
  float2 scale{}, next{};
  int rest;  // elements of the first block

  __device__ __forceinline__ void load(const Entry& t, int64_t at, int count) {
    pack = optim::load_pack<Stored, kWidth, kPast>(static_cast<const Stored*>(t.m) + at, count, kVector);
    if constexpr (kBytes) {
      const int64_t block = at / kCameBlock;
      if (count > 0) scale = t.m_scales[block];
      if constexpr (!kVector) {
        rest = static_cast<int>((block + 1) * kCameBlock - at);
        if (rest < min(count, kWidth)) next = t.m_scales[block + 1];
      }
    }
  }

  __device__ __forceinline__ float value(int i) const {
    if constexpr (!kBytes) return pack.value(i);
    const uint32_t code = __byte_perm(pack.words[i / 4], 0x4B000000u, 0x7650 + i % 4);
    const float2 mine = kVector || i < rest ? scale : next;
    return __fmaf_rn(bits_float(code) - 8388608.0f, mine.x, mine.y);
  }
};

void launch_sums(int kind, bool instabilities, uint32_t blocks, const Launch& launch, cudaStream_t stream);
void launch_folds(bool instabilities, uint32_t blocks, const Launch& launch, cudaStream_t stream);
void launch_step(int kind, uint32_t blocks, const Launch& launch, cudaStream_t stream);
void launch_vectors(int kind, bool step, uint32_t blocks, const Launch& launch, cudaStream_t stream);

// What a kind says; vectors have a bit of their own.
constexpr int kBf16Param = 1, kBf16Grad = 2, kByteMoments = 4, kAligned = 8, kNoMatrix = 16;

}  // namespace eightfold::came
