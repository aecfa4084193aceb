// What the CPU kernels of fp8_gemm multiply (blocked_cpu.h): codes, dequantised while they are packed.
#pragma once

#include "gemm/blocked_cpu.h"
#include "gemm/fp8_gemm.h"

namespace eightfold {
namespace {

constexpr int64_t kBlock = 128;  // of k, per scale

// Decode: Isa; kUnit; decode_a(codes, ld, rows, scales, dst) and decode_b(codes, ld, columns <= 16, scales, dst): kStage codes of each row
// to steps, times the row's scale and 1 / kUnit.
template <class Decode>
struct Fp8Operands {
  using Args = Fp8GemmArgs;
  using Isa = typename Decode::Isa;
  static constexpr int kNr = Isa::kLanes * Isa::kVecs;

  static __attribute__((noinline)) void pack_a(const Args& args, int64_t row, int rows, int64_t begin, int64_t end, float* dst) {
    alignas(64) float scales[16] = {};
    for (int64_t k = begin * kStage; k < end * kStage; k += kStage, dst += kStage * rows) {
      for (int r = 0; r < rows; ++r) scales[r] = Decode::kUnit * args.a_scales[row + r + k / kBlock * args.ld_a_scales];
      Stage<uint8_t> stage(args.a + row * args.lda + k, args.lda, rows, args.k - k);
      Decode::decode_a(stage.elements, stage.ld, rows, scales, dst);
    }
  }

  static __attribute__((noinline)) void pack_b(const Args& args, int64_t panel, int64_t begin, int64_t end, float* dst) {
    alignas(64) float scales[kNr];
    int64_t column = panel * kNr;
    for (int64_t k = begin * kStage; k < end * kStage; k += kStage, dst += kNr * kStage) {
      int64_t g = k / kBlock;
      for (int j = 0; j < kNr; ++j) {
        int64_t at = smaller(column + j, args.n - 1);
        scales[j] = Decode::kUnit *
                    (args.b_group_rows == 1 ? args.b_scales[at + g * args.ld_b_scales] : args.b_scales[at / kBlock * args.ld_b_scales + g]);
      }
      for (int j = 0; j < kNr; j += 16) {
        int64_t first = smaller(column + j, args.n - 1);
        int columns = static_cast<int>(smaller(16, args.n - first));
        const uint8_t* codes = args.b + first * args.ldb + k;
        for (int r = 0; r < 16; ++r) __builtin_prefetch(codes + (kNr + r) * args.ldb);  // the next panel's, out of memory
        Stage<uint8_t> stage(codes, args.ldb, columns, args.k - k);
        Decode::decode_b(stage.elements, stage.ld, columns, scales + j, dst + j);
      }
    }
  }

  static void skip_rows(Args& args, int64_t row) {
    args.a += row * args.lda;
    args.a_scales += row;
  }
};

}  // namespace
}  // namespace eightfold
