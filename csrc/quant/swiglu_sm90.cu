#include "core/math.h"
#include "quant/row_cast.cuh"
#include "quant/swiglu.h"

namespace eightfold::quant {
namespace {

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
    const int64_t col = first + i * 256;
    const int count = octet_count(row, col, op.rows, op.cols);
    gate[i] = load_octet<kVector>(static_cast<const T*>(op.gate) + row * op.gate_ld + col, count);
    up[i] = load_octet<kVector>(static_cast<const T*>(op.up) + row * op.up_ld + col, count);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int64_t col = first + i * 256;
    const int count = octet_count(row, col, op.rows, op.cols);
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float g = gate[i].value(j);
      v[j] = __fmul_rn(__fmul_rn(g, sigmoid(g)), up[i].value(j));
    }
    Octet<T> h;
    h.set(v);
    cast_row_octet(h, op.h, row, col, op.cols, count, kVector);
    if (op.gate_out.codes) {
      cast_row_octet(gate[i], op.gate_out, row, col, op.cols, count, kVector);
      cast_row_octet(up[i], op.up_out, row, col, op.cols, count, kVector);
    }
  }
}

template <class T>
void forward_typed(const SwigluForward& op, cudaStream_t stream) {
  constexpr int64_t kAlign = 16 / sizeof(T);
  const int64_t blocks = (op.rows + kRows - 1) / kRows * ((op.cols + kBlockCols - 1) / kBlockCols);
  const bool vector = op.cols % 8 == 0 && op.gate_ld % kAlign == 0 && op.up_ld % kAlign == 0 && aligned16(op.gate) && aligned16(op.up);
  if (vector)
    swiglu_kernel<T, true><<<static_cast<unsigned>(blocks), 32 * kRows, 0, stream>>>(op);
  else
    swiglu_kernel<T, false><<<static_cast<unsigned>(blocks), 32 * kRows, 0, stream>>>(op);
  check_launch("swiglu_kernel");
}

// dgate, dup and h of eight elements.
template <class T>
struct BackwardSource {
  int64_t rows, cols;
  const T* dh;
  int64_t dh_ld;
  RowCodes gate, up;

  template <bool kVector>
  __device__ __forceinline__ void load(int64_t row, int64_t col, Octet<T> (&out)[3]) const {
    const int count = octet_count(row, col, rows, cols);
    const Octet<T> d = load_octet<kVector>(dh + row * dh_ld + col, count);
    const uint2 gate_codes = load_codes8<kVector>(gate.codes + row * cols + col, count);
    const uint2 up_codes = load_codes8<kVector>(up.codes + row * cols + col, count);
    const int64_t group = col / kTile;
    const float gate_scale = count ? __ldg(gate.scales + row + group * gate.scale_ld) : 0.0f;
    const float up_scale = count ? __ldg(up.scales + row + group * up.scale_ld) : 0.0f;
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

// A value waits in shared memory while another is cast: three values of a tile would fill the registers of a whole SM. Each thread
// reads only what it wrote itself, so there is nothing to synchronise.
template <class T>
struct Parked {
  static constexpr int kQuads = Octet<T>::kWords / 4;
  uint4 quads[kBandRows][kQuads][kTileThreads];

  __device__ __forceinline__ void put(int p, const Octet<T>& x) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      quads[p][q][threadIdx.x] = make_uint4(x.words[4 * q], x.words[4 * q + 1], x.words[4 * q + 2], x.words[4 * q + 3]);
  }
  __device__ __forceinline__ void get(Octet<T> (&x)[kBandRows]) const {
#pragma unroll
    for (int p = 0; p < kBandRows; ++p)
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const uint4 quad = quads[p][q][threadIdx.x];
        x[p].words[4 * q] = quad.x, x[p].words[4 * q + 1] = quad.y, x[p].words[4 * q + 2] = quad.z, x[p].words[4 * q + 3] = quad.w;
      }
  }
};

template <class T>
struct BackwardShared {
  TileShared tile;
  Parked<T> dup, h;
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 ? 2 : 1)
    swiglu_backward_kernel(const BackwardSource<T> source, const TileOutputs<3> outputs) {
  extern __shared__ __align__(16) unsigned char memory[];
  BackwardShared<T>& shared = *reinterpret_cast<BackwardShared<T>*>(memory);
  const TileThread me;
  const uint32_t across = static_cast<uint32_t>((source.cols + kTile - 1) / kTile);
  const TileShape tile = {source.rows, source.cols, static_cast<int64_t>(blockIdx.x / across) * kTile,
                          static_cast<int64_t>(blockIdx.x % across) * kTile};
  Octet<T> values[kBandRows];
#pragma unroll
  for (int p = 0; p < kBandRows; ++p) {
    Octet<T> of_row[3];
    source.template load<kVector>(tile.row + me.band * kBandRows + p, tile.col + me.octet * 8, of_row);
    values[p] = of_row[0];
    shared.dup.put(p, of_row[1]);
    shared.h.put(p, of_row[2]);
  }
  cast_tile<kRows128 | kCols>(values, outputs.at[0], tile, shared.tile, false);
  shared.dup.get(values);
  cast_tile<kRows128 | kCols>(values, outputs.at[1], tile, shared.tile, false);
  shared.h.get(values);
  cast_tile<kCols>(values, outputs.at[2], tile, shared.tile, false);
}

template <class T>
void backward_typed(const SwigluBackward& op, cudaStream_t stream) {
  const bool vector =
      op.cols % 8 == 0 && op.dh_ld % (16 / sizeof(T)) == 0 && aligned16(op.dh) && aligned16(op.gate.codes) && aligned16(op.up.codes);
  const BackwardSource<T> source{op.rows, op.cols, static_cast<const T*>(op.dh), op.dh_ld, op.gate, op.up};
  const TileOutputs<3> outputs = {
      {tile_output(op.dgate_rows, op.dgate_cols), tile_output(op.dup_rows, op.dup_cols), tile_output({}, op.h_cols)}};
  const int64_t tiles = (op.rows + kTile - 1) / kTile * ((op.cols + kTile - 1) / kTile);
  constexpr int kBytes = sizeof(BackwardShared<T>);
  const auto kernel = vector ? swiglu_backward_kernel<T, true> : swiglu_backward_kernel<T, false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  kernel<<<static_cast<unsigned>(tiles), kTileThreads, kBytes, stream>>>(source, outputs);
  check_launch("swiglu_backward_kernel");
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
  if (op.rows == 0 || op.cols == 0) return;
  if (op.dtype == DType::bf16)
    backward_typed<__nv_bfloat16>(op, static_cast<cudaStream_t>(stream));
  else
    backward_typed<float>(op, static_cast<cudaStream_t>(stream));
}

}  // namespace eightfold::quant
