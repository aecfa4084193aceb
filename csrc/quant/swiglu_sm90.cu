#include "core/math.h"
#include "quant/row_cast.cuh"
#include "quant/swiglu.h"

namespace eightfold {
namespace {

using quant::aligned16;

// A block covers 8 rows x 512 columns: a warp a row, an octet a lane, so that the scales of a group leave as whole 32-byte sectors.
constexpr int kRows = 8;
constexpr int kSteps = 2;
constexpr int kBlockCols = 256 * kSteps;

template <class T, bool kVector>
__global__ void __launch_bounds__(32 * kRows) swiglu_kernel(const SwigluForward op) {
  const unsigned across = static_cast<unsigned>((op.cols + kBlockCols - 1) / kBlockCols);
  const int64_t row = static_cast<int64_t>(blockIdx.x / across) * kRows + threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x % across) * kBlockCols + threadIdx.x % 32 * 8;
  Octet<T> gate[kSteps], up[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int64_t col = first + i * 256, count = row < op.rows ? op.cols - col : 0;
    gate[i] = load_octet<kVector>(static_cast<const T*>(op.gate) + row * op.gate_ld + col, count);
    up[i] = load_octet<kVector>(static_cast<const T*>(op.up) + row * op.up_ld + col, count);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int64_t col = first + i * 256, count = row < op.rows ? op.cols - col : 0;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float g = gate[i].value(j);
      v[j] = __fmul_rn(__fmul_rn(g, sigmoid(g)), up[i].value(j));
    }
    Octet<T> h;
    h.set(v);
    quant::cast_row_octet(h, op.h, row, col, op.cols, count, kVector);
    if (op.gate_out.codes) {
      quant::cast_row_octet(gate[i], op.gate_out, row, col, op.cols, count, kVector);
      quant::cast_row_octet(up[i], op.up_out, row, col, op.cols, count, kVector);
    }
  }
}

template <class T>
void forward_typed(const SwigluForward& op, cudaStream_t stream) {
  constexpr int64_t kAlign = 16 / sizeof(T);
  const int64_t blocks = (op.rows + kRows - 1) / kRows * ((op.cols + kBlockCols - 1) / kBlockCols);
  const bool vector =
      op.cols % 8 == 0 && op.gate_ld % kAlign == 0 && op.up_ld % kAlign == 0 && aligned16(op.gate) && aligned16(op.up);
  if (vector)
    swiglu_kernel<T, true><<<static_cast<unsigned>(blocks), 32 * kRows, 0, stream>>>(op);
  else
    swiglu_kernel<T, false><<<static_cast<unsigned>(blocks), 32 * kRows, 0, stream>>>(op);
}

// dgate, dup and h of eight elements, for the tile kernel.
template <class T>
struct BackwardSource {
  using Element = T;
  static constexpr int kOutputs = 3;
  int64_t rows, cols;
  bool vector;
  const T* dh;
  int64_t dh_ld;
  RowCodesIn gate, up;

  template <bool kVector>
  __device__ __forceinline__ void load(int64_t row, int64_t col, Octet<T> (&out)[3]) const {
    const int64_t count = row < rows ? cols - col : 0;
    const Octet<T> d = load_octet<kVector>(dh + row * dh_ld + col, count);
    const uint2 gate_codes = load_codes8<kVector>(gate.codes + row * cols + col, count);
    const uint2 up_codes = load_codes8<kVector>(up.codes + row * cols + col, count);
    const int64_t group = col / kGroup;
    const float gate_scale = count > 0 ? __ldg(gate.scales + row + group * gate.scale_ld) : 0.0f;
    const float up_scale = count > 0 ? __ldg(up.scales + row + group * up.scale_ld) : 0.0f;
    float gates[8], ups[8], dgate[8], dup[8], h[8];
    decode4(gate_codes.x, gates), decode4(gate_codes.y, gates + 4);
    decode4(up_codes.x, ups), decode4(up_codes.y, ups + 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float g = __fmul_rn(gates[j], gate_scale), u = __fmul_rn(ups[j], up_scale), dv = d.value(j);
      const float s = sigmoid(g), silu = __fmul_rn(g, s);
      const float slope = __fmul_rn(s, fmaf(g, __fsub_rn(1.0f, s), 1.0f));
      dgate[j] = __fmul_rn(__fmul_rn(dv, u), slope);
      dup[j] = __fmul_rn(dv, silu);
      h[j] = __fmul_rn(silu, u);
    }
    out[0].set(dgate), out[1].set(dup), out[2].set(h);
  }
};

template <class T>
void backward_typed(const SwigluBackward& op, cudaStream_t stream) {
  const bool vector = op.cols % 8 == 0 && op.dh_ld % (16 / sizeof(T)) == 0 && aligned16(op.dh) && aligned16(op.gate.codes) &&
                      aligned16(op.up.codes);
  BackwardSource<T> source{op.rows, op.cols, vector, static_cast<const T*>(op.dh), op.dh_ld, op.gate, op.up};
  constexpr unsigned kBoth = quant::kRows128 | quant::kCols;
  quant::launch_tile_cast<1, kBoth, kBoth, quant::kCols>(
      source,
      {{quant::rows_and_columns(op.dgate_rows, op.dgate_cols), quant::rows_and_columns(op.dup_rows, op.dup_cols),
        quant::columns_only(op.h_cols)}},
      false, stream);
}

}  // namespace

void swiglu_quantize_sm90(const SwigluForward& op, void* stream) {
  if (op.rows == 0 || op.cols == 0) return;
  if (op.dtype == DType::bf16)
    forward_typed<__nv_bfloat16>(op, static_cast<cudaStream_t>(stream));
  else
    forward_typed<float>(op, static_cast<cudaStream_t>(stream));
}

void swiglu_backward_quantize_sm90(const SwigluBackward& op, void* stream) {
  if (op.dtype == DType::bf16)
    backward_typed<__nv_bfloat16>(op, static_cast<cudaStream_t>(stream));
  else
    backward_typed<float>(op, static_cast<cudaStream_t>(stream));
}

}  // namespace eightfold
