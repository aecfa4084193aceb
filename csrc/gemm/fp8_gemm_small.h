// The product of few rows (fp8_gemm_small_sm90.cu): at most 128 rows of a, one scale for 128 x 128 of b. Which tile and grid a
// shape takes moves time only, never bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/recent.h"

namespace eightfold {

constexpr int64_t kFp8GemmSmallRows = 128;
constexpr int kFp8GemmSmallWidths[] = {96, 80, 64, 56, 48, 40, 32};  // rows of b in a tile
constexpr int kFp8GemmSmallStages = 24;                              // at most
constexpr int kFp8GemmSmallShared = 231424;                          // bytes, all of a multiprocessor's
// Bytes of b's codes that a block asks the L2 cache for while it waits for the kernels ahead.
constexpr int kFp8GemmSmallAhead = 32768;
// Where b is settled, bytes of its codes a clock that a block asks for meanwhile: its share of device memory, or somewhat more.
constexpr int fp8_gemm_small_ahead_rate(int rows) { return rows == 8 ? 13 : 16; }

struct Fp8GemmSmallPlan {
  int width;      // one of kFp8GemmSmallWidths
  int halves;     // 2: neighbours have the same rows of b and 64 rows of a each
  int teams;      // math warpgroups of a block, 64 rows of a each
  int rows;       // of a that a block loads
  int64_t tiles;  // of b, counted as if all blocks had as many as the one with most
  int grid;       // blocks: halves for each part of b's rows
};

constexpr bool fp8_gemm_small_takes(int64_t m, int b_group_rows) { return m <= kFp8GemmSmallRows && b_group_rows == 128; }

// More codes of b under way than this do not come faster: the queues they wait in are shared, and unfair. Of very few rows the kernels
// ahead take long beside the product, so that more are there when it starts.
inline int fp8_gemm_small_stages(const Fp8GemmSmallPlan& plan, int64_t n, int64_t k, bool settled) {
  const int under_way = (settled && plan.rows == 8 ? 96 : n * k < int64_t{64} << 20 ? 64 : 80) * 1024;
  const int stage_bytes = (plan.rows + plan.width) * 128 + plan.teams * 256;
  return std::min({kFp8GemmSmallStages, (kFp8GemmSmallShared - 1024) / stage_bytes, std::max(6, under_way / (plan.width * 128))});
}

inline Fp8GemmSmallPlan fp8_gemm_small_plan_now(int64_t m, int64_t n, int64_t k, int sm_count) {
  const auto cover = [](int64_t size, int64_t piece) { return (size + piece - 1) / piece; };
  Fp8GemmSmallPlan best{};
  int64_t best_clocks = 0;
  const int most_halves = m > 64 && sm_count > 1 ? 2 : 1;
  for (int halves = 1; halves <= most_halves; ++halves) {
    const int64_t rows = halves == 2 ? 64 : (m + 7) / 8 * 8;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(n / 16, sm_count / halves)), columns = cover(n / 8, parts) * 8;
    for (const int width : kFp8GemmSmallWidths) {
      // Clocks of 128 of K: device memory, what the L2 cache sends a multiprocessor, and its matrix unit. What is not the longest
      // stays visible in part.
      const int64_t waves = cover(columns, width), teams = cover(rows, 64);
      const int64_t memory = n * 128 / 1700, port = (waves * rows + columns) * 128 / 46, matrix = waves * teams * (2 * width + 60);
      const int64_t clocks = cover(k, 128) * (std::max({memory, port, matrix}) + std::max(port, matrix) / 8) + waves * 250;
      if (best.width != 0 && clocks > best_clocks) continue;  // of equals the narrowest
      best_clocks = clocks;
      best.width = width;
      best.halves = halves;
      best.teams = static_cast<int>(teams);
      best.rows = static_cast<int>(rows);
      best.tiles = parts * waves;
      best.grid = static_cast<int>(parts * halves);
    }
  }
  return best;
}

inline Fp8GemmSmallPlan fp8_gemm_small_plan(int64_t m, int64_t n, int64_t k, int sm_count) {
  static thread_local Recent<4, Fp8GemmSmallPlan, 64> recent;
  return recent.get({static_cast<uint64_t>(m), static_cast<uint64_t>(n), static_cast<uint64_t>(k), static_cast<uint64_t>(sm_count)},
                    [&] { return fp8_gemm_small_plan_now(m, n, k, sm_count); });
}

}  // namespace eightfold
