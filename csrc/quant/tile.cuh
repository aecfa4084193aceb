// A 128 x 128 tile: where it lies, which of its elements are a thread's, and its codes by column in shared memory.
//
// Thread layout: the 16 lanes of a half-warp span the 128 columns (8 each); half-warp `band` owns kBand consecutive rows, 8 with
// 256 threads, 4 with 512. So one load of a half-warp is 256 bytes of one bf16 row, row statistics never leave a half-warp, and a
// thread's block holds kBand consecutive bytes of each of its 8 columns. Column codes pass through shared memory, in slots of 8
// rows placed by XOR so that neither side has bank conflicts, and leave as 16-byte pieces of 128-byte lines.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/fp8_vector.cuh"

namespace eightfold::quant {

constexpr int kTile = 128;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Threads of a tile whose half-warps own `band` rows each.
constexpr int tile_threads(int band) { return kTile / band * 16; }
constexpr int kTileThreads = tile_threads(8);

struct TileShape {
  int64_t rows, cols;  // of the tensor
  int64_t row, col;    // where the tile starts
  int64_t row_ld;      // of row codes: cols, or a multiple of it where they are a part of a wider buffer

  // The whole tile exists and rows of codes start at a multiple of 8.
  __device__ bool full() const { return row + kTile <= rows && col + kTile <= cols && cols % 8 == 0; }
};

// The tile of `block` in a grid of one block a tile; `beside`: row codes are a half of a buffer twice as wide.
__device__ __forceinline__ TileShape tile_of(int64_t rows, int64_t cols, uint32_t block, bool beside = false) {
  const uint32_t across = static_cast<uint32_t>((cols + kTile - 1) / kTile);
  return {rows, cols, static_cast<int64_t>(block / across) * kTile, static_cast<int64_t>(block % across) * kTile, beside ? 2 * cols : cols};
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
    constexpr int kColumns = kThreads / 8, kPieces = kTile / kColumns;
    if constexpr (kFull) {  // all columns of a warp are in octets of one parity
      auto store_pieces = [&](auto swapped) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const uint4 v = *piece(i * kColumns + (thread >> 3), rows16);
          *reinterpret_cast<uint4*>(to + i * (kColumns * ld)) = swapped ? make_uint4(v.z, v.w, v.x, v.y) : v;
        }
      };
      static_assert(kColumns % 16 == 0);
      thread >> 6 & 1 ? store_pieces(std::true_type{}) : store_pieces(std::false_type{});
    } else {
#pragma unroll
      for (int i = 0; i < kPieces; ++i, to += kColumns * ld) {
        const int column = i * kColumns + (thread >> 3);
        if (tile.col + column >= tile.cols || row >= tile.rows) continue;
        const uint4 v = ordered(*piece(column, rows16), column);
        if (vector && row + 16 <= tile.rows) {
          *reinterpret_cast<uint4*>(to) = v;
        } else {
          const int count = static_cast<int>(min(tile.rows - row, int64_t{16}));
          store_codes8(to, make_uint2(v.x, v.y), count, false);
          store_codes8(to + 8, make_uint2(v.z, v.w), count - 8, false);
        }
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

}  // namespace eightfold::quant
