// The product of codes: fp8_gemm's loop for few rows. Every multiprocessor has an equal number of tiles of the weight; above 128 rows two
// neighbours have the same tiles and 128 rows each, the second reading the weight from the L2 cache.
#include "confidence/confidence_tiles.cuh"
#include "gemm/fp8_gemm_small.cuh"

namespace eightfold {
namespace {

constexpr int kTile = kConfidenceCodesTile;

Fp8GemmSmallPlan plan_of(const Fp8GemmArgs& product, int64_t tiles, int sm_count) {
  Fp8GemmSmallPlan plan{};
  plan.width = kTile;
  plan.halves = product.m > 128 && sm_count > 1 ? 2 : 1;
  plan.rows = plan.halves == 2 ? 128 : static_cast<int>((product.m + 7) / 8 * 8);
  plan.teams = (plan.rows + 63) / 64;
  plan.tiles = tiles;
  plan.grid = static_cast<int>(std::min<int64_t>(tiles, sm_count / plan.halves)) * plan.halves;
  return plan;
}

template <bool kDrawn>
void launch(const Fp8GemmArgs& product, const ConfidenceRows& rows, int device, cudaStream_t stream) {
  const ConfidenceEpilogue<kDrawn> epilogue{rows};
  const Fp8GemmSmallPlan plan = plan_of(product, rows.tiles, multiprocessors(device));
  if (plan.teams == 2) return launch_fp8_gemm_small<Config<kTile, 2, kTile>>(product, epilogue, plan, device, stream);
  launch_fp8_gemm_small<Config<kTile, 1, kTile>>(product, epilogue, plan, device, stream);
}

}  // namespace

void lm_head_confidence_codes_sm90(const Fp8GemmArgs& product, const ConfidenceRows& rows, int device, cudaStream_t stream) {
  rows.temperatures == nullptr ? launch<false>(product, rows, device, stream) : launch<true>(product, rows, device, stream);
}

}  // namespace eightfold
