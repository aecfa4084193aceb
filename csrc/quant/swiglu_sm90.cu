#include "core/barrier.cuh"
#include "core/dependent_launch.cuh"
#include "core/device.h"
#include "core/math.h"
#include "core/memory.cuh"
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
  begin_rows(op.rows);
  const unsigned across = static_cast<unsigned>((op.cols + kBlockCols - 1) / kBlockCols);
  const int64_t row = static_cast<int64_t>(blockIdx.x / across) * kRows + threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x % across) * kBlockCols + threadIdx.x % 32 * 8;
  Octet<T> gate[kSteps], up[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int64_t col = first + i * 256;
    const int count = octet_count(row, col, op.rows, op.cols);
    gate[i] = load_octet<kVector, true>(static_cast<const T*>(op.gate) + row * op.gate_ld + col, count);
    up[i] = load_octet<kVector, true>(static_cast<const T*>(op.up) + row * op.up_ld + col, count);
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
    if (op.y) store_octet(static_cast<T*>(op.y) + row * op.cols + col, h, count, kVector);
    if (op.h.codes) cast_row_octet(h, op.h, row, col, op.cols, count, kVector);
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
  const bool vector =
      op.cols % 8 == 0 && op.gate_ld % kAlign == 0 && op.up_ld % kAlign == 0 && aligned16(op.gate) && aligned16(op.up) && aligned16(op.y);
  const auto kernel = vector ? swiglu_kernel<T, true> : swiglu_kernel<T, false>;
  launch_kernel(op.rows <= kFewRows, "swiglu_kernel", kernel, blocks, 32 * kRows, 0, stream, op);
}

// Backward, a block a 128 x 128 tile. dgate, dup and h are made from one read; all three stay until the maxima of their columns are known:
// dgate in registers, dup and h in the slots of shared memory that dh and the codes came in. A slot is one thread's own: no barrier.
constexpr int kBand = 4;  // 512 threads a tile
constexpr int kThreads = tile_threads(kBand);
template <class T>
constexpr int kSharing = sizeof(T) == 2 ? 2 : 1;  // blocks on an SM

template <class T>
struct BackwardInputs {
  int64_t rows, cols;
  const T* dh;
  int64_t dh_ld;
  RowCodes gate, up;
};

struct BackwardOutputs {
  TileOutput dgate, dup, h;
  bool beside;  // row codes of dgate and dup are halves of one buffer
};

template <class T>
struct BackwardShared {
  static constexpr int kQuads = Octet<T>::kWords / 4;
  using Slots = uint4[kBand][kQuads][kThreads];
  Slots dh, codes;  // later h, dup
  ColumnCodes staged[sizeof(T) == 2 ? 2 : 3];
  Dividers rows[2], columns[3];
  float scales[2][kTile];  // of the codes' rows: gate, up; a half-warp's own

  // Of dgate, dup and h. Staged codes take their place.
  __device__ __forceinline__ ColumnMaxima<T, kBand>& maxima(int value) {
    static_assert(3 * sizeof(ColumnMaxima<T, kBand>) <= sizeof(staged) - sizeof(ColumnCodes));
    return reinterpret_cast<ColumnMaxima<T, kBand>*>(staged + 1)[value];
  }
};

template <class T>
__device__ __forceinline__ void put_octet(uint4 (&slots)[Octet<T>::kWords / 4][kThreads], const Octet<T>& x) {
#pragma unroll
  for (int q = 0; q < Octet<T>::kWords / 4; ++q)
    slots[q][threadIdx.x] = make_uint4(x.words[4 * q], x.words[4 * q + 1], x.words[4 * q + 2], x.words[4 * q + 3]);
}

template <class T>
__device__ __forceinline__ Octet<T> get_octet(const uint4 (&slots)[Octet<T>::kWords / 4][kThreads]) {
  Octet<T> x;
#pragma unroll
  for (int q = 0; q < Octet<T>::kWords / 4; ++q) {
    const uint4 quad = slots[q][threadIdx.x];
    x.words[4 * q] = quad.x, x.words[4 * q + 1] = quad.y, x.words[4 * q + 2] = quad.z, x.words[4 * q + 3] = quad.w;
  }
  return x;
}

// kFull: the tile exists whole and its memory is aligned; its inputs come asynchronously.
template <class T, bool kFull>
__device__ __forceinline__ void fetch_dh(const BackwardInputs<T>& in, const TileShape& tile, bool vector, BackwardShared<T>& shared) {
  const TileThread<kBand> me;
  const int64_t row = me.row(tile), col = me.col(tile);
  const T* at = in.dh + row * in.dh_ld + col;
#pragma unroll
  for (int p = 0; p < kBand; ++p, at += in.dh_ld) {
    if constexpr (kFull) {
#pragma unroll
      for (int q = 0; q < Octet<T>::kWords / 4; ++q)
        copy_async<16>(shared_address(&shared.dh[p][q][threadIdx.x]), reinterpret_cast<const uint4*>(at) + q);
    } else {
      const int count = octet_count(row + p, col, in.rows, in.cols);
      put_octet<T>(shared.dh[p], vector ? load_octet<true>(at, count) : load_octet<false>(at, count));
    }
  }
}

template <class T, bool kFull>
__device__ __forceinline__ void fetch_codes(const BackwardInputs<T>& in, const TileShape& tile, bool vector, BackwardShared<T>& shared) {
  const TileThread<kBand> me;
  const int64_t row = me.row(tile), col = me.col(tile), at = row * in.cols + col;
  const uint8_t *gate = in.gate.codes + at, *up = in.up.codes + at;
#pragma unroll
  for (int p = 0; p < kBand; ++p, gate += in.cols, up += in.cols) {
    uint4& slot = shared.codes[p][0][threadIdx.x];
    if constexpr (kFull) {
      copy_async<8>(shared_address(&slot.x), gate);
      copy_async<8>(shared_address(&slot.z), up);
    } else {
      const int count = octet_count(row + p, col, in.rows, in.cols);
      const uint2 g = vector ? load_codes8<true>(gate, count) : load_codes8<false>(gate, count);
      const uint2 u = vector ? load_codes8<true>(up, count) : load_codes8<false>(up, count);
      slot = make_uint4(g.x, g.y, u.x, u.y);
    }
  }
  if (me.octet < kBand / 2) {  // four scales by one lane
    const int value = me.octet / (kBand / 4), first = me.band * kBand + me.octet % (kBand / 4) * 4;
    const RowCodes& x = value ? in.up : in.gate;
    const float* from = x.scales + tile.row + first + tile.col / kTile * x.scale_ld;
    float* to = &shared.scales[value][first];
    if constexpr (kFull) {
      copy_async<16>(shared_address(to), from);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = tile.row + first + i < tile.rows ? __ldg(from + i) : 0.0f;
    }
  }
}

// dgate, dup and h of eight elements.
template <class T>
__device__ __forceinline__ void differentiate(const Octet<T>& dh, uint4 codes, float gate_scale, float up_scale, Octet<T>& dgate_out,
                                              Octet<T>& dup_out, Octet<T>& h_out) {
  float gates[8], ups[8], dgate[8], dup[8], h[8];
  decode4(codes.x, gates), decode4(codes.y, gates + 4);
  decode4(codes.z, ups), decode4(codes.w, ups + 4);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float g = __fmul_rn(gates[j], gate_scale), u = __fmul_rn(ups[j], up_scale), dv = dh.value(j);
    const float s = sigmoid(g), silu = __fmul_rn(g, s);
    const float slope = __fmaf_rn(silu, __fsub_rn(1.0f, s), s);
    dgate[j] = __fmul_rn(__fmul_rn(dv, u), slope);
    dup[j] = __fmul_rn(dv, silu);
    h[j] = __fmul_rn(silu, u);
  }
  dgate_out.set(dgate), dup_out.set(dup), h_out.set(h);
}

// Scales and dividers of the rows of dgate and dup, at once: two lanes a row.
template <class T, bool kFull>
__device__ __forceinline__ void divide_both_rows(uint32_t (&dgate)[kBand], uint32_t (&dup)[kBand], const BackwardOutputs& to,
                                                 const TileShape& tile, BackwardShared<T>& shared) {
  const TileThread<kBand> me;
  uint32_t both[8] = {dgate[0], dgate[1], dgate[2], dgate[3], dup[0], dup[1], dup[2], dup[3]};
  const float scale = scale_of_row<T>(both, me.lane, false);
  const int index = me.octet / 2, value = index / 4, row = me.band * kBand + index % 4;
  if (me.lane % 2 == 0) {
    const TileOutput& out = value ? to.dup : to.dgate;
    if (kFull || tile.row + row < tile.rows) out.scales[tile.row + row + tile.col / kTile * out.row_scale_ld] = scale;
    shared.rows[value].put(row, GroupDivider<T>::of(scale));
  }
}

// Of the inputs in shared memory.
template <class T, bool kFull>
__device__ __forceinline__ void backward_tile(const BackwardOutputs& to, const TileShape& tile, BackwardShared<T>& shared) {
  const TileThread<kBand> me;
  constexpr int kWords = 8 / Octet<T>::kPerWord;
  Octet<T> values[kBand];
  {
    uint32_t dup_columns[kWords], h_columns[kWords], dup_rows[kBand], dgate_rows[kBand];
    const float *gate_scales = &shared.scales[0][me.band * kBand], *up_scales = &shared.scales[1][me.band * kBand];
#pragma unroll
    for (int p = 0; p < kBand; ++p) {
      Octet<T> dup, h;
      differentiate(get_octet<T>(shared.dh[p]), shared.codes[p][0][threadIdx.x], gate_scales[p], up_scales[p], values[p], dup, h);
      put_octet<T>(shared.codes[p], dup);
      put_octet<T>(shared.dh[p], h);
      dup_rows[p] = octet_maximum(dup);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t d = Octet<T>::magnitude(dup.words[w]), v = Octet<T>::magnitude(h.words[w]);
        dup_columns[w] = p ? Octet<T>::larger(dup_columns[w], d) : d;
        h_columns[w] = p ? Octet<T>::larger(h_columns[w], v) : v;
      }
    }
    leave_maxima<T, kBand>(dup_columns, shared.maxima(1));
    leave_maxima<T, kBand>(h_columns, shared.maxima(2));
    uint32_t dgate_columns[kWords];
    octets_maxima(values, dgate_columns);
    leave_maxima<T, kBand>(dgate_columns, shared.maxima(0));
    row_maxima(values, dgate_rows);
    divide_both_rows<T, kFull>(dgate_rows, dup_rows, to, tile, shared);
  }
  __syncthreads();
  for (int value = me.thread / kTile; value < 3; value += kThreads / kTile)
    divide_column<kFull>(me.thread % kTile, shared.maxima(value), shared.columns[value],
                         value == 0   ? to.dgate
                         : value == 1 ? to.dup
                                      : to.h,
                         tile, false);
  __syncthreads();
  encode_tile<true, kFull>(values, to.dgate, tile, shared.rows[0], shared.columns[0], shared.staged[0]);
#pragma unroll
  for (int p = 0; p < kBand; ++p) values[p] = get_octet<T>(shared.codes[p]);
  __syncthreads();
  shared.staged[0].template store<kFull, kThreads>(to.dgate.col_codes, to.dgate.col_ld, tile, true);
  encode_tile<true, kFull>(values, to.dup, tile, shared.rows[1], shared.columns[1], shared.staged[1]);
#pragma unroll
  for (int p = 0; p < kBand; ++p) values[p] = get_octet<T>(shared.dh[p]);
  __syncthreads();
  shared.staged[1].template store<kFull, kThreads>(to.dup.col_codes, to.dup.col_ld, tile, true);
  encode_tile<false, kFull>(values, to.h, tile, shared.rows[0], shared.columns[2], shared.staged[0]);
  __syncthreads();
  shared.staged[0].template store<kFull, kThreads>(to.h.col_codes, to.h.col_ld, tile, true);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kSharing<T>)
    swiglu_backward_kernel(const BackwardInputs<T> in, const BackwardOutputs to, bool vector) {
  extern __shared__ __align__(16) unsigned char memory[];
  BackwardShared<T>& shared = *reinterpret_cast<BackwardShared<T>*>(memory);
  const TileShape tile = tile_of(in.rows, in.cols, blockIdx.x, to.beside);
  if (vector && tile.full()) {
    fetch_codes<T, true>(in, tile, vector, shared);
    fetch_dh<T, true>(in, tile, vector, shared);
    wait_for_copies();
    __syncwarp();  // scales come by other lanes
    backward_tile<T, true>(to, tile, shared);
  } else {
    fetch_codes<T, false>(in, tile, vector, shared);
    fetch_dh<T, false>(in, tile, vector, shared);
    __syncwarp();
    backward_tile<T, false>(to, tile, shared);
  }
}

template <class T>
void backward_typed(const SwigluBackward& op, cudaStream_t stream) {
  const bool vector = op.cols % 8 == 0 && op.dh_ld % (16 / sizeof(T)) == 0 && aligned16(op.dh) && aligned16(op.gate.codes) &&
                      aligned16(op.up.codes) && aligned16(op.gate.scales) && aligned16(op.up.scales) && op.gate.scale_ld % 4 == 0 &&
                      op.up.scale_ld % 4 == 0;
  const BackwardInputs<T> in{op.rows, op.cols, static_cast<const T*>(op.dh), op.dh_ld, op.gate, op.up};
  const BackwardOutputs to = {tile_output(op.dgate_rows, op.dgate_cols), tile_output(op.dup_rows, op.dup_cols), tile_output({}, op.h_cols),
                              op.beside};
  const int64_t tiles = (op.rows + kTile - 1) / kTile * ((op.cols + kTile - 1) / kTile);
  constexpr int kBytes = sizeof(BackwardShared<T>);
  allow_shared_memory<swiglu_backward_kernel<T>>(kBytes, current_device(), "swiglu_backward_quantize: reserving shared memory");
  swiglu_backward_kernel<T><<<static_cast<unsigned>(tiles), kThreads, kBytes, stream>>>(in, to, vector);
  check_launch("swiglu_backward_kernel");
}

}  // namespace

void swiglu_sm90(const SwigluForward& op, void* stream) {
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
