// The one kernel shape of every FP8 cast: a CTA takes a 128 x 128 tile, reads its source once, keeps the values in registers
// in the tensor's dtype, and writes any of: row codes (1 x 128 or 1 x 16 groups), column codes (128 x 1), square codes
// (128 x 128), each with its scales. Casts fused with a norm or an activation have a Source, or a kernel, of their own.
//
// Thread layout: the 16 lanes of a half-warp span the 128 columns (8 each); half-warp `band` owns kBand consecutive rows, 8 with
// 256 threads, 4 with 512. So one load of a half-warp is 256 bytes of one bf16 row, row statistics never leave a half-warp, and a
// thread's block holds kBand consecutive bytes of each of its 8 columns. Column codes pass through shared memory, in slots of 8
// rows placed by XOR so that neither side has bank conflicts, and leave as 16-byte pieces of 128-byte lines.
//
// Tiles that exist whole (kFull) run without a test; the others, at the edges and where memory is not aligned, beside them in the
// same kernel.
//
// A Source is a struct with
//   using Element = float or __nv_bfloat16;        dtype in which values are held and (for fused casts) rounded
//   int64_t rows, cols;
//   bool vector;                                   every row it reads starts at a multiple of its vector loads
//   template <bool kVector> __device__ Octet<Element> load(int64_t row, int64_t col) const;
// load gives eight consecutive elements of `row`, zeros beyond rows or cols. kVector promises that all eight columns exist
// and that `vector` holds; rows may still be past the end.
#pragma once

#include <cstdint>

#include "core/fp8_vector.cuh"
#include "core/launch.cuh"

namespace eightfold::quant {

constexpr int kTile = 128;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Threads of a tile whose half-warps own `band` rows each.
constexpr int tile_threads(int band) { return kTile / band * 16; }
constexpr int kTileThreads = tile_threads(8);

// What is written for one value of the Source; or them together.
// kHalfRows: row codes are one half of a buffer twice as wide.
enum : unsigned { kRows128 = 1, kRows16 = 2, kCols = 4, kSquare = 8, kSquareTurned = 16, kHalfRows = 32 };

// Codes: rows and square [rows, cols] dense, row-major; columns, and a square's transpose, [cols][col_ld]. Scales: scale[r + group *
// row_scale_ld] for rows, col_scales[row_group * col_scale_ld + c] for columns, row-major [tiles, tiles] for square blocks (of the
// transpose if turned).
struct TileOutput {
  uint8_t* codes;
  float* scales;
  int64_t row_scale_ld;  // multiple of 4
  uint8_t* col_codes;
  int64_t col_ld;  // multiple of 16
  float* col_scales;
  int64_t col_scale_ld;
};

struct TileShape {
  int64_t rows, cols;  // of the tensor
  int64_t row, col;    // where the tile starts

  // The whole tile exists and rows of codes start at a multiple of 8.
  __device__ bool full() const { return row + kTile <= rows && col + kTile <= cols && cols % 8 == 0; }
};

// The tile of `block` in a grid of one block a tile.
__device__ __forceinline__ TileShape tile_of(int64_t rows, int64_t cols, uint32_t block) {
  const uint32_t across = static_cast<uint32_t>((cols + kTile - 1) / kTile);
  return {rows, cols, static_cast<int64_t>(block / across) * kTile, static_cast<int64_t>(block % across) * kTile};
}

// A block is one or more teams of tile_threads(kBand), each with a tile of its own.
template <int kBand>
struct TileThread {
  static constexpr int kThreads = tile_threads(kBand), kWarps = kThreads / 32;
  int thread = threadIdx.x % kThreads;
  int lane = threadIdx.x & 31, warp = thread >> 5;
  int octet = lane & 15;
  int band = warp * 2 + (lane >> 4);

  __device__ int64_t row(const TileShape& tile) const { return tile.row + band * kBand; }  // the first
  __device__ int64_t col(const TileShape& tile) const { return tile.col + octet * 8; }
};

// A tile's codes by column. A slot holds 8 rows; slots are placed by XOR of the column octet, so that neither half-warps walking
// octets nor pieces of 16 rows meet in a bank.
struct ColumnCodes {
  uint2 slots[kTile * kTile / 8];

  __device__ uint2& at(int column, int eight) { return slots[column * 16 + (eight ^ (column >> 3))]; }
  __device__ uint2 get(int column, int band) { return at(column, band); }
  __device__ void put(int column, int band, uint2 codes) { at(column, band) = codes; }
  __device__ void put(int column, int band, uint32_t codes) { reinterpret_cast<uint32_t*>(&at(column, band >> 1))[band & 1] = codes; }

  // Slots 2 * rows16 and 2 * rows16 + 1 lie side by side, in this order only for even octets.
  __device__ uint4* piece(int column, int rows16) {
    return reinterpret_cast<uint4*>(&slots[column * 16 + ((rows16 ^ (column >> 4)) << 1)]);
  }
  static __device__ uint4 ordered(uint4 v, int column) { return column >> 3 & 1 ? make_uint4(v.z, v.w, v.x, v.y) : v; }

  // Pieces of 16 rows of a column between shared and global memory, where codes[c * ld + r]. `vector`: 16-byte aligned columns.
  // kFull: and the whole tile exists.
  template <bool kFull, int kThreads>
  __device__ __forceinline__ void store(uint8_t* codes, int64_t ld, const TileShape& tile, bool vector) {
    const int thread = threadIdx.x % kThreads, rows16 = thread & 7;
    const int64_t row = tile.row + rows16 * 16;
    uint8_t* to = codes + (tile.col + (thread >> 3)) * ld + row;
#pragma unroll
    for (int i = 0; i < kTile * kTile / 16 / kThreads; ++i, to += kThreads / 8 * ld) {
      const int column = i * (kThreads / 8) + (thread >> 3);
      if (!kFull && (tile.col + column >= tile.cols || row >= tile.rows)) continue;
      const uint4 v = ordered(*piece(column, rows16), column);
      if (kFull || (vector && row + 16 <= tile.rows)) {
        *reinterpret_cast<uint4*>(to) = v;
      } else {
        const int count = static_cast<int>(min(tile.rows - row, int64_t{16}));
        store_codes8(to, make_uint2(v.x, v.y), count, false);
        store_codes8(to + 8, make_uint2(v.z, v.w), count - 8, false);
      }
    }
  }

  template <int kThreads>
  __device__ __forceinline__ void load(const uint8_t* codes, int64_t ld, const TileShape& tile, bool vector) {
#pragma unroll
    for (int i = 0; i < kTile * kTile / 16 / kThreads; ++i) {
      const int index = i * kThreads + threadIdx.x, column = index >> 3, rows16 = index & 7;
      const int64_t row = tile.row + rows16 * 16;
      if (tile.col + column >= tile.cols || row >= tile.rows) continue;
      const uint8_t* from = codes + (tile.col + column) * ld + row;
      uint4 v;
      if (vector && row + 16 <= tile.rows) {
        v = __ldg(reinterpret_cast<const uint4*>(from));
      } else {
        const int count = static_cast<int>(min(tile.rows - row, int64_t{16}));
        const uint2 low = load_codes8<false>(from, count), high = load_codes8<false>(from + 8, count - 8);
        v = make_uint4(low.x, low.y, high.x, high.y);
      }
      *piece(column, rows16) = ordered(v, column);
    }
  }
};

template <int kBand>
struct TileStats {
  uint32_t amax[TileThread<kBand>::kWarps][kTile];
  float inverse[kTile], aid[kTile];  // the columns' dividers
};

template <int kBand>
struct TileShared {
  TileStats<kBand> stats;
  ColumnCodes codes;
};

// One step of a transposing reduction: lanes that differ in bit `kMask` split the rows they both hold, so that eight rows over
// sixteen lanes take 8 shuffles and each lane ends with rows of its own.
template <int kMask, int kKeep, int kBand>
__device__ __forceinline__ void fold_rows(uint32_t (&amax)[kBand], int lane) {
  bool upper = lane & kMask;
#pragma unroll
  for (int i = 0; i < kKeep; ++i) {
    uint32_t mine = upper ? amax[i + kKeep] : amax[i];
    uint32_t theirs = upper ? amax[i] : amax[i + kKeep];
    amax[i] = max(mine, __shfl_xor_sync(kWholeWarp, theirs, kMask));
  }
}

// Where a thread's octets of row codes go. kFull: all of them exist and may be stored whole.
template <bool kFull, int kBand, bool kHalf = false>
struct RowWriter {
  uint8_t* at;
  int64_t ld;
  int rows, count;  // that exist, of this thread's rows and of its eight columns
  bool vector;

  __device__ __forceinline__ RowWriter(uint8_t* codes, const TileShape& tile, const TileThread<kBand>& me) {
    const int64_t row = me.row(tile), col = me.col(tile);
    ld = kHalf ? 2 * tile.cols : tile.cols, at = codes + row * ld + col;
    rows = static_cast<int>(min(tile.rows - row, int64_t{kBand})), count = octet_count(0, col, 1, tile.cols);
    vector = tile.cols % 8 == 0;
  }
  __device__ __forceinline__ void put(int p, uint2 codes) const {
    if (kFull)
      *reinterpret_cast<uint2*>(at + p * ld) = codes;
    else if (p < rows)
      store_codes8(at + p * ld, codes, count, vector);
  }
};

// 1 x 128 groups: 16 / kBand lanes end with one row, compute its scale, and hand it to the half-warp.
template <bool kFull, bool kHalf, int kBand, class T>
__device__ __forceinline__ void cast_rows_128(const Octet<T> (&values)[kBand], const TileOutput& out, const TileShape& tile,
                                              bool power_of_two) {
  const TileThread<kBand> me;
  constexpr int kLanes = 16 / kBand;  // to a row
  uint32_t amax[kBand];
#pragma unroll
  for (int p = 0; p < kBand; ++p) amax[p] = octet_amax(values[p]);
  if constexpr (kBand == 8) {
    fold_rows<8, 4>(amax, me.lane);
    fold_rows<4, 2>(amax, me.lane);
    fold_rows<2, 1>(amax, me.lane);
  } else {
    fold_rows<8, 2>(amax, me.lane);
    fold_rows<4, 1>(amax, me.lane);
    amax[0] = max(amax[0], __shfl_xor_sync(kWholeWarp, amax[0], 2));
  }
  amax[0] = max(amax[0], __shfl_xor_sync(kWholeWarp, amax[0], 1));

  const float scale = group_scale(__uint_as_float(amax[0]), power_of_two);
  const GroupDivider<T> own = GroupDivider<T>::of(scale);
  const int64_t own_row = me.row(tile) + me.octet / kLanes;
  if (me.lane % kLanes == 0 && (kFull || own_row < tile.rows)) out.scales[own_row + tile.col / kTile * out.row_scale_ld] = scale;

  const RowWriter<kFull, kBand, kHalf> writer(out.codes, tile, me);
#pragma unroll
  for (int p = 0; p < kBand; ++p) {
    const int owner = (me.lane & 16) | (p * kLanes);
    const GroupDivider<T> by = {__shfl_sync(kWholeWarp, own.inverse, owner), __shfl_sync(kWholeWarp, own.aid, owner)};
    writer.put(p, encode_octet(unpacked_anew(values[p]), by));
  }
}

// 1 x 16 groups: two lanes share a group and split its eight rows, four scales each.
template <bool kFull, class T>
__device__ __forceinline__ void cast_rows_16(const Octet<T> (&values)[8], const TileOutput& out, const TileShape& tile, bool power_of_two) {
  const TileThread<8> me;
  uint32_t amax[8];
#pragma unroll
  for (int p = 0; p < 8; ++p) amax[p] = octet_amax(values[p]);
  fold_rows<1, 4>(amax, me.lane);
  float own[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) own[i] = group_scale(__uint_as_float(amax[i]), power_of_two);

  const bool upper = me.lane & 1;
  const int64_t own_row = me.row(tile) + (upper ? 4 : 0);
  if (kFull || tile.col + (me.octet & ~1) * 8 < tile.cols) {  // the group exists
    float* scales = out.scales + own_row + (tile.col / 16 + me.octet / 2) * out.row_scale_ld;
    if (kFull || own_row + 4 <= tile.rows) {
      *reinterpret_cast<float4*>(scales) = make_float4(own[0], own[1], own[2], own[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (own_row + i < tile.rows) scales[i] = own[i];
    }
  }
  const RowWriter<kFull, 8> writer(out.codes, tile, me);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float other = __shfl_xor_sync(kWholeWarp, own[i], 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int p = half * 4 + i;
      writer.put(p, encode_octet(unpacked_anew(values[p]), GroupDivider<T>::of(upper == (half == 1) ? own[i] : other)));
    }
  }
}

// First half of the 128 x 1 cast: each warp leaves the maxima of its rows.
template <int kBand, class T>
__device__ __forceinline__ void fold_columns(const Octet<T> (&values)[kBand], TileStats<kBand>& stats) {
  const TileThread<kBand> me;
  uint32_t amax[8];
  octets_amax(values, amax);
  uint4* at = reinterpret_cast<uint4*>(&stats.amax[me.warp][me.octet * 8]);
  if (me.lane < 16)
    at[0] = make_uint4(amax[0], amax[1], amax[2], amax[3]);
  else
    at[1] = make_uint4(amax[4], amax[5], amax[6], amax[7]);
}

// Second half: scales of the 128 columns, codes through shared memory.
template <bool kFull, int kBand, class T>
__device__ __forceinline__ void cast_columns(const Octet<T> (&values)[kBand], const TileOutput& out, const TileShape& tile,
                                             TileStats<kBand>& stats, ColumnCodes& staged, bool power_of_two) {
  const TileThread<kBand> me;
  __syncthreads();
  if (me.thread < kTile) {
    uint32_t amax = stats.amax[0][me.thread];
#pragma unroll
    for (int w = 1; w < me.kWarps; ++w) amax = max(amax, stats.amax[w][me.thread]);
    const float scale = group_scale(__uint_as_float(amax), power_of_two);
    const GroupDivider<T> own = GroupDivider<T>::of(scale);
    stats.inverse[me.thread] = own.inverse;
    stats.aid[me.thread] = own.aid;
    const int64_t col = tile.col + me.thread;
    if (kFull || col < tile.cols) out.col_scales[tile.row / kTile * out.col_scale_ld + col] = scale;
  }
  __syncthreads();
  Octet<T> x[kBand];
#pragma unroll
  for (int p = 0; p < kBand; ++p) x[p] = unpacked_anew(values[p]);
#pragma unroll
  for (int quad = 0; quad < 2; ++quad) {
    const int first = me.octet * 8 + quad * 4;
    const float4 inverse = *reinterpret_cast<const float4*>(&stats.inverse[first]);
    const float4 aid = *reinterpret_cast<const float4*>(&stats.aid[first]);
    const GroupDivider<T> by[4] = {{inverse.x, aid.x}, {inverse.y, aid.y}, {inverse.z, aid.z}, {inverse.w, aid.w}};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float q[kBand];
#pragma unroll
      for (int p = 0; p < kBand; ++p) q[p] = by[j].quotient(x[p].value(quad * 4 + j));
      if constexpr (kBand == 8) {
        const uint2 codes = make_uint2(encode4(q[0], q[1], q[2], q[3]), encode4(q[4], q[5], q[6], q[7]));
        staged.put(first + j, me.band, codes);
      } else {
        staged.put(first + j, me.band, encode4(q[0], q[1], q[2], q[3]));
      }
    }
  }
  __syncthreads();
  staged.template store<kFull, me.kThreads>(out.col_codes, out.col_ld, tile, true);
}

// The scale of the whole tile.
template <int kBand, class T>
__device__ __forceinline__ float square_scale(const Octet<T> (&values)[kBand], TileStats<kBand>& stats, bool power_of_two) {
  const TileThread<kBand> me;
  uint32_t amax = 0;
#pragma unroll
  for (int p = 0; p < kBand; ++p) amax = max(amax, octet_amax(values[p]));
  amax = __reduce_max_sync(kWholeWarp, amax);
  if (me.lane == 0) stats.amax[0][me.warp] = amax;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < me.kWarps; ++w) amax = max(amax, stats.amax[0][w]);
  return group_scale(__uint_as_float(amax), power_of_two);
}

template <bool kFull, int kBand, class T>
__device__ __forceinline__ void cast_square(const Octet<T> (&values)[kBand], const TileOutput& out, const TileShape& tile,
                                            TileStats<kBand>& stats, bool power_of_two) {
  const TileThread<kBand> me;
  const float scale = square_scale(values, stats, power_of_two);
  const GroupDivider<T> by = GroupDivider<T>::of(scale);
  if (me.thread == 0) out.scales[tile.row / kTile * ((tile.cols + kTile - 1) / kTile) + tile.col / kTile] = scale;

  const RowWriter<kFull, kBand> writer(out.codes, tile, me);
#pragma unroll
  for (int p = 0; p < kBand; ++p) writer.put(p, encode_octet(unpacked_anew(values[p]), by));
}

// The codes of the transpose: through shared memory, as column codes go.
template <bool kFull, class T>
__device__ __forceinline__ void cast_square_turned(const Octet<T> (&values)[8], const TileOutput& out, const TileShape& tile,
                                                   TileStats<8>& stats, ColumnCodes& staged, bool power_of_two) {
  const TileThread<8> me;
  const float scale = square_scale(values, stats, power_of_two);
  const GroupDivider<T> by = GroupDivider<T>::of(scale);
  if (me.thread == 0) out.scales[tile.col / kTile * ((tile.rows + kTile - 1) / kTile) + tile.row / kTile] = scale;
  Octet<T> x[8];
#pragma unroll
  for (int p = 0; p < 8; ++p) x[p] = unpacked_anew(values[p]);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float q[8];
#pragma unroll
    for (int p = 0; p < 8; ++p) q[p] = by.quotient(x[p].value(j));
    staged.put(me.octet * 8 + j, me.band, make_uint2(encode4(q[0], q[1], q[2], q[3]), encode4(q[4], q[5], q[6], q[7])));
  }
  __syncthreads();
  staged.template store<kFull, me.kThreads>(out.col_codes, out.col_ld, tile, true);
}

// Every output of one value. All threads of the CTA take part; `staged` is written once all have their values. Calls may follow each
// other without a barrier: each barrier inside separates the last reads of the call before from the first writes of this one.
template <unsigned kWrites, bool kFull, int kBand, class T>
__device__ __forceinline__ void cast_tile(const Octet<T> (&values)[kBand], const TileOutput& out, const TileShape& tile,
                                          TileStats<kBand>& stats, ColumnCodes& staged, bool power_of_two) {
  static_assert(!(kWrites & (kSquare | kSquareTurned)) || kWrites == kSquare || kWrites == kSquareTurned, "square blocks are cast alone");
  if constexpr (kWrites & kCols) fold_columns(values, stats);
  if constexpr (kWrites & kRows128) cast_rows_128<kFull, (kWrites & kHalfRows) != 0>(values, out, tile, power_of_two);
  if constexpr (kWrites & kRows16) cast_rows_16<kFull>(values, out, tile, power_of_two);
  if constexpr (kWrites & kCols) cast_columns<kFull>(values, out, tile, stats, staged, power_of_two);
  if constexpr (kWrites & kSquare) cast_square<kFull>(values, out, tile, stats, power_of_two);
  if constexpr (kWrites & kSquareTurned) cast_square_turned<kFull>(values, out, tile, stats, staged, power_of_two);
}

template <unsigned kWrites, bool kFull, int kBand, class Source>
__device__ __forceinline__ void cast_source(const Source& source, const TileOutput& out, const TileShape& tile, TileShared<kBand>& shared,
                                            bool power_of_two) {
  const TileThread<kBand> me;
  Octet<typename Source::Element> values[kBand];
  const bool vector = kFull || (source.vector && tile.col + kTile <= tile.cols);
#pragma unroll
  for (int p = 0; p < kBand; ++p)
    values[p] =
        vector ? source.template load<true>(me.row(tile) + p, me.col(tile)) : source.template load<false>(me.row(tile) + p, me.col(tile));
  cast_tile<kWrites, kFull>(values, out, tile, shared.stats, shared.codes, power_of_two);
}

// Registers: values are 32 (bf16) or 64 (fp32) words a thread in bands of 8; kMinBlocks CTAs share an SM.
template <int kMinBlocks, int kBand, unsigned kWrites, class Source>
__global__ void __launch_bounds__(tile_threads(kBand), kMinBlocks) tile_cast_kernel(Source source, TileOutput out, bool power_of_two) {
  __shared__ __align__(16) TileShared<kBand> shared;
  const TileShape tile = tile_of(source.rows, source.cols, blockIdx.x);
  if (source.vector && tile.full())
    cast_source<kWrites, true>(source, out, tile, shared, power_of_two);
  else
    cast_source<kWrites, false>(source, out, tile, shared, power_of_two);
}

// Launches over the whole tensor; nothing to do for an empty one.
template <int kMinBlocks, unsigned kWrites, int kBand = 8, class Source>
void launch_tile_cast(const Source& source, const TileOutput& out, bool power_of_two, cudaStream_t stream) {
  const int64_t tiles = ((source.rows + kTile - 1) / kTile) * ((source.cols + kTile - 1) / kTile);
  if (tiles == 0) return;
  tile_cast_kernel<kMinBlocks, kBand, kWrites><<<static_cast<unsigned>(tiles), tile_threads(kBand), 0, stream>>>(source, out, power_of_two);
  check_launch("tile_cast_kernel");
}

}  // namespace eightfold::quant
