// The cast of a 128 x 128 tile with a rotation between its loads and its maxima. The loads of a tile are issued first, all of them;
// then each row takes its angles from the tables, which the second-level cache holds, and the octet that pairs with its own from
// another lane. A tile lies in one of the three gradients, a band of eight rows in one sequence.
//
// 64 registers hold the 32 words of values and little else. A condition that the compiler cannot decide stands before each row, and
// before each half of the sums, because it schedules within such a block only: over all rows at once it keeps unpacked values, and
// spills.
#include "core/memory.cuh"
#include "quant/row_cast.cuh"
#include "quant/row_sum.cuh"
#include "quant/tile_cast.cuh"
#include "rotary/rotary_backward.h"
#include "rotary/rotate.cuh"

namespace eightfold {
namespace {

using namespace quant;

constexpr int kBand = 8, kWarps = kTileThreads / 32;

template <class T>
struct Gradients {
  int64_t rows, cols;
  const T* data[3];
  int64_t batch_stride[3], token_stride[3], head_stride[3], first[3];
  const float *cos, *sin;
  uint32_t tokens, table_batch_stride;

  explicit Gradients(const RotaryBackward& op)
      : rows(op.rows()),
        cols(op.cols()),
        cos(op.cos),
        sin(op.sin),
        tokens(static_cast<uint32_t>(op.tokens)),
        table_batch_stride(static_cast<uint32_t>(op.table_batch_stride)) {
    for (int i = 0; i < 3; ++i) {
      const RotaryBackward::Gradient& g = op.parts[i];
      data[i] = static_cast<const T*>(g.data), first[i] = op.first(i);
      batch_stride[i] = g.batch_stride, token_stride[i] = g.token_stride, head_stride[i] = g.head_stride;
    }
  }
};

// `flip` turns the sign of what the other lane holds.
template <int kLanesAway, class T>
__device__ __forceinline__ Octet<T> rotate_back(const Octet<T>& x, const float* cos, const float* sin, uint32_t flip) {
  Octet<T> other, turned;
  float v[8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 c = __ldg(reinterpret_cast<const float4*>(cos) + half), s = __ldg(reinterpret_cast<const float4*>(sin) + half);
    constexpr int kWords = Octet<T>::kWords / 2;
#pragma unroll
    for (int w = half * kWords; w < (half + 1) * kWords; ++w) other.words[w] = __shfl_xor_sync(kWholeWarp, x.words[w], kLanesAway) ^ flip;
    const float cs[4] = {c.x, c.y, c.z, c.w}, ss[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) v[half * 4 + j] = rotated(x.value(half * 4 + j), other.value(half * 4 + j), cs[j], ss[j]);
  }
  turned.set(v);
  return unpacked_anew(turned);
}

// Sums of the tile's columns. They pass through the memory of the column codes, which are written two barriers later at the earliest.
template <class T>
__device__ __forceinline__ void sum_columns(const Octet<T> (&values)[kBand], float* partials, const TileShape& tile,
                                            TileShared<T, kBand>& shared) {
  const TileThread<kBand> me;
  float* by_warp = reinterpret_cast<float*>(shared.codes.slots);  // [kWarps][kTile]
#pragma unroll
  for (int four = 0; four < 2; ++four) {
    if (in_register(tile.rows > 0)) {
      float sums[4];
#pragma unroll
      for (int p = 0; p < kBand; ++p)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float x = values[p].value(four * 4 + j);
          sums[j] = p ? __fadd_rn(sums[j], x) : x;
        }
      split_sums<16, 2>(sums, me.lane);
      *reinterpret_cast<float2*>(by_warp + me.warp * kTile + me.octet * 8 + four * 4 + (me.lane >> 4) * 2) = make_float2(sums[0], sums[1]);
    }
  }
  __syncthreads();
  if (me.thread < kTile && tile.col + me.thread < tile.cols) {
    float sum = by_warp[me.thread];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum = __fadd_rn(sum, by_warp[w * kTile + me.thread]);
    partials[tile.row / kTile * tile.cols + tile.col + me.thread] = sum;
  }
}

// A band of rows exists wholly or not, an octet of columns too.
__device__ __forceinline__ bool octet_exists(const TileShape& tile) {
  const TileThread<kBand> me;
  return me.row(tile) < tile.rows && me.col(tile) < tile.cols;
}

template <int kDim, class T>
__device__ __forceinline__ void load_rotated(const Gradients<T>& from, const TileShape& tile, Octet<T> (&values)[kBand]) {
  constexpr int kHalf = kDim / 2;
  const TileThread<kBand> me;
  const T* data = from.data[0];
  int64_t batch_stride = from.batch_stride[0], token_stride = from.token_stride[0], head_stride = from.head_stride[0], first = 0;
#pragma unroll
  for (int i = 1; i < 3; ++i)
    if (tile.col >= from.first[i])
      data = from.data[i], batch_stride = from.batch_stride[i], token_stride = from.token_stride[i], head_stride = from.head_stride[i],
      first = from.first[i];

  const bool exists = octet_exists(tile);  // else the first element's place is read
  const uint32_t row = exists ? static_cast<uint32_t>(me.row(tile)) : 0, col = exists ? static_cast<uint32_t>(me.col(tile) - first) : 0;
  const uint32_t batch = row / from.tokens, token = row % from.tokens, within = me.octet * 8 % kDim;
  data += batch * batch_stride + token * token_stride + col / kDim * head_stride + col % kDim;
#pragma unroll
  for (int p = 0; p < kBand; ++p) values[p] = load_octet<true>(data + p * token_stride, 8);

  const bool rotated = tile.col < from.first[2];
  const uint32_t table = in_register(batch * from.table_batch_stride + token * kHalf + within % kHalf);
  const uint32_t flip = within >= kHalf ? (sizeof(T) == 2 ? 0x80008000u : 0x80000000u) : 0;
#pragma unroll
  for (int p = 0; p < kBand; ++p)
    if (in_register(rotated))
      values[p] = rotate_back<kHalf / 8>(values[p], from.cos + table + p * kHalf, from.sin + table + p * kHalf, flip);
}

template <int kMinBlocks, int kDim, bool kSums, class T>
__global__ void __launch_bounds__(kTileThreads, kMinBlocks) rotary_cast_kernel(const Gradients<T> from, TileOutput out, float* partials) {
  __shared__ __align__(16) TileShared<T, kBand> shared;
  Octet<T> values[kBand];
  load_rotated<kDim>(from, tile_of(from.rows, from.cols, blockIdx.x), values);
  // Found anew, for registers are short above; that blockIdx.y is 0 the compiler does not know. With sums it keeps nothing that spills.
  const TileShape tile = tile_of(from.rows, from.cols, blockIdx.x + (kSums ? 0 : blockIdx.y));
  if (!octet_exists(tile)) {
#pragma unroll
    for (int p = 0; p < kBand; ++p) values[p] = {};
  }
  if constexpr (kSums) sum_columns(values, partials, tile, shared);
  if (tile.full())
    cast_tile<kRows128 | kCols, true>(values, out, tile, shared, false);
  else
    cast_tile<kRows128 | kCols, false>(values, out, tile, shared, false);
}

// The tiles of a column in eight runs, a warp each.
constexpr int kFoldCols = 32;

__global__ void __launch_bounds__(kFoldCols* kSumRuns) fold_sums_kernel(const float* partials, int64_t tiles, int64_t cols, float* sums) {
  __shared__ float runs[kSumRuns][kFoldCols];
  const int lane = threadIdx.x % kFoldCols, run = threadIdx.x / kFoldCols;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kFoldCols + lane, each = (tiles + kSumRuns - 1) / kSumRuns;
  float sum = 0.0f;
  if (col < cols) {
    const int64_t end = min(tiles, (run + 1) * each);
#pragma unroll 8
    for (int64_t t = run * each; t < end; ++t) sum = __fadd_rn(sum, __ldg(partials + t * cols + col));
  }
  runs[run][lane] = sum;
  __syncthreads();
  if (run != 0 || col >= cols) return;
#pragma unroll
  for (int r = 1; r < kSumRuns; ++r) sum = __fadd_rn(sum, runs[r][lane]);
  sums[col] = sum;
}

void fold_sums(const float* partials, int64_t rows, int64_t cols, float* sums, cudaStream_t stream) {
  if (cols == 0) return;
  const unsigned blocks = static_cast<unsigned>((cols + kFoldCols - 1) / kFoldCols);
  fold_sums_kernel<<<blocks, kFoldCols * kSumRuns, 0, stream>>>(partials, (rows + kTile - 1) / kTile, cols, sums);
  check_launch("fold_sums_kernel");
}

// A thread a column of a tile, in the order of sum_columns.
template <class T>
__global__ void __launch_bounds__(kTile) column_sums_kernel(const Parts x, float* partials) {
  const TileShape tile = tile_of(x.rows, x.cols, blockIdx.x);
  const int64_t col = tile.col + threadIdx.x;
  if (col >= x.cols) return;
  const T* data = static_cast<const T*>(x.data[0]);
  int64_t ld = x.ld[0], first = 0;
#pragma unroll
  for (int i = 1; i < kMostParts; ++i)
    if (i < x.count && col >= x.first[i]) data = static_cast<const T*>(x.data[i]), ld = x.ld[i], first = x.first[i];
  data += col - first;
  auto band = [&](int64_t row) {
    float sum = row < x.rows ? static_cast<float>(data[row * ld]) : 0.0f;
#pragma unroll
    for (int p = 1; p < kBand; ++p) sum = __fadd_rn(sum, row + p < x.rows ? static_cast<float>(data[(row + p) * ld]) : 0.0f);
    return sum;
  };
  float sum = __fadd_rn(band(tile.row), band(tile.row + kBand));
  for (int b = 2; b < kTile / kBand; b += 2) sum = __fadd_rn(sum, __fadd_rn(band(tile.row + b * kBand), band(tile.row + (b + 1) * kBand)));
  partials[tile.row / kTile * x.cols + col] = sum;
}

unsigned tile_count(int64_t rows, int64_t cols) {
  return static_cast<unsigned>(((rows + kTile - 1) / kTile) * ((cols + kTile - 1) / kTile));
}

template <int kDim, bool kSums, class T>
void launch_rotary_cast(const RotaryBackward& op, cudaStream_t stream) {
  constexpr int kBlocks = sizeof(T) == 2 ? 4 : 2;
  const unsigned tiles = tile_count(op.rows(), op.cols());
  if (tiles == 0) return;
  rotary_cast_kernel<kBlocks, kDim, kSums, T>
      <<<tiles, kTileThreads, 0, stream>>>(Gradients<T>(op), tile_output(op.row_codes, op.col_codes), op.partials);
  check_launch("rotary_cast_kernel");
}

template <class T>
void typed(const RotaryBackward& op, cudaStream_t stream) {
  if (op.dim == 128)
    op.sums ? launch_rotary_cast<128, true, T>(op, stream) : launch_rotary_cast<128, false, T>(op, stream);
  else
    op.sums ? launch_rotary_cast<64, true, T>(op, stream) : launch_rotary_cast<64, false, T>(op, stream);
  if (op.sums) fold_sums(op.partials, op.rows(), op.cols(), op.sums, stream);
}

}  // namespace

bool rotary_backward_fits_sm90(const RotaryBackward& op) {
  const int64_t size = op.dtype == DType::bf16 ? 2 : 4;
  bool fits = (op.dim == 64 || op.dim == 128) && op.tokens % kBand == 0 && op.rows() * op.dim <= INT32_MAX && aligned16(op.cos) &&
              aligned16(op.sin) && op.col_codes.codes;
  for (const RotaryBackward::Gradient& g : op.parts)
    for (int64_t stride : {g.batch_stride, g.token_stride, g.head_stride}) fits = fits && aligned16(g.data) && stride * size % 16 == 0;
  return fits;
}

void rotary_backward_quantize_sm90(const RotaryBackward& op, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  op.dtype == DType::bf16 ? typed<__nv_bfloat16>(op, s) : typed<float>(op, s);
}

void column_sums_sm90(const Parts& x, float* sums, float* partials, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  const unsigned tiles = tile_count(x.rows, x.cols);
  if (tiles > 0) {
    if (x.dtype == DType::bf16)
      column_sums_kernel<__nv_bfloat16><<<tiles, kTile, 0, s>>>(x, partials);
    else
      column_sums_kernel<float><<<tiles, kTile, 0, s>>>(x, partials);
    check_launch("column_sums_kernel");
  }
  fold_sums(partials, x.rows, x.cols, sums, s);
}

}  // namespace eightfold
