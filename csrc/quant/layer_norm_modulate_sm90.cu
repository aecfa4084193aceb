// LayerNorm and modulation row by row. A row waits in the registers of one warp, or of a few where it is long, so that the differences
// from its mean are squared without a second read; all of its loads are in flight at once. The sample's vectors come from the L1 cache,
// where the rows before have left them. Columns of codes are one tile cast more (tile_cast.cuh), whose source is the norm of a row.
#include "core/dependent_launch.cuh"
#include "quant/layer_norm_modulate.cuh"

namespace eightfold::quant {
namespace {

constexpr int kMostOctets = 9;      // of a thread: 2,240 columns in one warp
constexpr int kMostWarps = 4;       // of a row: 8,192 columns
constexpr int kRowsTogether = 4;    // rows of one warp share a block
constexpr int kOctetCols = 32 * 8;  // of one octet of every lane

// The sum over the threads of a row, the same bits in all of them: lanes as a tree, warps in order.
__device__ __forceinline__ float row_total(float v, int warps, float* partials) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = __fadd_rn(v, __shfl_xor_sync(kWholeWarp, v, mask));
  if (warps == 1) return v;
  if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = v;
  __syncthreads();
  v = partials[0];
  for (int w = 1; w < warps; ++w) v = __fadd_rn(v, partials[w]);
  return v;
}

// Thread t of a row's 32 * warps has octets t, t + 32 * warps, ...
template <class T, int kOctets, bool kVector, bool kBranch>
__global__ void __launch_bounds__(32 * kRowsTogether, sizeof(T) == 2 ? 4 : 2)
    layer_norm_modulate_kernel(const LayerNormModulate op, int warps) {
  static_assert(kMostWarps <= kRowsTogether);
  __shared__ float partials[2][kMostWarps];
  const int member = warps == 1 ? 0 : static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int64_t row = warps == 1 ? static_cast<int64_t>(blockIdx.x) * kRowsTogether + threadIdx.x / 32 : blockIdx.x;
  if (row >= op.rows()) return;
  const int64_t sample = row / op.tokens, at = row * op.cols;
  const int cols = static_cast<int>(op.cols);
  int col[kOctets], count[kOctets];

  Octet<T> x[kOctets];
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    col[k] = (k * warps + member) * kOctetCols + lane * 8;
    count[k] = col[k] < cols ? 8 : 0;
    x[k] = load_octet<kVector>(static_cast<const T*>(op.x) + at + col[k], count[k]);
  }
  if constexpr (kBranch) {
    Octet<T> branch[kOctets];
#pragma unroll
    for (int k = 0; k < kOctets; ++k) branch[k] = load_octet<kVector>(static_cast<const T*>(op.branch) + at + col[k], count[k]);
#pragma unroll
    for (int k = 0; k < kOctets; ++k) {
      if (count[k] == 0) continue;
      float gate[8], v[8];
      if (op.gate.data) load_vector<kVector>(op.gate, op.vector_dtype, sample, col[k], gate);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float b = branch[k].value(j);
        v[j] = __fadd_rn(x[k].value(j), op.gate.data ? __fmul_rn(gate[j], b) : b);
      }
      x[k].set(v);
      store_octet(static_cast<T*>(op.r) + at + col[k], x[k], 8, kVector);
    }
  }

  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kOctets; ++k)
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = __fadd_rn(sum, x[k].value(j));
  const float mean = __fdiv_rn(row_total(sum, warps, partials[0]), static_cast<float>(cols));
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    if (count[k] == 0) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float difference = __fsub_rn(x[k].value(j), mean);
      squares = __fmaf_rn(difference, difference, squares);
    }
  }
  const float variance = __fdiv_rn(row_total(squares, warps, partials[1]), static_cast<float>(cols));
  const float rstd = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(variance, op.eps)));
  if (op.mean && member == 0 && lane == 0) op.mean[row] = mean, op.rstd[row] = rstd;

#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    Octet<T> y{};
    if (count[k] > 0) {
      float one_scale[8], shift[8];
      load_one_plus<kVector>(op.scale, op.vector_dtype, sample, col[k], one_scale);
      load_vector<kVector>(op.shift, op.vector_dtype, sample, col[k], shift);
      y = modulate_octet(unpacked_anew(x[k]), mean, rstd, one_scale, shift);
      if (op.y) store_octet(static_cast<T*>(op.y) + at + col[k], y, 8, kVector);
    }
    if (op.y_rows.codes) cast_row_octet(y, op.y_rows, row, col[k], op.cols, count[k], true);
  }
}

template <class T>
struct Modulated {
  using Element = T;
  int64_t rows, cols;
  bool vector;
  const T* x;
  const float *mean, *rstd;
  SampleVectors scale, shift;
  DType vector_dtype;
  int64_t tokens;

  template <bool kVector, bool kFull>
  __device__ __forceinline__ Octet<T> load(int64_t row, int64_t col) const {
    if (!kFull && (row >= rows || col >= cols)) return {};
    const int64_t sample = row / tokens;
    const Octet<T> values = load_octet<kVector, true>(x + row * cols + col, 8);  // as the rows' kernel has left them
    float one_scale[8], to[8];
    load_one_plus<kVector>(scale, vector_dtype, sample, col, one_scale);
    load_vector<kVector>(shift, vector_dtype, sample, col, to);
    return modulate_octet(values, __ldcg(mean + row), __ldcg(rstd + row), one_scale, to);
  }
};

template <class T, bool kVector, bool kBranch>
void launch_rows(const LayerNormModulate& op, cudaStream_t stream) {
  const int warps = static_cast<int>((op.cols + kMostOctets * kOctetCols - 1) / (kMostOctets * kOctetCols));
  const int octets = static_cast<int>((op.cols + warps * kOctetCols - 1) / (warps * kOctetCols));
  const auto kernel = octets == 1   ? layer_norm_modulate_kernel<T, 1, kVector, kBranch>
                      : octets == 2 ? layer_norm_modulate_kernel<T, 2, kVector, kBranch>
                      : octets == 3 ? layer_norm_modulate_kernel<T, 3, kVector, kBranch>
                      : octets <= 5 ? layer_norm_modulate_kernel<T, 5, kVector, kBranch>
                                    : layer_norm_modulate_kernel<T, kMostOctets, kVector, kBranch>;
  const int64_t together = warps == 1 ? kRowsTogether : 1;
  launch_kernel(false, "layer_norm_modulate_kernel", kernel, (op.rows() + together - 1) / together, static_cast<int>(32 * warps * together),
                0, stream, op, warps);
}

template <class T>
void forward_typed(const LayerNormModulate& op, cudaStream_t stream) {
  const bool vector = aligned16(op.x) && aligned16(op.branch) && vectors_aligned(op.gate, op.vector_dtype) &&
                      vectors_aligned(op.scale, op.vector_dtype) && vectors_aligned(op.shift, op.vector_dtype);
  if (op.branch)
    vector ? launch_rows<T, true, true>(op, stream) : launch_rows<T, false, true>(op, stream);
  else
    vector ? launch_rows<T, true, false>(op, stream) : launch_rows<T, false, false>(op, stream);
  if (!op.y_cols.codes) return;
  const T* x = static_cast<const T*>(op.branch ? op.r : op.x);
  const Modulated<T> y{op.rows(), op.cols, vector, x, op.mean, op.rstd, op.scale, op.shift, op.vector_dtype, op.tokens};
  launch_tile_cast<sizeof(T) == 2 ? 4 : 2, kCols>(y, tile_output({}, op.y_cols), false, stream);
}

}  // namespace

void layer_norm_modulate_sm90(const LayerNormModulate& op, void* stream) {
  if (op.rows() == 0 || op.cols == 0) return;
  if (op.dtype == DType::bf16)
    forward_typed<__nv_bfloat16>(op, static_cast<cudaStream_t>(stream));
  else
    forward_typed<float>(op, static_cast<cudaStream_t>(stream));
}

}  // namespace eightfold::quant
