// The product of fp8_gemm.h on Hopper: chooses the kernel.
//
// The tensor core keeps about 14 bits while it adds, so no kernel has it add over more than 128 of K: for each 128, 4 wgmma (32 of K
// each) from zero, then acc = fma(partial, sa * sb, acc) in fp32, steps in the order of K. Every kernel and tile does these operations
// per element in this order, which is why the bits do not depend on the tile, on M, or on the grid.
//
// Rows and columns outside the matrices arrive as zeros, codes and scales alike, and reach only outputs that are not stored. The
// tail of K arrives as zero codes with valid scales: it adds 0 * scale, which is NaN exactly when the block's scale is.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/device.h"
#include "gemm/fp8_gemm_launch.h"

namespace eightfold {

void fp8_gemm_sm90(const Fp8GemmArgs& args, void* stream) {
  if (args.m == 0 || args.n == 0) return;
  // The copy engine's coordinates are 32-bit, and a tile may reach past the end.
  constexpr int64_t kLargest = INT32_MAX - 1024;
  if (args.m > kLargest || args.n > kLargest || args.k > kLargest) {
    throw std::runtime_error("fp8_gemm: m, n, k are at most " + std::to_string(kLargest) + ", got " + std::to_string(args.m) + ", " +
                             std::to_string(args.n) + ", " + std::to_string(args.k));
  }
  const int device = current_device();
  const auto s = static_cast<cudaStream_t>(stream);
  if (fp8_gemm_small_takes(args.m, args.b_group_rows)) return fp8_gemm_small_sm90(args, device, s);  // which makes its own plan
  const Fp8GemmPlan plan = fp8_gemm_plan(args.m, args.n, args.k, args.b_group_rows, multiprocessors(device));
  if (plan.tiles_m * plan.tiles_n > INT32_MAX / 16) {
    throw std::runtime_error("fp8_gemm: an output of " + std::to_string(args.m) + " x " + std::to_string(args.n) + " is too large");
  }
  const int64_t rest = args.m % kFp8GemmPairRows;
  if (plan.kernel == Fp8GemmKernel::pairs && rest > 0) {
    Fp8GemmArgs whole = args, last = args;
    whole.m -= rest;
    last.m = rest;
    last.a += whole.m * args.lda;
    last.a_scales += whole.m;
    last.out = static_cast<uint8_t*>(args.out) + whole.m * args.ldo * (args.out_type == DType::bf16 ? 2 : 4);
    fp8_gemm_sm90(whole, stream);
    return fp8_gemm_sm90(last, stream);
  }
  switch (plan.kernel) {
    case Fp8GemmKernel::small: break;  // above
    case Fp8GemmKernel::pairs: return fp8_gemm_pairs_sm90(args, plan, device, s);
    case Fp8GemmKernel::tiles: return fp8_gemm_tiles_sm90(args, plan, device, s);
  }
}

}  // namespace eightfold
