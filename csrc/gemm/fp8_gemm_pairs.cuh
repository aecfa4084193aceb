// What a block of fp8_gemm_pairs_sm90.cu holds in shared memory, and the order in which pairs of blocks walk the tiles.
#pragma once

#include <cstdint>

#include "gemm/fp8_gemm_epilogue.cuh"
#include "gemm/fp8_gemm_maps.h"

namespace eightfold::pairs {

constexpr int kStepK = kFp8GemmStepK;
constexpr int kSharedBytes = 232448;  // what a block may ask for on Hopper
constexpr int kAtomBytes = 1024;      // alignment of a swizzled tile

// kBlocks: 64-row blocks of a math warpgroup; kPartials: products under way at once in a warpgroup.
template <int kBlocks_, int kPartials_, int kTileN_, bool kColumnScales_>
struct Config {
  static constexpr int kMathGroups = 2, kBlocks = kBlocks_, kPartials = kPartials_, kTileN = kTileN_;
  static constexpr bool kColumnScales = kColumnScales_;
  static constexpr int kTileM = 64 * kBlocks * kMathGroups;
  static constexpr int kBandRows = kTileM == 128 ? 16 : 8;  // tiles of a band that neighbouring blocks work on
  // Columns that surely have one scale of b: tiles start at multiples of them.
  static constexpr int kPiece = kTileN % 128 == 0 ? 128 : 64, kPieces = kTileN / kPiece;
  static constexpr int kThreads = 128 * (kMathGroups + 1);
  static constexpr int kProducerRegisters = 40, kMathRegisters = 232;
  static constexpr int kGroupRows = 64 * kBlocks;  // of a math warpgroup: a unit of the arranged map
  static constexpr int kBlockBytes = 64 * kStepK;  // of a block of rows; in shared memory those of one index, all groups', are together

  static constexpr int kABytes = kTileM * kStepK, kBBytes = kTileN * kStepK;
  static constexpr int kAScaleBytes = kTileM * 4, kBScaleBytes = kColumnScales ? kTileN * 4 : 16;
  static constexpr int kCopiedBytes = kABytes + kBBytes + kAScaleBytes + (kColumnScales ? kBScaleBytes : 0);  // of a stage
  // In which a warp turns finished sums into rows (1 KB), or has what they are added to come; the stages leave room for as much.
  static constexpr int kWarpStaging = kColumnScales ? 2048 : 1024;
  static constexpr int kStaging = 4 * kMathGroups * kWarpStaging;
  static constexpr int kTileBytes = 8;  // which tile a stage is of
  static constexpr int kStages = (kSharedBytes - kStaging) / (kABytes + kBBytes + kAScaleBytes + kBScaleBytes + kTileBytes + 2 * 8);

  static constexpr int kB = kStages * kABytes, kOut = kB + kStages * kBBytes, kAScales = kOut + kStaging;
  static constexpr int kBScales = kAScales + kStages * kAScaleBytes;
  static constexpr int kTiles = kBScales + kStages * kBScaleBytes;
  static constexpr int kFull = kTiles + kStages * kTileBytes, kEmpty = kFull + kStages * 8;
  static constexpr int kBytes = kEmpty + kStages * 8;

  static_assert(kBytes <= kSharedBytes && kStages >= 3 && (kBlocks == 1 || kPartials == 1));
};

struct KernelArgs {
  GemmOutput output;
  const float* b_scales;
  int64_t ld_b_scales;
  uint32_t tiles_m, tiles_n, pairs;
  int32_t steps;     // ceil(k / 128), at least 1
  int32_t b_groups;  // rows of b_scales
  bool share_a;      // a pair's tiles are neighbours along n and share rows of a; else along m, and share rows of b
};

struct TileAt {
  int32_t m, n;
};

// Bands of tile rows, walked along n: blocks that run together share rows of a and of b in the L2 cache.
template <class C>
__device__ __forceinline__ TileAt tile_at(uint32_t pair, const KernelArgs& args, uint32_t rank) {
  const uint32_t rows = args.share_a ? args.tiles_m : (args.tiles_m + 1) / 2,
                 columns = args.share_a ? (args.tiles_n + 1) / 2 : args.tiles_n;
  const uint32_t height = args.share_a ? C::kBandRows : C::kBandRows / 2;
  const uint32_t band = pair / (height * columns), rest = pair % (height * columns);
  const uint32_t in_band = min(height, rows - band * height);
  const uint32_t m = band * height + rest % in_band, n = rest / in_band;
  return {static_cast<int32_t>(args.share_a ? m : 2 * m + rank), static_cast<int32_t>(args.share_a ? 2 * n + rank : n)};
}

}  // namespace eightfold::pairs
