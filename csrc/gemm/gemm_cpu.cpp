// Chooses the kernel for this processor; holds the kernel for any other one.
#include "gemm/gemm_cpu.h"

#include "core/cpu_isa.h"
#include "gemm/isa_portable.h"

namespace eightfold {

void gemm_cpu_avx2(const GemmArgs& args);
void gemm_cpu_avx512(const GemmArgs& args);

namespace {

struct PortablePack {
  using Isa = Portable;

  static float widen(float x) { return x; }
  static float widen(uint16_t x) { return bf16_to_float(x); }

  template <class T>
  static void pack(const T* x, int64_t ld, int rows, float* dst, int stride) {
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < kStage; ++k) dst[k * stride + r] = widen(x[r * ld + k]);
  }
  template <class T>
  static void pack_a(const T* x, int64_t ld, int rows, float* dst) {
    pack(x, ld, rows, dst, rows);
  }
  template <class T>
  static void pack_b(const T* x, int64_t ld, int columns, float* dst) {
    pack(x, ld, columns, dst, Isa::kLanes * Isa::kVecs);
  }
};

void gemm_cpu_portable(const GemmArgs& args) { run_plain<PortablePack>(args); }

using Kernel = void (*)(const GemmArgs& args);

Kernel fastest() {
#if defined(__x86_64__)
  if (has_avx512()) return gemm_cpu_avx512;
  if (has_avx2()) return gemm_cpu_avx2;
#endif
  return gemm_cpu_portable;
}

void write_zeros(const GemmArgs& args) {
  const int64_t bytes = args.out_type == DType::f32 ? 4 : 2;
  for (int64_t i = 0; i < args.m; ++i) std::memset(static_cast<char*>(args.out) + i * args.ldo * bytes, 0, args.n * bytes);
}

}  // namespace

void gemm_cpu(const GemmArgs& args) {
  static const Kernel kernel = fastest();
  if (args.m == 0 || args.n == 0) return;
  args.k == 0 ? write_zeros(args) : kernel(args);
}

}  // namespace eightfold
