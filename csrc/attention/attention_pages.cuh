// Tiles of keys and values on their way from pages to shared memory, a lane of a warp asking for a share of each; and codes made wide.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include "attention/attention_keys.cuh"
#include "attention/attention_tile.cuh"
#include "core/fp8_vector.cuh"
#include "core/memory.cuh"
#include "core/tma_stream.cuh"

namespace eightfold::attention {

// Of the last tile of a sequence no more is asked for than these keys beyond its end: every page has a multiple of so many.
constexpr int kFewKeys = 16;

// A lane's share of a tile: `keys` of it that lie in one page, or `part` of their dimension.
struct Share {
  int32_t head, page, place;  // place: of the first key in the page
  int32_t begin, keys, part;  // begin: of the first key in the tile; keys: of a whole page, or of the tile, or kFewKeys
  int32_t coming;             // of the tile's keys, of all lanes
  uint64_t policy;            // of the L2 cache
};

struct WidePages {
  static constexpr bool kCodes = false;
  CUtensorMap maps[2], few[2];  // of keys and values: boxes of whole shares, and of kFewKeys

  template <int kDim>
  struct Tile {
    static constexpr int kBytes = Shape<kDim>::kTileBytes, kParts = Shape<kDim>::kBlocks;
  };

  __device__ __forceinline__ void prefetch() const {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      tma_prefetch_map(&maps[which]);
      tma_prefetch_map(&few[which]);
    }
  }

  // The maps give zeros for pages that there are not.
  template <int kDim>
  __device__ __forceinline__ void load(int which, uint32_t to, uint32_t barrier, const PagedKeys&, const Share& share) const {
    const CUtensorMap* map = share.keys == kFewKeys ? &few[which] : &maps[which];
    tma_load_4d_policy(to + share.part * Shape<kDim>::kBlockBytes + share.begin * 128, map, barrier, 64 * share.part, share.place,
                       share.head, share.page, share.policy);
  }
};

// E4M3: the codes of a tile's keys, then their scales. A page is a run of bytes.
struct CodePages {
  static constexpr bool kCodes = true;
  const uint8_t* codes[2];
  const float* scales[2];
  int32_t kv_heads;

  template <int kDim>
  struct Tile {
    static constexpr int kBytes = kTile * (kDim + 4), kParts = 1;
  };

  __device__ __forceinline__ void prefetch() const {}

  template <int kDim>
  __device__ __forceinline__ void load(int which, uint32_t to, uint32_t barrier, const PagedKeys& keys, const Share& share) const {
    const int32_t page = min(share.page, keys.page_count - 1);
    const int64_t key = (static_cast<int64_t>(page) * kv_heads + share.head) * keys.page_size + share.place;
    bulk_load_policy(to + share.begin * kDim, codes[which] + key * kDim, share.keys * kDim, barrier, share.policy);
    bulk_load_policy(to + kTile * kDim + share.begin * 4, scales[which] + key, share.keys * 4, barrier, share.policy);
  }
};

// A tile of CodePages as the tensor core wants it, bf16(code * scale); keys from `kept` on are zeros, whatever came for them. By all
// threads of a warpgroup; async_fence() and a meeting follow. Neighbours take neighbouring eight codes, and each the same of every
// kStep-th key: no bank of shared memory is asked twice at once. The loads of four keys are on their way together.
template <int kDim, int kAhead = 4, int kKeys = kTile>
__device__ __forceinline__ void widen(uint32_t to, uint32_t tile, int32_t kept) {
  constexpr int kPieces = kDim / 8, kStep = 128 / kPieces / 8 * 8;  // a multiple of 8 keys keeps the swizzle
  static_assert(kKeys % (kAhead * kStep) == 0);
  const uint32_t thread = in_register(threadIdx.x % 128), key = thread / kPieces, piece = thread % kPieces;
  if (thread >= kStep * kPieces) return;
  const uint32_t from = tile + 8 * thread, scale = tile + kKeys * kDim + 4 * key;
  to += piece / 8 * Shape<kDim, kKeys>::kBlockBytes + key * 128 + (piece % 8 ^ key % 8) * 16;
  kept -= static_cast<int32_t>(key);
#pragma unroll 1
  for (int32_t first = 0; first < kKeys; first += kAhead * kStep) {
    Octet<ScaledCodes> codes[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int32_t i = first + a * kStep;
      const float2 pair = load_shared_pair(from + i * kDim);
      codes[a] = {{__float_as_uint(pair.x), __float_as_uint(pair.y), __float_as_uint(load_shared_float(scale + 4 * i))}};
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int32_t i = first + a * kStep;
      const Octet<__nv_bfloat16> wide = widened(codes[a]);
      const auto word = [&](int w) { return i < kept ? wide.words[w] : 0; };
      store_shared(to + i * 128, make_uint4(word(0), word(1), word(2), word(3)));
    }
  }
}

}  // namespace eightfold::attention
