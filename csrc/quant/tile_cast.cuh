// The one kernel shape of every FP8 cast: a CTA takes a 128 x 128 tile, reads its source once, keeps the values in registers
// in the tensor's dtype, and writes any of: row codes (1 x 128 or 1 x 16 groups), column codes (128 x 1), square codes
// (128 x 128), each with its scales. Casts fused with a norm or an activation supply a Source of their own.
//
// Thread layout, 256 threads: the 16 lanes of a half-warp span the 128 columns (8 each); half-warp `band` 0..15 owns the 8
// consecutive rows 8*band.. . So one load of a half-warp is 256 bytes of one bf16 row, row statistics never leave a half-warp,
// and a thread's 8 x 8 block holds 8 consecutive bytes of each of its 8 columns. Column codes pass through shared memory, in
// slots of 8 bytes placed by XOR so that neither side has bank conflicts, and leave as 16-byte pieces of 128-byte lines.
//
// A Source is a struct with
//   using Element = float or __nv_bfloat16;        dtype in which values are held and (for fused casts) rounded
//   static constexpr int kOutputs;                 values an element gives, each cast on its own
//   int64_t rows, cols;
//   bool vector;                                   every row it reads starts at a multiple of its vector loads
//   template <bool kVector> __device__ void load(int64_t row, int64_t col, Octet<Element> (&out)[kOutputs]) const;
// load gives eight consecutive elements of `row`, zeros beyond rows or cols. kVector promises that all eight columns exist
// and that `vector` holds; rows may still be past the end.
#pragma once

#include <cstdint>
#include <utility>

#include "core/fp8_vector.cuh"
#include "core/launch.cuh"

namespace eightfold::quant {

constexpr int kTile = 128;
constexpr int kTileThreads = 256;
constexpr int kBandRows = 8;

// What is written for one value of the Source; or them together.
enum : unsigned { kRows128 = 1, kRows16 = 2, kCols = 4, kSquare = 8 };

// Codes: rows and square [rows, cols] dense, row-major; columns [cols][col_ld]. Scales: scale[r + group * row_scale_ld] for
// rows, col_scales[row_group * col_scale_ld + c] for columns, row-major [tiles, tiles] for square blocks.
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
};

// A tile's codes by column. A slot holds the 8 rows of one band; slots are placed by XOR of the column octet, so that neither
// half-warps walking octets nor pieces of 16 rows meet in a bank.
struct ColumnCodes {
  uint2 slots[kTile * kTile / 8];

  __device__ uint2& at(int column, int band) { return slots[column * 16 + (band ^ (column >> 3))]; }
  __device__ void put(int column, int band, uint2 codes) { at(column, band) = codes; }
  __device__ uint2 get(int column, int band) { return at(column, band); }

  // Bands 2 * rows16 and 2 * rows16 + 1 lie side by side, in this order only for even octets.
  __device__ uint4* piece(int column, int rows16) {
    return reinterpret_cast<uint4*>(&slots[column * 16 + ((rows16 ^ (column >> 4)) << 1)]);
  }
  static __device__ uint4 ordered(uint4 v, int column) { return column >> 3 & 1 ? make_uint4(v.z, v.w, v.x, v.y) : v; }

  // Pieces of 16 rows of a column between shared and global memory, where codes[c * ld + r]. `vector`: 16-byte aligned columns.
  __device__ __forceinline__ void store(uint8_t* codes, int64_t ld, const TileShape& tile, bool vector) {
#pragma unroll
    for (int i = 0; i < kTile * kTile / 16 / kTileThreads; ++i) {
      const int index = i * kTileThreads + threadIdx.x, column = index >> 3, rows16 = index & 7;
      const int64_t row = tile.row + rows16 * 16;
      if (tile.col + column >= tile.cols || row >= tile.rows) continue;
      const uint4 v = ordered(*piece(column, rows16), column);
      uint8_t* to = codes + (tile.col + column) * ld + row;
      if (vector && row + 16 <= tile.rows) {
        *reinterpret_cast<uint4*>(to) = v;
      } else {
        const int count = static_cast<int>(min(tile.rows - row, int64_t{16}));
        store_codes8(to, make_uint2(v.x, v.y), count, false);
        store_codes8(to + 8, make_uint2(v.z, v.w), count - 8, false);
      }
    }
  }

  __device__ __forceinline__ void load(const uint8_t* codes, int64_t ld, const TileShape& tile, bool vector) {
#pragma unroll
    for (int i = 0; i < kTile * kTile / 16 / kTileThreads; ++i) {
      const int index = i * kTileThreads + threadIdx.x, column = index >> 3, rows16 = index & 7;
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

struct TileShared {
  uint32_t amax[kTileThreads / 32][kTile];
  float scale[kTile], inverse[kTile];
  ColumnCodes codes;
};

struct TileThread {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int octet = lane & 15;
  int band = warp * 2 + (lane >> 4);
};

constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// One step of a transposing reduction: lanes that differ in bit `kMask` split the rows they both hold, so that eight rows over
// sixteen lanes take 8 shuffles and each lane ends with rows of its own.
template <int kMask, int kKeep>
__device__ __forceinline__ void fold_rows(uint32_t (&amax)[kBandRows], int lane) {
  bool upper = lane & kMask;
#pragma unroll
  for (int i = 0; i < kKeep; ++i) {
    uint32_t mine = upper ? amax[i + kKeep] : amax[i];
    uint32_t theirs = upper ? amax[i] : amax[i + kKeep];
    amax[i] = max(mine, __shfl_xor_sync(kWholeWarp, theirs, kMask));
  }
}

template <class T>
__device__ __forceinline__ uint32_t octet_amax(const Octet<T>& x) {
  uint32_t word = Octet<T>::magnitude(x.words[0]);
#pragma unroll
  for (int w = 1; w < Octet<T>::kWords; ++w) word = Octet<T>::larger(word, Octet<T>::magnitude(x.words[w]));
  return Octet<T>::widest_bits(word);
}

// 1 x 128 groups: lane pairs end with one row each, compute its scale, and hand it to the half-warp.
template <class T>
__device__ __forceinline__ void cast_rows_128(const Octet<T> (&values)[kBandRows], const TileOutput& out, const TileShape& tile,
                                              bool power_of_two) {
  TileThread me;
  uint32_t amax[kBandRows];
#pragma unroll
  for (int p = 0; p < kBandRows; ++p) amax[p] = octet_amax(values[p]);
  fold_rows<8, 4>(amax, me.lane);
  fold_rows<4, 2>(amax, me.lane);
  fold_rows<2, 1>(amax, me.lane);
  amax[0] = max(amax[0], __shfl_xor_sync(kWholeWarp, amax[0], 1));

  GroupDivider own = GroupDivider::of(group_scale(__uint_as_float(amax[0]), power_of_two));
  const int64_t first_row = tile.row + me.band * kBandRows, col = tile.col + me.octet * 8;
  const int64_t own_row = first_row + (me.lane >> 1 & 7);
  if (me.lane % 2 == 0 && own_row < tile.rows) out.scales[own_row + tile.col / kTile * out.row_scale_ld] = own.scale;

  const bool vector = tile.cols % 8 == 0;
  const int count = octet_count(0, col, 1, tile.cols);
#pragma unroll
  for (int p = 0; p < kBandRows; ++p) {
    int owner = (me.lane & 16) | (p << 1);
    GroupDivider by = {__shfl_sync(kWholeWarp, own.scale, owner), __shfl_sync(kWholeWarp, own.inverse, owner)};
    if (first_row + p < tile.rows) store_codes8(out.codes + (first_row + p) * tile.cols + col, encode_octet(values[p], by), count, vector);
  }
}

// 1 x 16 groups: two lanes share a group and split its eight rows, four scales each.
template <class T>
__device__ __forceinline__ void cast_rows_16(const Octet<T> (&values)[kBandRows], const TileOutput& out, const TileShape& tile,
                                             bool power_of_two) {
  TileThread me;
  uint32_t amax[kBandRows];
#pragma unroll
  for (int p = 0; p < kBandRows; ++p) amax[p] = octet_amax(values[p]);
  fold_rows<1, 4>(amax, me.lane);
  float own[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) own[i] = group_scale(__uint_as_float(amax[i]), power_of_two);

  const bool upper = me.lane & 1, vector = tile.cols % 8 == 0;
  const int64_t first_row = tile.row + me.band * kBandRows, col = tile.col + me.octet * 8;
  const int count = octet_count(0, col, 1, tile.cols);
  const int64_t own_row = first_row + (upper ? 4 : 0);
  if (tile.col + (me.octet & ~1) * 8 < tile.cols) {  // the group exists
    float* scales = out.scales + own_row + (tile.col / 16 + me.octet / 2) * out.row_scale_ld;
    if (own_row + 4 <= tile.rows) {
      *reinterpret_cast<float4*>(scales) = make_float4(own[0], own[1], own[2], own[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (own_row + i < tile.rows) scales[i] = own[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float other = __shfl_xor_sync(kWholeWarp, own[i], 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int p = half * 4 + i;
      uint2 codes = encode_octet(values[p], GroupDivider::of(upper == (half == 1) ? own[i] : other));
      if (first_row + p < tile.rows) store_codes8(out.codes + (first_row + p) * tile.cols + col, codes, count, vector);
    }
  }
}

// First half of the 128 x 1 cast: each warp leaves the maxima of its 16 rows in shared.amax.
template <class T>
__device__ __forceinline__ void fold_columns(const Octet<T> (&values)[kBandRows], TileShared& shared) {
  TileThread me;
  uint32_t words[Octet<T>::kWords];
#pragma unroll
  for (int w = 0; w < Octet<T>::kWords; ++w) {
    words[w] = Octet<T>::magnitude(values[0].words[w]);
#pragma unroll
    for (int p = 1; p < kBandRows; ++p) words[w] = Octet<T>::larger(words[w], Octet<T>::magnitude(values[p].words[w]));
    words[w] = Octet<T>::larger(words[w], __shfl_xor_sync(kWholeWarp, words[w], 16));
  }
  uint32_t amax[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) amax[j] = Octet<T>::amax_bits(words[j / Octet<T>::kPerWord], j % Octet<T>::kPerWord);
  uint4* at = reinterpret_cast<uint4*>(&shared.amax[me.warp][me.octet * 8]);
  if (me.lane < 16)
    at[0] = make_uint4(amax[0], amax[1], amax[2], amax[3]);
  else
    at[1] = make_uint4(amax[4], amax[5], amax[6], amax[7]);
}

// Second half: scales of the 128 columns, codes through shared memory.
template <class T>
__device__ __forceinline__ void cast_columns(const Octet<T> (&values)[kBandRows], const TileOutput& out, const TileShape& tile,
                                             TileShared& shared, bool power_of_two) {
  TileThread me;
  __syncthreads();
  if (threadIdx.x < kTile) {
    uint32_t amax = shared.amax[0][threadIdx.x];
#pragma unroll
    for (int w = 1; w < kTileThreads / 32; ++w) amax = max(amax, shared.amax[w][threadIdx.x]);
    GroupDivider own = GroupDivider::of(group_scale(__uint_as_float(amax), power_of_two));
    shared.scale[threadIdx.x] = own.scale;
    shared.inverse[threadIdx.x] = own.inverse;
    const int64_t col = tile.col + threadIdx.x;
    if (col < tile.cols) out.col_scales[tile.row / kTile * out.col_scale_ld + col] = own.scale;
  }
  __syncthreads();
#pragma unroll
  for (int quad = 0; quad < 2; ++quad) {
    const int first = me.octet * 8 + quad * 4;
    const float4 scales = *reinterpret_cast<const float4*>(&shared.scale[first]);
    const float4 inverses = *reinterpret_cast<const float4*>(&shared.inverse[first]);
    const GroupDivider by[4] = {{scales.x, inverses.x}, {scales.y, inverses.y}, {scales.z, inverses.z}, {scales.w, inverses.w}};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float q[kBandRows];
#pragma unroll
      for (int p = 0; p < kBandRows; ++p) q[p] = by[j].quotient(values[p].value(quad * 4 + j));
      uint2 codes = make_uint2(encode4(q[0], q[1], q[2], q[3]), encode4(q[4], q[5], q[6], q[7]));
      shared.codes.put(first + j, me.band, by[j].is_nan() ? make_uint2(kE4M3NaN4, kE4M3NaN4) : codes);
    }
  }
  __syncthreads();
  shared.codes.store(out.col_codes, out.col_ld, tile, true);
}

template <class T>
__device__ __forceinline__ void cast_square(const Octet<T> (&values)[kBandRows], const TileOutput& out, const TileShape& tile,
                                            TileShared& shared, bool power_of_two) {
  TileThread me;
  uint32_t amax = 0;
#pragma unroll
  for (int p = 0; p < kBandRows; ++p) amax = max(amax, octet_amax(values[p]));
  amax = __reduce_max_sync(kWholeWarp, amax);
  if (me.lane == 0) shared.amax[0][me.warp] = amax;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kTileThreads / 32; ++w) amax = max(amax, shared.amax[0][w]);
  GroupDivider by = GroupDivider::of(group_scale(__uint_as_float(amax), power_of_two));
  if (threadIdx.x == 0) out.scales[tile.row / kTile * ((tile.cols + kTile - 1) / kTile) + tile.col / kTile] = by.scale;

  const bool vector = tile.cols % 8 == 0;
  const int64_t first_row = tile.row + me.band * kBandRows, col = tile.col + me.octet * 8;
  const int count = octet_count(0, col, 1, tile.cols);
#pragma unroll
  for (int p = 0; p < kBandRows; ++p)
    if (first_row + p < tile.rows) store_codes8(out.codes + (first_row + p) * tile.cols + col, encode_octet(values[p], by), count, vector);
}

// Every output of one value. All threads of the CTA take part. Calls may follow each other without a barrier: each barrier
// inside separates the last reads of the call before from the first writes of this one.
template <unsigned kWrites, class T>
__device__ __forceinline__ void cast_tile(const Octet<T> (&values)[kBandRows], const TileOutput& out, const TileShape& tile,
                                          TileShared& shared, bool power_of_two) {
  static_assert(!(kWrites & kSquare) || kWrites == kSquare, "square blocks are cast alone");
  if constexpr (kWrites & kCols) fold_columns(values, shared);
  if constexpr (kWrites & kRows128) cast_rows_128(values, out, tile, power_of_two);
  if constexpr (kWrites & kRows16) cast_rows_16(values, out, tile, power_of_two);
  if constexpr (kWrites & kCols) cast_columns(values, out, tile, shared, power_of_two);
  if constexpr (kWrites & kSquare) cast_square(values, out, tile, shared, power_of_two);
}

template <int kOutputs>
struct TileOutputs {
  TileOutput at[kOutputs];
};

template <class Source, unsigned... kWrites>
struct TileCast {
  static constexpr int kOutputs = Source::kOutputs;
  static_assert(sizeof...(kWrites) == kOutputs, "one set of outputs for each value of the source");
  using T = typename Source::Element;

  template <bool kVector>
  static __device__ __forceinline__ void load(const Source& source, const TileShape& tile, Octet<T> (&values)[kOutputs][kBandRows]) {
    TileThread me;
#pragma unroll
    for (int p = 0; p < kBandRows; ++p) {
      Octet<T> row[kOutputs];
      source.template load<kVector>(tile.row + me.band * kBandRows + p, tile.col + me.octet * 8, row);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) values[o][p] = row[o];
    }
  }

  template <size_t... kIndex>
  static __device__ __forceinline__ void run(const Source& source, const TileOutputs<kOutputs>& outputs, bool power_of_two,
                                             TileShared& shared, std::index_sequence<kIndex...>) {
    const uint32_t tiles_across = static_cast<uint32_t>((source.cols + kTile - 1) / kTile);
    const TileShape tile = {source.rows, source.cols, static_cast<int64_t>(blockIdx.x / tiles_across) * kTile,
                            static_cast<int64_t>(blockIdx.x % tiles_across) * kTile};
    Octet<T> values[kOutputs][kBandRows];
    if (source.vector && tile.col + kTile <= tile.cols)
      load<true>(source, tile, values);
    else
      load<false>(source, tile, values);
    (cast_tile<kWrites>(values[kIndex], outputs.at[kIndex], tile, shared, power_of_two), ...);
  }
};

// Registers: values are 32 (bf16) or 64 (fp32) words a thread for each output; kMinBlocks CTAs share an SM.
template <int kMinBlocks, class Source, unsigned... kWrites>
__global__ void __launch_bounds__(kTileThreads, kMinBlocks)
    tile_cast_kernel(Source source, TileOutputs<Source::kOutputs> outputs, bool power_of_two) {
  __shared__ __align__(16) TileShared shared;
  TileCast<Source, kWrites...>::run(source, outputs, power_of_two, shared, std::make_index_sequence<Source::kOutputs>{});
}

// Launches over the whole tensor; nothing to do for an empty one.
template <int kMinBlocks, unsigned... kWrites, class Source>
void launch_tile_cast(const Source& source, const TileOutputs<Source::kOutputs>& outputs, bool power_of_two, cudaStream_t stream) {
  const int64_t tiles = ((source.rows + kTile - 1) / kTile) * ((source.cols + kTile - 1) / kTile);
  if (tiles == 0) return;
  tile_cast_kernel<kMinBlocks, Source, kWrites...>
      <<<static_cast<unsigned>(tiles), kTileThreads, 0, stream>>>(source, outputs, power_of_two);
  check_launch("tile_cast_kernel");
}

}  // namespace eightfold::quant
