// The product of fp8_gemm.h for at most 128 rows of a: a stream of b's codes with a little arithmetic beside it.
//
//   floor     n * k bytes of codes at the rate of device memory; a and out are small beside them. 16 MB is 5.5 us, so the start and
//             the end of a kernel count as much as its loop.
//   block     an equal part of b's rows, in multiples of 8, for every multiprocessor; a few tiles of `width` rows one after the other.
//             64 rows of a are the matrix instruction's fixed side, the width of b its free one. Above 64 rows of a, two math
//             warpgroups share the tile (few bytes a product: for large b), or two blocks have 64 rows each of a tile twice as wide
//             (the better shape where a part is narrow). Only the rows that a has are loaded; the others are whatever shared
//             memory holds, and so are their results, which nobody stores.
//   producer  one thread brings 128 of K a stage into a ring: b's codes; a's codes, from the L2 cache; a's scales. Blocks that read
//             the same rows at the same time are served together on the way from the cache; explicit multicast in clusters was slower.
//   math      a warpgroup for 64 rows. For each stage: 4 wgmma (32 of K each) from zero into one of two to four sets of registers,
//             while the oldest set is promoted: acc += partial * (sa * sb). The tensor core always has the next products queued,
//             so a stage costs no round trip. The same operations in the same order as the large kernel's (fp8_gemm_sm90.cu), so the
//             same bits.
//   overlap   the next kernel's blocks start where they find room once this one's last loads are asked for: they set up their
//             barriers, ask the L2 cache for the first codes of b, and wait for this kernel's end. Only hints may come before that
//             wait: the kernel ahead may have written any operand, b too. Where b is settled (ops.fp8_gemm) a second thread fills the
//             ring with its codes meanwhile.
//
// The tail of K arrives as zero codes with valid scales: it adds 0 * scale, which is NaN exactly when the block's scale is.
#include "gemm/fp8_gemm_epilogue.cuh"
#include "gemm/fp8_gemm_launch.h"
#include "gemm/fp8_gemm_small.cuh"

namespace eightfold {
namespace {

// Writes 64 rows of a tile; `row` is the lane's upper row. Four lanes hold 32 columns of a row as words of two; traded among
// them, each writes 16 bytes. All lanes of a warp call it.
template <int kCount>
__device__ __forceinline__ void write_tile(const GemmOutput& o, float (&acc)[kCount], int32_t row, int32_t column, uint32_t lane) {
  constexpr int kColumnBlocks = kCount / 4;
  add_tile_bias(o, acc, column, lane);
  if (o.type == DType::f32) return store_f32(o, acc, row, column, lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + 8 * half;
#pragma unroll
    for (int first = 0; first < kColumnBlocks; first += 4) {
      uint32_t w[4] = {};
#pragma unroll
      for (int j = 0; j < 4 && first + j < kColumnBlocks; ++j) {
        w[j] = pack_bf16(acc[4 * (first + j) + 2 * half], acc[4 * (first + j) + 2 * half + 1]);
      }
      transpose_quad(w, lane);
      const int block = first + static_cast<int>(lane % 4);
      const int64_t at = column + 8 * block;
      if (r >= o.m || at >= o.n || block >= kColumnBlocks) continue;
      __nv_bfloat16* out = static_cast<__nv_bfloat16*>(o.out) + r * o.ld + at;
      *reinterpret_cast<uint4*>(out) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

// The epilogue that writes results.
struct Results {
  GemmOutput output;

  // Of the bias.
  __device__ __forceinline__ void prefetch(int32_t column, int32_t width, uint32_t lane) const {
    constexpr int32_t kLine = 32;  // floats
    const int32_t index = static_cast<int32_t>(lane), bytes = output.bias_type == DType::f32 ? 4 : 2, biased = column + index * kLine;
    if (output.bias != nullptr && index * kLine < width && biased < output.n)
      prefetch_l2(static_cast<const uint8_t*>(output.bias) + biased * int64_t{bytes});
  }

  __device__ __forceinline__ bool wanted(int32_t, int32_t, uint32_t) const { return true; }

  template <int kCount>
  __device__ __forceinline__ void take(float (&acc)[kCount], int32_t row, int32_t column, int32_t end, uint32_t lane) const {
    GemmOutput part = output;
    part.n = end;
    write_tile(part, acc, row, column, lane);
  }
};

template <int kWidth>
void launch_teams(const Fp8GemmArgs& args, const Fp8GemmSmallPlan& plan, int device, cudaStream_t stream) {
  const Results results{gemm_output(args)};
  if (plan.teams == 2) return launch_fp8_gemm_small<Config<kWidth, 2>>(args, results, plan, device, stream);
  launch_fp8_gemm_small<Config<kWidth, 1>>(args, results, plan, device, stream);
}

}  // namespace

void fp8_gemm_small_sm90(const Fp8GemmArgs& args, int device, cudaStream_t s) {
  const Fp8GemmSmallPlan plan = fp8_gemm_small_plan(args.m, args.n, args.k, multiprocessors(device));
  switch (plan.width) {
    case 96: return launch_teams<96>(args, plan, device, s);
    case 80: return launch_teams<80>(args, plan, device, s);
    case 64: return launch_teams<64>(args, plan, device, s);
    case 56: return launch_teams<56>(args, plan, device, s);
    case 48: return launch_teams<48>(args, plan, device, s);
    case 40: return launch_teams<40>(args, plan, device, s);
    default: return launch_teams<32>(args, plan, device, s);
  }
}

}  // namespace eightfold
