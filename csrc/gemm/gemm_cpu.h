// What the CPU kernels of gemm multiply (blocked_cpu.h): bf16 or fp32, widened while they are packed.
#pragma once

#include "gemm/blocked_cpu.h"
#include "gemm/gemm.h"

namespace eightfold {
namespace {

// Pack: Isa; pack_a(x, ld, rows, dst) and pack_b(x, ld, columns <= 16, dst): kStage elements of each row to steps.
template <class Pack, class T>
struct PlainOperands {
  struct Args : GemmArgs {
    static constexpr const void* bias = nullptr;
    static constexpr DType bias_type = DType::f32;
    static constexpr bool accumulate = false;
  };
  using Isa = typename Pack::Isa;
  static constexpr int kNr = Isa::kLanes * Isa::kVecs;
  static constexpr int64_t kLine = 64 / sizeof(T);

  static __attribute__((noinline)) void pack_a(const Args& args, int64_t row, int rows, int64_t begin, int64_t end, float* dst) {
    const T* a = static_cast<const T*>(args.a) + row * args.lda;
    for (int64_t k = begin * kStage; k < end * kStage; k += kStage, dst += kStage * rows) {
      Stage<T> stage(a + k, args.lda, rows, args.k - k);
      Pack::pack_a(stage.elements, stage.ld, rows, dst);
    }
  }

  static __attribute__((noinline)) void pack_b(const Args& args, int64_t panel, int64_t begin, int64_t end, float* dst) {
    for (int64_t k = begin * kStage; k < end * kStage; k += kStage, dst += kNr * kStage)
      for (int j = 0; j < kNr; j += 16) {
        int64_t first = smaller(panel * kNr + j, args.n - 1);
        int columns = static_cast<int>(smaller(16, args.n - first));
        const T* b = static_cast<const T*>(args.b) + first * args.ldb + k;
        for (int r = 0; r < 16; ++r)  // the next panel's, out of memory
          for (int64_t at = 0; at < kStage; at += kLine) __builtin_prefetch(b + (kNr + r) * args.ldb + at);
        Stage<T> stage(b, args.ldb, columns, args.k - k);
        Pack::pack_b(stage.elements, stage.ld, columns, dst + j);
      }
  }

  static void skip_rows(Args& args, int64_t row) { args.a = static_cast<const T*>(args.a) + row * args.lda; }
};

template <class Pack>
void run_plain(const GemmArgs& args) {
  if (args.type == DType::bf16) return BlockedGemm<PlainOperands<Pack, uint16_t>>::run({args});
  BlockedGemm<PlainOperands<Pack, float>>::run({args});
}

}  // namespace
}  // namespace eightfold
