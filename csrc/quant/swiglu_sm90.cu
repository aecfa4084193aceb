#include "core/device.h"
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

  struct Loaded {
    Octet<T> dh;
    uint2 gate, up;
    float gate_scale, up_scale;
  };

  template <bool kVector>
  __device__ __forceinline__ Loaded load(int64_t row, int64_t col, int count) const {
    const int64_t at = row * cols + col, group = col / kTile;
    return {load_octet<kVector>(dh + row * dh_ld + col, count), load_codes8<kVector>(gate.codes + at, count),
            load_codes8<kVector>(up.codes + at, count), count > 0 ? __ldg(gate.scales + row + group * gate.scale_ld) : 0.0f,
            count > 0 ? __ldg(up.scales + row + group * up.scale_ld) : 0.0f};
  }

  static __device__ __forceinline__ void differentiate(const Loaded& x, Octet<T>& dgate_out, Octet<T>& dup_out, Octet<T>& h_out) {
    float gates[8], ups[8], dgate[8], dup[8], h[8];
    decode4(x.gate.x, gates), decode4(x.gate.y, gates + 4);
    decode4(x.up.x, ups), decode4(x.up.y, ups + 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float g = __fmul_rn(gates[j], x.gate_scale), u = __fmul_rn(ups[j], x.up_scale), dv = x.dh.value(j);
      const float s = sigmoid(g), silu = __fmul_rn(g, s);
      const float slope = __fmul_rn(s, fmaf(g, __fsub_rn(1.0f, s), 1.0f));
      dgate[j] = __fmul_rn(__fmul_rn(dv, u), slope);
      dup[j] = __fmul_rn(dv, silu);
      h[j] = __fmul_rn(silu, u);
    }
    dgate_out.set(dgate), dup_out.set(dup), h_out.set(h);
  }
};

constexpr int kBand = 4;  // 512 threads a tile: three values of it would fill the registers of 256
template <class T>
constexpr int kSharing = sizeof(T) == 2 ? 2 : 1;  // blocks on an SM

// Values wait in shared memory while another is cast. Each thread reads only what it wrote itself, so there is nothing to synchronise.
template <class T>
struct Parked {
  static constexpr int kQuads = Octet<T>::kWords / 4;
  uint4 quads[kBand][kQuads][tile_threads(kBand)];

  __device__ __forceinline__ void put(int p, const Octet<T>& x) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      quads[p][q][threadIdx.x] = make_uint4(x.words[4 * q], x.words[4 * q + 1], x.words[4 * q + 2], x.words[4 * q + 3]);
  }
  __device__ __forceinline__ void get(Octet<T> (&x)[kBand]) const {
#pragma unroll
    for (int p = 0; p < kBand; ++p)
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const uint4 quad = quads[p][q][threadIdx.x];
        x[p].words[4 * q] = quad.x, x[p].words[4 * q + 1] = quad.y, x[p].words[4 * q + 2] = quad.z, x[p].words[4 * q + 3] = quad.w;
      }
  }
};

template <class T>
struct BackwardShared {
  TileShared<kBand> tile;
  Parked<T> dup, h;
};

struct BackwardOutputs {
  TileOutput dgate, dup, h;
};

template <class T, bool kFull, unsigned kWrites>
__device__ __forceinline__ void backward_tile(const BackwardSource<T>& source, const BackwardOutputs& to, const TileShape& tile,
                                              bool vector, BackwardShared<T>& shared) {
  const TileThread<kBand> me;
  typename BackwardSource<T>::Loaded loaded[kBand];
#pragma unroll
  for (int p = 0; p < kBand; ++p) {
    const int64_t row = me.row(tile) + p, col = me.col(tile);
    const int count = kFull ? 8 : octet_count(row, col, source.rows, source.cols);
    loaded[p] = kFull || vector ? source.template load<true>(row, col, count) : source.template load<false>(row, col, count);
  }
  Octet<T> values[kBand];
#pragma unroll
  for (int p = 0; p < kBand; ++p) {
    Octet<T> dup, h;
    source.differentiate(loaded[p], values[p], dup, h);
    shared.dup.put(p, dup);
    shared.h.put(p, h);
  }
  cast_tile<kWrites, kFull>(values, to.dgate, tile, shared.tile.stats, shared.tile.codes, false);
  shared.dup.get(values);
  cast_tile<kWrites, kFull>(values, to.dup, tile, shared.tile.stats, shared.tile.codes, false);
  shared.h.get(values);
  cast_tile<kCols, kFull>(values, to.h, tile, shared.tile.stats, shared.tile.codes, false);
}

template <class T, unsigned kWrites>
__global__ void __launch_bounds__(tile_threads(kBand), kSharing<T>)
    swiglu_backward_kernel(const BackwardSource<T> source, const BackwardOutputs to, bool vector) {
  extern __shared__ __align__(16) unsigned char memory[];
  BackwardShared<T>& shared = *reinterpret_cast<BackwardShared<T>*>(memory);
  const TileShape tile = tile_of(source.rows, source.cols, blockIdx.x);
  if (vector && tile.full())
    backward_tile<T, true, kWrites>(source, to, tile, vector, shared);
  else
    backward_tile<T, false, kWrites>(source, to, tile, vector, shared);
}

template <class T, unsigned kWrites>
void backward_typed(const SwigluBackward& op, cudaStream_t stream) {
  const bool vector =
      op.cols % 8 == 0 && op.dh_ld % (16 / sizeof(T)) == 0 && aligned16(op.dh) && aligned16(op.gate.codes) && aligned16(op.up.codes);
  const BackwardSource<T> source{op.rows, op.cols, static_cast<const T*>(op.dh), op.dh_ld, op.gate, op.up};
  const BackwardOutputs to = {tile_output(op.dgate_rows, op.dgate_cols), tile_output(op.dup_rows, op.dup_cols), tile_output({}, op.h_cols)};
  const int64_t tiles = (op.rows + kTile - 1) / kTile * ((op.cols + kTile - 1) / kTile);
  constexpr int kBytes = sizeof(BackwardShared<T>);
  allow_shared_memory<swiglu_backward_kernel<T, kWrites>>(kBytes, current_device(), "swiglu_backward_quantize: reserving shared memory");
  swiglu_backward_kernel<T, kWrites><<<static_cast<unsigned>(tiles), tile_threads(kBand), kBytes, stream>>>(source, to, vector);
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
  constexpr unsigned kApart = kRows128 | kCols, kBeside = kApart | kHalfRows;
  const auto s = static_cast<cudaStream_t>(stream);
  if (op.dtype == DType::bf16)
    op.beside ? backward_typed<__nv_bfloat16, kBeside>(op, s) : backward_typed<__nv_bfloat16, kApart>(op, s);
  else
    op.beside ? backward_typed<float, kBeside>(op, s) : backward_typed<float, kApart>(op, s);
}

}  // namespace eightfold::quant
