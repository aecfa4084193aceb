// Where a kernel of attention finds the tiles of keys and values of a sequence: packed with the queries, or in pages.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "attention/attention_tile.cuh"
#include "core/tma.cuh"

namespace eightfold::attention {

struct PackedKeys {
  static constexpr bool kPaged = false;

  // Keys tile * 128 and following of the sequence whose first row is `row`.
  template <int kDim>
  __device__ __forceinline__ void load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t head, int32_t row, int32_t,
                                       int32_t tile) const {
#pragma unroll
    for (int block = 0; block < Shape<kDim>::kBlocks; ++block)
      tma_load_3d(to + block * Shape<kDim>::kBlockBytes, map, barrier, 64 * block, head, row + tile * kTile);
  }
};

struct PagedKeys {
  static constexpr bool kPaged = true;
  const int32_t *pages, *lengths;
  int32_t most_pages, page_size, page_count;

  // The page of a key of a sequence; page_count, of which all is read as zeros, for one that the sequence does not have.
  __device__ __forceinline__ int32_t page(int32_t sequence, int32_t key) const {
    const int32_t index = key / page_size;
    const int32_t page = index < most_pages ? __ldcg(pages + static_cast<int64_t>(sequence) * most_pages + index) : page_count;
    return page < 0 || page > page_count ? page_count : page;
  }

  // Keys tile * 128 and following of a sequence.
  template <int kDim>
  __device__ __forceinline__ void load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t head, int32_t, int32_t sequence,
                                       int32_t tile) const {
    const int32_t rows = min(page_size, kTile);
    for (int32_t begin = 0; begin < kTile; begin += rows) {
      const int32_t key = tile * kTile + begin, from = page(sequence, key);
#pragma unroll
      for (int block = 0; block < Shape<kDim>::kBlocks; ++block)
        tma_load_4d(to + block * Shape<kDim>::kBlockBytes + begin * 128, map, barrier, 64 * block, key % page_size, head, from);
    }
  }
};

}  // namespace eightfold::attention
