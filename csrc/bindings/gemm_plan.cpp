// What the Hopper kernel would do with a shape, as JSON for `_C`: the one place that spells out a plan's fields.
#include <sstream>
#include <string>

#include "core/exports.h"
#include "gemm/fp8_gemm_plan.h"

const char* eightfold_gemm_plan(int64_t m, int64_t n, int64_t k, int b_group_rows, int sm_count) {
  using namespace eightfold;
  static thread_local std::string text;
  const Fp8GemmPlan plan = fp8_gemm_plan(m, n, k, b_group_rows, sm_count);
  const Fp8GemmTile& tile = kFp8GemmTiles[plan.tile];
  const int64_t tiles = plan.tiles_m * plan.tiles_n;
  std::ostringstream out;
  out << "{\"tile_m\": " << tile.m << ", \"tile_n\": " << tile.n << ", \"stages\": " << tile.stages << ", \"tiles_m\": " << plan.tiles_m
      << ", \"tiles_n\": " << plan.tiles_n << ", \"grid\": " << plan.grid << ", \"waves\": " << (tiles + plan.grid - 1) / plan.grid << "}";
  text = out.str();
  return text.c_str();
}
