// The product of few rows (fp8_gemm_small_sm90.cu): at most 128 rows of a, one scale for 128 x 128 of b. Which tile and grid a
// shape takes moves time only, never bits.
#pragma once

#include <cstdint>

#include "core/recent.h"

namespace eightfold {

constexpr int64_t kFp8GemmSmallRows = 128;
constexpr int kFp8GemmSmallWidths[] = {112, 96, 80, 64, 56, 48, 40, 32};  // rows of b in a tile

struct Fp8GemmSmallPlan {
  int width;      // one of kFp8GemmSmallWidths
  int cluster;    // blocks that share loads
  int halves;     // 2: neighbours in a cluster share a tile and have 64 rows of a each
  int rows;       // of a that a block has: m or 64, rounded up to whole swizzle atoms for each block that shares them
  int64_t tiles;  // of b, a multiple of those of a cluster
  int grid;       // blocks; each does halves * tiles / grid tiles, rounded up
};

constexpr bool fp8_gemm_small_takes(int64_t m, int b_group_rows) { return m <= kFp8GemmSmallRows && b_group_rows == 128; }

// Two blocks that share a tile load half of it each, in swizzle atoms of 8 rows; 80 and 112 are twice 40 and 56.
constexpr bool fp8_gemm_small_allowed(int width, int64_t m) { return m > 64 ? width % 16 == 0 : width != 80 && width != 112; }

inline Fp8GemmSmallPlan fp8_gemm_small_plan_now(int64_t m, int64_t n, int64_t k, int sm_count) {
  Fp8GemmSmallPlan best{};
  int64_t best_clocks = 0;
  // Clusters of two where loading a counts. Of four, an H100 holds fewer than 32 at once: a second wave doubles the time.
  const int64_t cluster = m > 16 ? 2 : 1, halves = m > 64 ? 2 : 1;
  const int64_t sharers = cluster / halves;  // of a; also the tiles of a cluster
  const int64_t rows = m > 64 ? 64 : (m + 8 * cluster - 1) / (8 * cluster) * (8 * cluster);
  const int64_t room = sm_count / cluster * cluster, blocks = room > cluster ? room : cluster;
  for (const int width : kFp8GemmSmallWidths) {
    if (!fp8_gemm_small_allowed(width, m)) continue;
    const int64_t tiles = ((n + width - 1) / width + sharers - 1) / sharers * sharers;
    const int64_t waves = (tiles * halves + blocks - 1) / blocks;
    const int64_t grid = ((tiles * halves + waves - 1) / waves + cluster - 1) / cluster * cluster;
    // Clocks of 128 of K when all blocks work: device memory, the L2 cache, and a multiprocessor's port and matrix unit. The first
    // two are shared; a quarter of what a multiprocessor takes for itself stays visible, so more of them are better.
    const int64_t memory = grid * width / halves * 128 / 1700, cache = grid * (rows / sharers + width / halves) * 128 / 3000;
    const int64_t port = (rows + width) * 128 / 50, matrix = 2 * width + (width > 96 ? 160 : 60);
    const int64_t shared = memory > cache ? memory : cache, own = port > matrix ? port : matrix;
    const int64_t step = (shared > own ? shared : own) + own / 4;
    const int64_t clocks = waves * ((k + 127) / 128 * step + 250);
    if (best.width != 0 && clocks >= best_clocks) continue;
    best = {width, static_cast<int>(cluster), static_cast<int>(halves), static_cast<int>(rows), tiles, static_cast<int>(grid)};
    best_clocks = clocks;
  }
  return best;
}

inline Fp8GemmSmallPlan fp8_gemm_small_plan(int64_t m, int64_t n, int64_t k, int sm_count) {
  static thread_local Recent<4, Fp8GemmSmallPlan, 64> recent;
  return recent.get({static_cast<uint64_t>(m), static_cast<uint64_t>(n), static_cast<uint64_t>(k), static_cast<uint64_t>(sm_count)},
                    [&] { return fp8_gemm_small_plan_now(m, n, k, sm_count); });
}

}  // namespace eightfold
