// The product of bf16, and the fold of what tiles of either product have left.
#include <algorithm>

#include "confidence/confidence_tiles.cuh"
#include "core/dependent_launch.cuh"
#include "gemm/gemm_sm90.cuh"

namespace eightfold {
namespace {

static_assert(kTileN == kConfidencePlainTile);

template <bool kDrawn>
void launch_plain(const GemmArgs& product, const ConfidenceRows& rows, cudaStream_t stream) {
  const ConfidenceEpilogue<kDrawn> epilogue{rows};
  if (product.m <= 64) return launch_gemm<Config<1, 1>>(false, product, epilogue, stream);
  if (product.m <= 128) return launch_gemm<Config<2, 1>>(false, product, epilogue, stream);
  launch_gemm<Config<2, 2>>(false, product, epilogue, stream);
}

// --- a block for a row: thread t has tiles t, t + kThreads, ..., then threads are folded as a tree ---

constexpr int kThreads = 256;

struct Folded {
  float max, sum, logit;
  unsigned long long key;
};

__device__ __forceinline__ Folded fold(const Folded& a, const Folded& b) {
  const float max = fmaxf(a.max, b.max);
  const auto share = [&](const Folded& f) { return f.max == max ? f.sum : __fmul_rn(f.sum, ex2_approx(__fmul_rn(f.max - max, kLog2E))); };
  return {max, __fadd_rn(share(a), share(b)), a.key > b.key ? a.logit : b.logit, a.key > b.key ? a.key : b.key};
}

__device__ __forceinline__ Folded fold_lanes(Folded mine, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const Folded other{__shfl_down_sync(0xFFFFFFFFu, mine.max, step), __shfl_down_sync(0xFFFFFFFFu, mine.sum, step),
                       __shfl_down_sync(0xFFFFFFFFu, mine.logit, step), __shfl_down_sync(0xFFFFFFFFu, mine.key, step)};
    mine = fold(mine, other);
  }
  return mine;
}

__global__ void __launch_bounds__(kThreads)
    confidence_fold_kernel(const __grid_constant__ ConfidenceRows o, int64_t* ids, float* confidence) {
  __shared__ Folded of_warp[kThreads / 32];
  begin_rows(gridDim.x);
  const int32_t r = static_cast<int32_t>(blockIdx.x);
  const bool first = threadIdx.x == 0;
  if (o.active != nullptr && o.active[r] == 0) {
    if (first) ids[r] = -1, confidence[r] = -INFINITY;
    return;
  }
  Folded mine{-INFINITY, 0.0f, -INFINITY, 0};
  for (int32_t tile = static_cast<int32_t>(threadIdx.x); tile < o.tiles; tile += kThreads) {
    const int64_t at = static_cast<int64_t>(r) * o.tiles + tile;
    const ConfidencePartial p = o.partials[at];
    mine = fold(mine, {p.max, p.sum, p.logit, ranked(o.scores == nullptr ? p.max : o.scores[at], p.id)});
  }
  mine = fold_lanes(mine, 32);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  mine = fold_lanes(of_warp[threadIdx.x % (kThreads / 32)], kThreads / 32);
  if (!first) return;
  const bool exists = mine.sum > 0.0f && (o.temperatures == nullptr || confidence_temperature_valid(o.temperatures[r]));
  ids[r] = exists ? static_cast<int64_t>(index_of(mine.key)) : -1;
  confidence[r] = exists ? __fdiv_rn(ex2_approx(__fmul_rn(mine.logit - mine.max, kLog2E)), mine.sum) : NAN;
}

}  // namespace

int64_t lm_head_confidence_workspace(const LmHeadConfidence& op) {
  const int64_t tile = op.codes ? kConfidenceCodesTile : kConfidencePlainTile, tiles = (op.vocabulary + tile - 1) / tile;
  const int64_t bytes = sizeof(ConfidencePartial) + (op.temperatures == nullptr ? 0 : sizeof(float));
  return std::min(op.rows, kConfidenceRows) * tiles * bytes;
}

void lm_head_confidence_sm90(const LmHeadConfidence& op, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int device = current_device();
  for (int64_t first = 0; first < op.rows; first += kConfidenceRows) {
    const int64_t count = std::min(kConfidenceRows, op.rows - first);
    const ConfidenceRows rows = confidence_rows(op, first, count, op.codes ? kConfidenceCodesTile : kConfidencePlainTile);
    if (op.codes) {
      Fp8GemmArgs product = op.quantized;
      product.a += first * product.lda;
      product.a_scales += first;
      product.m = count;
      lm_head_confidence_codes_sm90(product, rows, device, s);
    } else {
      GemmArgs product = op.plain;
      product.a = static_cast<const uint16_t*>(product.a) + first * product.lda;
      product.m = count;
      op.temperatures == nullptr ? launch_plain<false>(product, rows, s) : launch_plain<true>(product, rows, s);
    }
    launch_kernel(true, "confidence_fold_kernel", confidence_fold_kernel, count, kThreads, 0, s, rows, op.ids + first,
                  op.confidence + first);
  }
}

}  // namespace eightfold
