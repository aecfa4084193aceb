// Which kernel and tile a shape takes on Hopper. The choice moves time only: every kernel adds the same products in the same order,
// so the bits of the result do not depend on it.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/recent.h"
#include "gemm/fp8_gemm_small.h"

namespace eightfold {

enum class Fp8GemmKernel {
  small,  // fp8_gemm_small_sm90.cu: at most 128 rows of a; streams b
  pairs,  // fp8_gemm_pairs_sm90.cu: large tiles, two blocks share an operand
  tiles,  // fp8_gemm_tiles_sm90.cu: small tiles, one block each
};

struct Fp8GemmPlan {
  Fp8GemmKernel kernel;
  int tile_m, tile_n;        // rows of a, rows of b
  int64_t tiles_m, tiles_n;  // whole tiles that cover the output
  int64_t units;             // what the grid walks: tiles, or pairs of them
  int grid;                  // blocks of the persistent grid
  bool share_a;              // pairs: neighbours along n, which share rows of a; else along m, which share rows of b
};

// The pairs' kernel takes rows of a in groups of 128 and rows of b in groups of 32: their order in shared memory is its own. What is left
// of a is a product of its own (fp8_gemm_sm90.cu).
constexpr int64_t kFp8GemmPairRows = 128, kFp8GemmPairColumns = 32;

// Its tiles. A step (128 of K) takes the tensor cores rows * columns / 32 clocks; what it takes in all, with one scale
// for a piece of columns of b or with one per column, and the end of a tile, as measured on an H100.
struct Fp8GemmPairTile {
  int rows, columns, step_clocks, column_scale_step_clocks, end_clocks;
};
constexpr Fp8GemmPairTile kFp8GemmPairTiles[] = {{256, 128, 1120, 1700, 900}, {128, 192, 880, 1247, 900}, {128, 128, 760, 1020, 1500}};
constexpr int kFp8GemmTileShapes[][2] = {{64, 128}, {64, 32}};  // a tile lies inside one group of 128 rows of b

inline int64_t fp8_gemm_tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Clocks of the busiest multiprocessor.
inline int64_t fp8_gemm_pairs_clocks(const Fp8GemmPairTile& tile, int64_t waves, int64_t steps, bool column_scales) {
  return waves * (steps * (column_scales ? tile.column_scale_step_clocks : tile.step_clocks) + tile.end_clocks);
}

// One math warpgroup multiplies, then promotes; the cache feeds a multiprocessor about 46 bytes a clock when all ask.
inline int64_t fp8_gemm_tiles_clocks(int rows, int columns, int64_t waves, int64_t steps, bool column_scales) {
  const int64_t outputs = int64_t{rows} * columns;
  const int64_t chain = outputs / 32 + outputs / 128 * (column_scales ? 2 : 1) + 100, loads = (rows + columns) * 128 / 46;
  return waves * (steps * (chain > loads ? chain : loads) + 1000 + outputs / 16);
}

inline Fp8GemmPlan fp8_gemm_plan_now(int64_t m, int64_t n, int64_t k, int b_group_rows, int sm_count) {
  if (fp8_gemm_small_takes(m, b_group_rows)) {
    const Fp8GemmSmallPlan p = fp8_gemm_small_plan(m, n, k, sm_count);
    return {Fp8GemmKernel::small, 64 * p.teams, p.width, p.halves, p.tiles, p.halves * p.tiles, p.grid, false};
  }
  const int64_t steps = fp8_gemm_tiles(k, 128);
  const bool column_scales = b_group_rows == 1;
  Fp8GemmPlan best{};
  int64_t best_clocks = INT64_MAX;
  auto consider = [&](const Fp8GemmPlan& plan, int64_t clocks) {
    if (clocks >= best_clocks) return;
    best = plan;
    best_clocks = clocks;
  };
  const int64_t most_pairs = sm_count / 2;
  for (const Fp8GemmPairTile& tile : kFp8GemmPairTiles) {
    if (k == 0 || m < kFp8GemmPairRows || n % kFp8GemmPairColumns != 0 || most_pairs == 0) break;
    const int64_t tiles_m = fp8_gemm_tiles(m, tile.rows), tiles_n = fp8_gemm_tiles(n, tile.columns);
    for (bool share_a : {tile.rows >= tile.columns, tile.rows < tile.columns}) {  // rather the longer side
      const int64_t pairs = share_a ? tiles_m * fp8_gemm_tiles(tiles_n, 2) : fp8_gemm_tiles(tiles_m, 2) * tiles_n;
      const int grid = static_cast<int>(2 * (pairs < most_pairs ? pairs : most_pairs));
      consider({Fp8GemmKernel::pairs, tile.rows, tile.columns, tiles_m, tiles_n, pairs, grid, share_a},
               fp8_gemm_pairs_clocks(tile, fp8_gemm_tiles(pairs, most_pairs), steps, column_scales));
    }
  }
  for (const auto& shape : kFp8GemmTileShapes) {
    const int64_t tiles_m = fp8_gemm_tiles(m, shape[0]), tiles_n = fp8_gemm_tiles(n, shape[1]), tiles = tiles_m * tiles_n;
    const int grid = static_cast<int>(tiles < sm_count ? tiles : sm_count);
    consider({Fp8GemmKernel::tiles, shape[0], shape[1], tiles_m, tiles_n, tiles, grid, false},
             fp8_gemm_tiles_clocks(shape[0], shape[1], fp8_gemm_tiles(tiles, sm_count), steps, column_scales));
  }
  return best;
}

// Some fifty divisions, and the same few shapes in every step.
inline Fp8GemmPlan fp8_gemm_plan(int64_t m, int64_t n, int64_t k, int b_group_rows, int sm_count) {
  static thread_local Recent<4, Fp8GemmPlan, 64> recent;
  const uint64_t machine = static_cast<uint64_t>(sm_count) << 32 | static_cast<uint32_t>(b_group_rows);
  return recent.get({static_cast<uint64_t>(m), static_cast<uint64_t>(n), static_cast<uint64_t>(k), machine},
                    [&] { return fp8_gemm_plan_now(m, n, k, b_group_rows, sm_count); });
}

}  // namespace eightfold
