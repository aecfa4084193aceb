// What the Hopper kernel would do with a shape, as JSON for `_C`: the one place that spells out a plan's fields.
#include <sstream>
#include <string>

#include "core/exports.h"
#include "gemm/fp8_gemm_plan.h"

const char* eightfold_gemm_plan(int64_t m, int64_t n, int64_t k, int b_group_rows, int sm_count) {
  using namespace eightfold;
  static thread_local std::string text;
  const Fp8GemmPlan plan = fp8_gemm_plan(m, n, k, b_group_rows, sm_count);
  const char* const kernels[] = {"small", "pairs", "tiles"};
  const char* kernel = kernels[static_cast<int>(plan.kernel)];
  const int64_t at_once = plan.kernel == Fp8GemmKernel::pairs ? plan.grid / 2 : plan.grid;
  std::ostringstream out;
  out << "{\"kernel\": \"" << kernel << "\", \"tile_m\": " << plan.tile_m << ", \"tile_n\": " << plan.tile_n
      << ", \"tiles_m\": " << plan.tiles_m << ", \"tiles_n\": " << plan.tiles_n << ", \"grid\": " << plan.grid
      << ", \"waves\": " << (plan.units + at_once - 1) / at_once << "}";
  text = out.str();
  return text.c_str();
}
