// Which tile the Hopper kernel takes for a shape. The choice moves time only: every tile adds the same products in the same
// order, so the bits of the result do not depend on it.
#pragma once

#include <cstdint>

namespace eightfold {

// m rows of a by n rows of b; a tile lies inside one group of 128 rows of b. Stages fill shared memory.
struct Fp8GemmTile {
  int m, n, stages;
};
constexpr Fp8GemmTile kFp8GemmTiles[] = {{256, 128, 4}, {128, 128, 6}, {64, 128, 8}, {64, 32, 14}};
constexpr int kFp8GemmTileCount = 4;

struct Fp8GemmPlan {
  int tile;  // index into kFp8GemmTiles
  int64_t tiles_m, tiles_n;
  int grid;  // blocks of the persistent grid
};

// A tile of 256 rows leaves no registers for a scale per column.
constexpr bool fp8_gemm_tile_allowed(int tile, int b_group_rows) { return b_group_rows == 128 || kFp8GemmTiles[tile].m <= 128; }

// Estimated clocks of the busiest multiprocessor. A multiprocessor's tensor cores do 32 outputs of a 128-deep step a clock and
// its fp32 lanes 128 promotions; the cache feeds it about 46 bytes a clock when all ask. Two math warpgroups hide one's promotion
// behind the other's products; one alone does both in turn.
inline int64_t fp8_gemm_tile_clocks(const Fp8GemmTile& tile, int64_t m, int64_t n, int64_t k, int b_group_rows, int sm_count) {
  const int64_t tiles = ((m + tile.m - 1) / tile.m) * ((n + tile.n - 1) / tile.n);
  const int64_t waves = (tiles + sm_count - 1) / sm_count;
  const int64_t outputs = int64_t{tile.m} * tile.n;
  const int64_t products = outputs / 32;
  const int64_t promotion = outputs / 128 * (b_group_rows == 1 ? 2 : 1);
  const int64_t latency = 100;
  const int64_t chain = tile.m >= 128 ? (products + promotion) / 2 + latency : products + promotion + latency;
  const int64_t loads = ((m < tile.m ? m : tile.m) + tile.n) * 128 / 46;
  int64_t step = products;
  if (chain > step) step = chain;
  if (loads > step) step = loads;
  const int64_t epilogue = 1000 + outputs / 16;
  return waves * ((k + 127) / 128 * step + epilogue);
}

inline Fp8GemmPlan fp8_gemm_plan(int64_t m, int64_t n, int64_t k, int b_group_rows, int sm_count) {
  int best = -1;
  int64_t best_clocks = 0;
  for (int tile = 0; tile < kFp8GemmTileCount; ++tile) {
    if (!fp8_gemm_tile_allowed(tile, b_group_rows)) continue;
    const int64_t clocks = fp8_gemm_tile_clocks(kFp8GemmTiles[tile], m, n, k, b_group_rows, sm_count);
    if (best < 0 || clocks < best_clocks) {
      best = tile;
      best_clocks = clocks;
    }
  }
  const int64_t tiles_m = (m + kFp8GemmTiles[best].m - 1) / kFp8GemmTiles[best].m;
  const int64_t tiles_n = (n + kFp8GemmTiles[best].n - 1) / kFp8GemmTiles[best].n;
  const int64_t tiles = tiles_m * tiles_n;
  return {best, tiles_m, tiles_n, static_cast<int>(tiles < sm_count ? tiles : sm_count)};
}

}  // namespace eightfold
