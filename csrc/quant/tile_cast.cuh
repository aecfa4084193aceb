// The one kernel shape of every FP8 cast: a CTA takes a 128 x 128 tile, reads its source once, keeps the values in registers
// in the tensor's dtype, and writes any of: row codes (1 x 128 or 1 x 16 groups), column codes (128 x 1), square codes
// (128 x 128), each with its scales. Casts fused with a norm or an activation have a Source, or a kernel, of their own.
//
// Tiles that exist whole (kFull) run without a test; the others, at the edges and where memory is not aligned, beside them in the
// same kernel.
//
// A Source is a struct with
//   using Element = float or __nv_bfloat16;        dtype in which values are held and (for fused casts) rounded
//   int64_t rows, cols;
//   bool vector;                                   every row it reads starts at a multiple of its vector loads
//   template <bool kVector, bool kFull> __device__ Octet<Element> load(int64_t row, int64_t col) const;
// load gives eight consecutive elements of `row`, zeros beyond rows or cols. kVector promises that all eight columns exist
// and that `vector` holds; rows may still be past the end, unless kFull.
#pragma once

#include <cstdint>

#include "core/dependent_launch.cuh"
#include "core/fp8_vector.cuh"
#include "quant/cast.h"
#include "quant/tile.cuh"

namespace eightfold::quant {

// What is written for one value of the Source; or them together.
// kTogether, with rows and columns: codes of both are made at once, with the fewest instructions. Without it row codes leave early, which
// suits a kernel that waits for memory.
enum : unsigned { kRows128 = 1, kRows16 = 2, kCols = 4, kSquare = 8, kSquareTurned = 16, kTogether = 32 };

// Codes: rows and square [rows][TileShape::row_ld]; columns, and a square's transpose, [cols][col_ld]. Scales: scale[r + group *
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

EF_HD TileOutput tile_output(const Quantized& rows, const Quantized& cols) {
  return {rows.codes, rows.scales, rows.scale_ld, cols.codes, cols.code_ld, cols.scales, cols.scale_ld};
}

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
inline bool aligned16(const void* p) { return aligned(p, 16); }

// The dividers of the groups of a tile: rows, or columns.
struct Dividers {
  float inverse[kTile], aid[kTile];

  template <class T>
  __device__ __forceinline__ void put(int group, GroupDivider<T> by) {
    inverse[group] = by.inverse, aid[group] = by.aid;
  }
  // Of four groups from `first`, a multiple of 4, on.
  template <class T>
  __device__ __forceinline__ void get(int first, GroupDivider<T> (&by)[4]) const {
    const float4 i = *reinterpret_cast<const float4*>(inverse + first), a = *reinterpret_cast<const float4*>(aid + first);
    by[0].inverse = i.x, by[1].inverse = i.y, by[2].inverse = i.z, by[3].inverse = i.w;
    by[0].aid = a.x, by[1].aid = a.y, by[2].aid = a.z, by[3].aid = a.w;
  }
};

// Maxima of the columns of a tile, by warp: the words that octets_maxima gives.
template <class T, int kBand>
struct ColumnMaxima {
  static constexpr int kPerWord = Octet<T>::kPerWord, kWarps = TileThread<kBand>::kWarps;
  uint32_t words[kWarps][kTile / kPerWord];
};

template <class T, int kBand>
struct TileShared {
  ColumnMaxima<T, kBand> maxima;
  Dividers rows, columns;
  ColumnCodes codes;
};

// One step of a transposing reduction: lanes that differ in bit `kMask` split the words they both hold, so that eight rows over
// sixteen lanes take 8 shuffles and each lane ends with rows of its own.
template <class T, int kMask, int kKeep, int kCount>
__device__ __forceinline__ void split_maxima(uint32_t (&words)[kCount], int lane) {
  const bool upper = lane & kMask;
#pragma unroll
  for (int i = 0; i < kKeep; ++i) {
    const uint32_t mine = upper ? words[i + kKeep] : words[i];
    const uint32_t theirs = upper ? words[i] : words[i + kKeep];
    words[i] = Octet<T>::larger(mine, __shfl_xor_sync(kWholeWarp, theirs, kMask));
  }
}

template <class T>
__device__ __forceinline__ void fold_maxima(uint32_t& word, int mask) {
  word = Octet<T>::larger(word, __shfl_xor_sync(kWholeWarp, word, mask));
}

// Where a thread's octets of row codes go. kFull: all of them exist and may be stored whole.
template <bool kFull, int kBand>
struct RowWriter {
  uint8_t* at;
  int64_t ld;
  int rows, count;  // that exist, of this thread's rows and of its eight columns
  bool vector;

  __device__ __forceinline__ RowWriter(uint8_t* codes, const TileShape& tile, const TileThread<kBand>& me) {
    const int64_t row = me.row(tile), col = me.col(tile);
    at = codes + row * tile.row_ld + col, ld = tile.row_ld;
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

// 1 x 128 groups: of 4 or 8 rows of a half-warp, whose octets' maxima are given, each ends with kCount / 16 lanes: octet / kLanes.
template <class T, int kCount>
__device__ __forceinline__ float scale_of_row(uint32_t (&maxima)[kCount], int lane, bool power_of_two) {
  if constexpr (kCount == 8) {
    split_maxima<T, 8, 4>(maxima, lane);
    split_maxima<T, 4, 2>(maxima, lane);
    split_maxima<T, 2, 1>(maxima, lane);
  } else {
    split_maxima<T, 8, 2>(maxima, lane);
    split_maxima<T, 4, 1>(maxima, lane);
    fold_maxima<T>(maxima[0], 2);
  }
  fold_maxima<T>(maxima[0], 1);
  return group_scale(__uint_as_float(Octet<T>::widest_bits(maxima[0])), power_of_two);
}

template <bool kFull, int kBand, class T>
__device__ __forceinline__ GroupDivider<T> divide_rows(uint32_t (&maxima)[kBand], const TileOutput& out, const TileShape& tile,
                                                       bool power_of_two) {
  const TileThread<kBand> me;
  constexpr int kLanes = 16 / kBand;  // to a row
  const float scale = scale_of_row<T>(maxima, me.lane, power_of_two);
  const int64_t own_row = me.row(tile) + me.octet / kLanes;
  if (me.lane % kLanes == 0 && (kFull || own_row < tile.rows)) out.scales[own_row + tile.col / kTile * out.row_scale_ld] = scale;
  return GroupDivider<T>::of(scale);
}

template <int kBand, class T>
__device__ __forceinline__ void row_maxima(const Octet<T> (&values)[kBand], uint32_t (&maxima)[kBand]) {
#pragma unroll
  for (int p = 0; p < kBand; ++p) maxima[p] = octet_maximum(values[p]);
}

// Rows alone: dividers go through the half-warp, no barrier.
template <bool kFull, int kBand, class T>
__device__ __forceinline__ void cast_rows_128(const Octet<T> (&values)[kBand], const TileOutput& out, const TileShape& tile,
                                              bool power_of_two) {
  const TileThread<kBand> me;
  uint32_t maxima[kBand];
  row_maxima(values, maxima);
  const GroupDivider<T> own = divide_rows<kFull, kBand, T>(maxima, out, tile, power_of_two);
  const RowWriter<kFull, kBand> writer(out.codes, tile, me);
#pragma unroll
  for (int p = 0; p < kBand; ++p) {
    const int owner = (me.lane & 16) | (p * (16 / kBand));
    const GroupDivider<T> by = {__shfl_sync(kWholeWarp, own.inverse, owner), __shfl_sync(kWholeWarp, own.aid, owner)};
    writer.put(p, encode_octet(unpacked_anew(values[p]), by));
  }
}

// 1 x 16 groups: two lanes share a group and split its eight rows, four scales each.
template <bool kFull, class T>
__device__ __forceinline__ void cast_rows_16(const Octet<T> (&values)[8], const TileOutput& out, const TileShape& tile, bool power_of_two) {
  const TileThread<8> me;
  uint32_t maxima[8];
  row_maxima(values, maxima);
  split_maxima<T, 1, 4>(maxima, me.lane);
  float own[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) own[i] = group_scale(__uint_as_float(Octet<T>::widest_bits(maxima[i])), power_of_two);

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

// First step of the 128 x 1 cast: each warp leaves the maxima of its rows, of which a thread has found those of its own.
template <class T, int kBand>
__device__ __forceinline__ void leave_maxima(uint32_t (&words)[8 / Octet<T>::kPerWord], ColumnMaxima<T, kBand>& maxima) {
  const TileThread<kBand> me;
  constexpr int kHalf = 4 / Octet<T>::kPerWord;
  split_maxima<T, 16, kHalf>(words, me.lane);
  uint32_t* at = &maxima.words[me.warp][me.octet * 2 * kHalf + (me.lane >> 4) * kHalf];
  if constexpr (kHalf == 2)
    *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
  else
    *reinterpret_cast<uint4*>(at) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Second step, after a barrier: the scale of one column, by each of 128 threads; lanes are neighbouring columns. Two lanes share a
// packed word and fold half the warps each.
template <bool kFull, class T, int kBand>
__device__ __forceinline__ void divide_column(int column, const ColumnMaxima<T, kBand>& maxima, Dividers& dividers, const TileOutput& out,
                                              const TileShape& tile, bool power_of_two) {
  constexpr int kPerWord = Octet<T>::kPerWord, kShare = TileThread<kBand>::kWarps / kPerWord;
  const uint32_t* words = &maxima.words[column % kPerWord * kShare][column / kPerWord];
  uint32_t word = words[0];
#pragma unroll
  for (int w = 1; w < kShare; ++w) word = Octet<T>::larger(word, words[w * (kTile / kPerWord)]);
  if constexpr (kPerWord == 2) fold_maxima<T>(word, 1);
  const float scale = group_scale(__uint_as_float(Octet<T>::amax_bits(word, column % kPerWord)), power_of_two);
  using Value = std::conditional_t<std::is_same_v<T, ScaledCodes>, float, T>;
  dividers.put(column, GroupDivider<Value>::of(scale));
  const int64_t col = tile.col + column;
  if (kFull || col < tile.cols) out.col_scales[tile.row / kTile * out.col_scale_ld + col] = scale;
}

// Third step, after another barrier: column codes to shared memory, and row codes from the same values where wanted.
// Four rows x four columns at a time.
template <bool kRowsToo, bool kFull, int kBand, class T>
__device__ __forceinline__ void encode_tile(const Octet<T> (&values)[kBand], const TileOutput& out, const TileShape& tile,
                                            const Dividers& rows, const Dividers& columns, ColumnCodes& staged) {
  using Value = std::conditional_t<std::is_same_v<T, ScaledCodes>, float, T>;
  const TileThread<kBand> me;
  const RowWriter<kFull, kBand> writer(out.codes, tile, me);
#pragma unroll
  for (int four = 0; four < kBand / 4; ++four) {
    GroupDivider<Value> by_row[4];
    if constexpr (kRowsToo) rows.get(me.band * kBand + four * 4, by_row);
    uint32_t row_codes[4][2];
    Octet<T> octets[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) octets[p] = unpacked_anew(values[four * 4 + p]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      GroupDivider<Value> by_column[4];
      columns.get(me.octet * 8 + half * 4, by_column);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        float x[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int p = 0; p < 4; ++p) x[j][p] = octets[p].value(half * 4 + pair * 2 + j);
          const GroupDivider<Value> by = by_column[pair * 2 + j];
          staged.put(me.octet * 8 + half * 4 + pair * 2 + j, me.band * (kBand / 4) + four,
                     encode4(by.quotient(x[j][0]), by.quotient(x[j][1]), by.quotient(x[j][2]), by.quotient(x[j][3])));
        }
        if constexpr (kRowsToo) {
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            const uint32_t two = encode2(by_row[p].quotient(x[0][p]), by_row[p].quotient(x[1][p]));
            row_codes[p][half] = pair ? row_codes[p][half] | two << 16 : two;
          }
        }
      }
    }
    if constexpr (kRowsToo) {
#pragma unroll
      for (int p = 0; p < 4; ++p) writer.put(four * 4 + p, make_uint2(row_codes[p][0], row_codes[p][1]));
    }
  }
}

// Column codes, alone or with row codes, which leave while the columns' maxima come together; kTogether: which are made with them.
template <unsigned kWrites, bool kFull, int kBand, class T>
__device__ __forceinline__ void cast_columns(const Octet<T> (&values)[kBand], const TileOutput& out, const TileShape& tile,
                                             TileShared<T, kBand>& shared, bool power_of_two) {
  const TileThread<kBand> me;
  constexpr bool kRowsToo = (kWrites & kRows128) != 0, kJoined = kRowsToo && (kWrites & kTogether) != 0;
  uint32_t words[8 / Octet<T>::kPerWord];
  octets_maxima(values, words);
  leave_maxima<T, kBand>(words, shared.maxima);
  if constexpr (kJoined) {
    uint32_t maxima[kBand];
    row_maxima(values, maxima);
    const GroupDivider<T> own = divide_rows<kFull, kBand, T>(maxima, out, tile, power_of_two);
    if (me.lane % (16 / kBand) == 0) shared.rows.put(me.band * kBand + me.octet / (16 / kBand), own);
  } else if constexpr (kRowsToo) {
    cast_rows_128<kFull>(values, out, tile, power_of_two);
  }
  __syncthreads();
  if (me.thread < kTile) divide_column<kFull>(me.thread, shared.maxima, shared.columns, out, tile, power_of_two);
  __syncthreads();
  encode_tile<kJoined, kFull>(values, out, tile, shared.rows, shared.columns, shared.codes);
  __syncthreads();
  shared.codes.template store<kFull, me.kThreads>(out.col_codes, out.col_ld, tile, true);
}

// kTurned: codes and scales of the transpose; the codes go through shared memory, as column codes do.
template <bool kTurned, bool kFull, int kBand, class T>
__device__ __forceinline__ void cast_square(const Octet<T> (&values)[kBand], const TileOutput& out, const TileShape& tile,
                                            TileShared<T, kBand>& shared, bool power_of_two) {
  const TileThread<kBand> me;
  uint32_t maxima[kBand];
  row_maxima(values, maxima);
#pragma unroll
  for (int p = 1; p < kBand; ++p) maxima[0] = Octet<T>::larger(maxima[0], maxima[p]);
  uint32_t amax = __reduce_max_sync(kWholeWarp, Octet<T>::widest_bits(maxima[0]));
  uint32_t* amaxes = shared.maxima.words[0];
  if (me.lane == 0) amaxes[me.warp] = amax;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < me.kWarps; ++w) amax = max(amax, amaxes[w]);
  const float scale = group_scale(__uint_as_float(amax), power_of_two);
  const GroupDivider<T> by = GroupDivider<T>::of(scale);
  if (me.thread == 0) {
    const int64_t row = tile.row / kTile, col = tile.col / kTile, down = (tile.rows + kTile - 1) / kTile,
                  across = (tile.cols + kTile - 1) / kTile;
    out.scales[kTurned ? col * down + row : row * across + col] = scale;
  }
  if constexpr (kTurned) {
    static_assert(kBand == 8);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float q[8];
#pragma unroll
      for (int p = 0; p < 8; ++p) q[p] = by.quotient(values[p].value(j));
      shared.codes.put(me.octet * 8 + j, me.band, make_uint2(encode4(q[0], q[1], q[2], q[3]), encode4(q[4], q[5], q[6], q[7])));
    }
    __syncthreads();
    shared.codes.template store<kFull, me.kThreads>(out.col_codes, out.col_ld, tile, true);
  } else {
    const RowWriter<kFull, kBand> writer(out.codes, tile, me);
#pragma unroll
    for (int p = 0; p < kBand; ++p) writer.put(p, encode_octet(unpacked_anew(values[p]), by));
  }
}

// Every output of one value. All threads of the CTA take part. Calls may follow each other without a barrier: each barrier inside
// separates the last reads of the call before from the first writes of this one.
template <unsigned kWrites, bool kFull, int kBand, class T>
__device__ __forceinline__ void cast_tile(const Octet<T> (&values)[kBand], const TileOutput& out, const TileShape& tile,
                                          TileShared<T, kBand>& shared, bool power_of_two) {
  static_assert((kWrites & ~kTogether) == (kRows128 | kCols) || (kWrites & (kWrites - 1)) == 0, "rows and columns, or one output");
  if constexpr (kWrites & kCols)
    cast_columns<kWrites, kFull>(values, out, tile, shared, power_of_two);
  else if constexpr (kWrites & kRows128)
    cast_rows_128<kFull>(values, out, tile, power_of_two);
  else if constexpr (kWrites & kRows16)
    cast_rows_16<kFull>(values, out, tile, power_of_two);
  else
    cast_square<(kWrites & kSquareTurned) != 0, kFull>(values, out, tile, shared, power_of_two);
}

template <unsigned kWrites, bool kFull, int kBand, class Source>
__device__ __forceinline__ void cast_source(const Source& source, const TileOutput& out, const TileShape& tile,
                                            TileShared<typename Source::Element, kBand>& shared, bool power_of_two) {
  const TileThread<kBand> me;
  Octet<typename Source::Element> values[kBand];
  const bool vector = kFull || (source.vector && tile.col + kTile <= tile.cols);
#pragma unroll
  for (int p = 0; p < kBand; ++p)
    values[p] = vector ? source.template load<true, kFull>(me.row(tile) + p, me.col(tile))
                       : source.template load<false, false>(me.row(tile) + p, me.col(tile));
  cast_tile<kWrites, kFull>(values, out, tile, shared, power_of_two);
}

// Registers: values are 32 (bf16) or 64 (fp32) words a thread in bands of 8; kMinBlocks CTAs share an SM.
template <int kMinBlocks, int kBand, unsigned kWrites, class Source>
__global__ void __launch_bounds__(tile_threads(kBand), kMinBlocks) tile_cast_kernel(Source source, TileOutput out, bool power_of_two) {
  __shared__ __align__(16) TileShared<typename Source::Element, kBand> shared;
  begin_rows(source.rows);
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
  launch_kernel(source.rows <= kFewRows, "tile_cast_kernel", tile_cast_kernel<kMinBlocks, kBand, kWrites, Source>, tiles,
                tile_threads(kBand), 0, stream, source, out, power_of_two);
}

}  // namespace eightfold::quant
