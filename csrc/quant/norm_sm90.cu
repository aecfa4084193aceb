#include <algorithm>

#include "quant/norm.h"
#include "quant/row_cast.cuh"

namespace eightfold::quant {
namespace {

constexpr int kMaxThreads = 512;

// blockDim.x threads share a row and hold kOctets octets of it each; blockDim.y rows share a block. Both follow from the number of
// columns alone, and with them the order of every sum along a row.
struct RowShape {
  int octets;  // a thread
  dim3 block;
};

RowShape row_shape(int64_t cols) {
  int64_t octets = (cols + 7) / 8;
  int each = octets <= 256 ? 1 : octets <= 1024 ? 2 : 4;
  unsigned threads = static_cast<unsigned>((std::max<int64_t>(octets, 1) + each - 1) / each + 31) / 32 * 32;
  return {each, dim3(threads, std::max(1u, 128u / threads))};
}
static_assert(kMaxNormCols <= 4 * 8 * kMaxThreads, "a row must fit the registers of one block");

// Sum over the threads of a row, the same bits in all of them. `partials` holds a float for each warp of the block and may be reused
// after the next barrier.
__device__ __forceinline__ float row_total(float v, float* partials) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(kWholeWarp, v, mask);
  const int warps = blockDim.x / 32;
  if (warps == 1) return v;
  float* mine = partials + threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = v;
  __syncthreads();
  float total = mine[0];
  for (int w = 1; w < warps; ++w) total += mine[w];
  return total;
}

// Everything that is row-wise, from one read. Rows run from the last to the first, so that the column kernel, which starts at the
// first, finds those in L2.
template <class T, int kOctets, bool kVector>
__global__ void __launch_bounds__(kMaxThreads, kOctets * sizeof(T) >= 8 ? 1 : 2) norm_rows_kernel(const RmsNorm op) {
  __shared__ float partials[kMaxThreads / 32];
  const int64_t row = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * blockDim.y + threadIdx.y;
  const bool weight_bf16 = op.weight_dtype == DType::bf16;
  int64_t col[kOctets];
  int count[kOctets];
  Octet<T> s[kOctets];

  // s = x (+ residual)
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    col[i] = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * 8;
    count[i] = octet_count(row, col[i], op.rows, op.cols);
    s[i] = load_octet<kVector>(static_cast<const T*>(op.x) + row * op.cols + col[i], count[i]);
  }
  if (op.residual) {
    Octet<T> residual[kOctets];
#pragma unroll
    for (int i = 0; i < kOctets; ++i)
      residual[i] = load_octet<kVector>(static_cast<const T*>(op.residual) + row * op.cols + col[i], count[i]);
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = __fadd_rn(s[i].value(j), residual[i].value(j));
      s[i].set(v);
      store_octet(static_cast<T*>(op.sum) + row * op.cols + col[i], s[i], count[i], kVector);
    }
  }

  // rstd
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kOctets; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = fmaf(s[i].value(j), s[i].value(j), squares);
  const float mean = __fdiv_rn(row_total(squares, partials), static_cast<float>(op.cols > 0 ? op.cols : 1));
  const float rstd = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, op.eps)));
  if (op.rstd && threadIdx.x == 0 && row < op.rows) op.rstd[row] = rstd;

  // codes of s, then y and its codes
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    if (op.x_rows.codes) cast_row_octet(s[i], op.x_rows, row, col[i], op.cols, count[i], kVector);
    float w[8], v[8];
    load_weights<kVector>(op.weight, weight_bf16, col[i], count[i], w);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = j < count[i] ? __fmul_rn(__fmul_rn(s[i].value(j), rstd), w[j]) : 0.0f;
    Octet<T> y;
    y.set(v);
    if (op.y) store_octet(static_cast<T*>(op.y) + row * op.cols + col[i], y, count[i], kVector);
    if (op.y_rows.codes) cast_row_octet(y, op.y_rows, row, col[i], op.cols, count[i], kVector);
  }
}

// y again, for the tile kernel.
template <class T>
struct NormSource {
  using Element = T;
  static constexpr int kOutputs = 1;
  int64_t rows, cols;
  bool vector;
  const T* s;
  const float* rstd;
  const void* weight;
  bool weight_bf16;

  template <bool kVector>
  __device__ __forceinline__ void load(int64_t row, int64_t col, Octet<T> (&out)[1]) const {
    const int count = octet_count(row, col, rows, cols);
    const Octet<T> x = load_octet<kVector>(s + row * cols + col, count);
    const float r = count ? __ldg(rstd + row) : 0.0f;
    float w[8], v[8];
    load_weights<kVector>(weight, weight_bf16, col, count, w);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = j < count ? __fmul_rn(__fmul_rn(x.value(j), r), w[j]) : 0.0f;
    out[0].set(v);
  }
};

template <class T>
void launch_columns(const RmsNorm& op, bool vector, cudaStream_t stream) {
  const void* s = op.residual ? op.sum : op.x;
  NormSource<T> source{op.rows, op.cols, vector, static_cast<const T*>(s), op.rstd, op.weight, op.weight_dtype == DType::bf16};
  launch_tile_cast<sizeof(T) == 2 ? 3 : 2, kCols>(source, {{tile_output({}, op.y_cols)}}, false, stream);
}

template <class T, bool kVector>
void launch_rows(const RmsNorm& op, cudaStream_t stream) {
  const RowShape shape = row_shape(op.cols);
  const unsigned blocks = static_cast<unsigned>((op.rows + shape.block.y - 1) / shape.block.y);
  if (shape.octets == 1)
    norm_rows_kernel<T, 1, kVector><<<blocks, shape.block, 0, stream>>>(op);
  else if (shape.octets == 2)
    norm_rows_kernel<T, 2, kVector><<<blocks, shape.block, 0, stream>>>(op);
  else
    norm_rows_kernel<T, 4, kVector><<<blocks, shape.block, 0, stream>>>(op);
  check_launch("norm_rows_kernel");
}

template <class T>
void rms_norm_typed(const RmsNorm& op, cudaStream_t stream) {
  const bool vector = op.cols % 8 == 0 && aligned16(op.x) && aligned16(op.residual) && aligned16(op.weight);
  if (vector)
    launch_rows<T, true>(op, stream);
  else
    launch_rows<T, false>(op, stream);
  if (op.y_cols.codes) launch_columns<T>(op, vector, stream);
}

}  // namespace

void rms_norm_sm90(const RmsNorm& op, void* stream) {
  if (op.rows == 0) return;
  if (op.dtype == DType::bf16)
    rms_norm_typed<__nv_bfloat16>(op, static_cast<cudaStream_t>(stream));
  else
    rms_norm_typed<float>(op, static_cast<cudaStream_t>(stream));
}

namespace {

// s as it was saved: itself, or its codes with the scale of their group.
template <class T>
struct SavedOctet {
  Octet<T> octet;
  __device__ float value(int j) const { return octet.value(j); }
  template <bool kVector>
  static __device__ __forceinline__ SavedOctet load(const RmsNormBackward& op, int64_t row, int64_t col, int count) {
    return {load_octet<kVector>(static_cast<const T*>(op.x) + row * op.cols + col, count)};
  }
};

template <>
struct SavedOctet<uint8_t> {
  uint2 codes;
  float scale;
  __device__ __forceinline__ float value(int j) const {
    const uint32_t word = j < 4 ? codes.x : codes.y;
    const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(word >> (j / 2 % 2 * 16)), __NV_E4M3);
    const float2 code = __half22float2(pair);
    return __fmul_rn(j % 2 ? code.y : code.x, scale);
  }
  template <bool kVector>
  static __device__ __forceinline__ SavedOctet load(const RmsNormBackward& op, int64_t row, int64_t col, int count) {
    if (count <= 0) return {make_uint2(0, 0), 0.0f};
    return {load_codes8<kVector>(op.x_codes.codes + row * op.cols + col, count),
            __ldg(op.x_codes.scales + row + col / kTile * op.x_codes.scale_ld)};
  }
};

// kBackwardRows rows a block, one after the other; each thread sums dy * xhat of its columns in registers.
template <class T, class X, int kOctets, bool kVector>
__global__ void __launch_bounds__(kMaxThreads) norm_backward_kernel(const RmsNormBackward op) {
  __shared__ float partials[2][kMaxThreads / 32];
  const bool weight_bf16 = op.weight_dtype == DType::bf16;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBackwardRows;
  const int rows = static_cast<int>(op.rows - first < kBackwardRows ? op.rows - first : kBackwardRows);
  float dweight[kOctets][8] = {};

  for (int r = 0; r < rows; ++r) {
    const int64_t row = first + r;
    const float rstd = __ldg(op.rstd + row);
    Octet<T> dy[kOctets], residual[kOctets];
    SavedOctet<X> s[kOctets];
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * 8;
      const int count = octet_count(row, col, op.rows, op.cols);
      dy[i] = load_octet<kVector>(static_cast<const T*>(op.dy) + row * op.cols + col, count);
      s[i] = SavedOctet<X>::template load<kVector>(op, row, col, count);
      residual[i] = load_octet<kVector>(static_cast<const T*>(op.residual_grad) + row * op.cols + col, op.residual_grad ? count : 0);
    }

    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * 8;
      float w[8];
      load_weights<kVector>(op.weight, weight_bf16, col, octet_count(0, col, 1, op.cols), w);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float xhat = __fmul_rn(s[i].value(j), rstd);
        dweight[i][j] = fmaf(dy[i].value(j), xhat, dweight[i][j]);
        dot = fmaf(__fmul_rn(dy[i].value(j), w[j]), xhat, dot);
      }
    }
    const float mean = __fdiv_rn(row_total(dot, partials[r & 1]), static_cast<float>(op.cols));

#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * 8;
      float w[8], v[8];
      load_weights<kVector>(op.weight, weight_bf16, col, octet_count(0, col, 1, op.cols), w);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float xhat = __fmul_rn(s[i].value(j), rstd), g = __fmul_rn(dy[i].value(j), w[j]);
        v[j] = __fmul_rn(rstd, fmaf(-xhat, mean, g));
        if (op.residual_grad) v[j] = __fadd_rn(v[j], residual[i].value(j));
      }
      Octet<T> dx;
      dx.set(v);
      store_octet(static_cast<T*>(op.dx) + row * op.cols + col, dx, octet_count(0, col, 1, op.cols), kVector);
    }
  }

#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * 8;
    Octet<float> sums;
    sums.set(dweight[i]);
    store_octet(op.partials + static_cast<int64_t>(blockIdx.x) * op.cols + col, sums, octet_count(0, col, 1, op.cols), kVector);
  }
}

// dweight: each of 32 slices sums its share of the partials in order, then the slices are summed in order.
constexpr int kSlices = 32;

__global__ void __launch_bounds__(32 * kSlices) fold_dweight_kernel(const float* partials, int64_t blocks, int64_t cols, float* dweight) {
  __shared__ float sums[kSlices][32];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const int64_t share = (blocks + kSlices - 1) / kSlices;
  const int64_t begin = threadIdx.y * share, end = begin + share < blocks ? begin + share : blocks;
  float sum = 0.0f;
  if (col < cols) {
#pragma unroll 8
    for (int64_t b = begin; b < end; ++b) sum += __ldg(partials + b * cols + col);
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || col >= cols) return;
#pragma unroll
  for (int s = 1; s < kSlices; ++s) sum += sums[s][threadIdx.x];
  dweight[col] = sum;
}

template <class T, class X, bool kVector>
void launch_backward(const RmsNormBackward& op, unsigned blocks, cudaStream_t stream) {
  const RowShape shape = row_shape(op.cols);
  const unsigned threads = shape.block.x;
  if (shape.octets == 1)
    norm_backward_kernel<T, X, 1, kVector><<<blocks, threads, 0, stream>>>(op);
  else if (shape.octets == 2)
    norm_backward_kernel<T, X, 2, kVector><<<blocks, threads, 0, stream>>>(op);
  else
    norm_backward_kernel<T, X, 4, kVector><<<blocks, threads, 0, stream>>>(op);
  check_launch("norm_backward_kernel");
}

template <class T, class X>
void backward_typed(const RmsNormBackward& op, unsigned blocks, cudaStream_t stream) {
  const bool vector = op.cols % 8 == 0 && aligned16(op.dy) && aligned16(op.x) && aligned16(op.x_codes.codes) && aligned16(op.weight) &&
                      aligned16(op.residual_grad);
  if (vector)
    launch_backward<T, X, true>(op, blocks, stream);
  else
    launch_backward<T, X, false>(op, blocks, stream);
}

}  // namespace

void rms_norm_backward_sm90(const RmsNormBackward& op, void* stream_pointer) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  if (op.cols == 0) return;
  const int64_t blocks = (op.rows + kBackwardRows - 1) / kBackwardRows;
  if (blocks > 0) {
    const unsigned grid = static_cast<unsigned>(blocks);
    if (op.dtype == DType::bf16)
      op.x ? backward_typed<__nv_bfloat16, __nv_bfloat16>(op, grid, stream) : backward_typed<__nv_bfloat16, uint8_t>(op, grid, stream);
    else
      op.x ? backward_typed<float, float>(op, grid, stream) : backward_typed<float, uint8_t>(op, grid, stream);
  }
  fold_dweight_kernel<<<static_cast<unsigned>((op.cols + 31) / 32), dim3(32, kSlices), 0, stream>>>(op.partials, blocks, op.cols,
                                                                                                    op.dweight);
  check_launch("fold_dweight_kernel");
}

}  // namespace eightfold::quant
