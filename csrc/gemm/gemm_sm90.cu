// bf16 products on Hopper whose rows do not depend on each other: every output is one chain of wgmma over K from its beginning, 16 at a
// time, whatever the tile.
//
//   work       tiles of 64, 128 or 256 rows by 128 columns, rows first: a stays in the L2 cache, b comes from memory once
//   producer   one thread keeps a ring of stages (64 of K) full, also for the next tile
//   math       a warpgroup has 64 or 128 of the rows; results leave from registers (gemm_sm90.cuh has the loop)
//
// Floor: at many rows 4,096 FLOP a clock and multiprocessor; at few, b's bytes.
#include "core/cuda_check.h"
#include "core/quad.cuh"
#include "gemm/gemm_sm90.cuh"

namespace eightfold {
namespace {

// The epilogue that writes rows of the result.
struct Rows {
  void* out;
  int64_t ld;
  int32_t m;
  bool bf16;

  __device__ __forceinline__ bool wanted(int32_t, int32_t, uint32_t) const { return true; }

  __device__ __forceinline__ void take(const float (&sums)[kTileN / 2], int32_t row, int32_t column, int32_t end, uint32_t lane) const {
    const int32_t quarter = static_cast<int32_t>(lane % 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t r = row + 8 * h;
      const bool exists = r < m;
      if (bf16) {
        __nv_bfloat16* to = static_cast<__nv_bfloat16*>(out) + r * ld;
#pragma unroll
        for (int i = 0; i < kTileN / 8; i += 4) {
          uint32_t words[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) words[j] = pack_bf16(sums[4 * (i + j) + 2 * h], sums[4 * (i + j) + 2 * h + 1]);
          transpose_quad(words, quarter);
          const int32_t at = column + 8 * (i + quarter);
          if (exists && at < end) *reinterpret_cast<uint4*>(to + at) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      } else {
        float* to = static_cast<float*>(out) + r * ld;
#pragma unroll
        for (int i = 0; i < kTileN / 8; ++i) {
          const int32_t at = column + 8 * i + 2 * quarter;
          if (exists && at < end) *reinterpret_cast<float2*>(to + at) = make_float2(sums[4 * i + 2 * h], sums[4 * i + 2 * h + 1]);
        }
      }
    }
  }
};

}  // namespace

void gemm_sm90(const GemmArgs& op, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (op.m == 0 || op.n == 0) return;
  if (op.k == 0) {
    const int64_t bytes = op.out_type == DType::bf16 ? 2 : 4;
    cuda_check(cudaMemset2DAsync(op.out, op.ldo * bytes, 0, op.n * bytes, op.m, s), "gemm: clearing the result");
    return;
  }
  const Rows rows{op.out, op.ldo, static_cast<int32_t>(op.m), op.out_type == DType::bf16};
  if (op.m <= 64) return launch_gemm<Config<1, 1>>(true, op, rows, s);
  if (op.m <= 512) return launch_gemm<Config<2, 1>>(true, op, rows, s);
  launch_gemm<Config<2, 2>>(true, op, rows, s);
}

}  // namespace eightfold
