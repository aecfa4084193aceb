// Chooses the kernel for this processor; holds the kernel for any other one.
#include "gemm/fp8_gemm_cpu.h"

#include "core/cpu_isa.h"
#include "gemm/isa_portable.h"
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace eightfold {

void fp8_gemm_cpu_avx2(const Fp8GemmArgs& args);
void fp8_gemm_cpu_avx512(const Fp8GemmArgs& args);
void fp8_gemm_cpu_amx(const Fp8GemmArgs& args);

namespace {

struct PortableCodes {
  using Isa = Portable;
  static constexpr float kUnit = 1.0f;

  static void decode(const uint8_t* codes, int64_t ld, int rows, const float* scales, float* dst, int stride) {
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < kStage; ++k) dst[k * stride + r] = e4m3_to_float(codes[r * ld + k]) * scales[r];
  }
  static void decode_a(const uint8_t* codes, int64_t ld, int rows, const float* scales, float* dst) {
    decode(codes, ld, rows, scales, dst, rows);
  }
  static void decode_b(const uint8_t* codes, int64_t ld, int columns, const float* scales, float* dst) {
    decode(codes, ld, columns, scales, dst, Isa::kLanes * Isa::kVecs);
  }
};

void fp8_gemm_cpu_portable(const Fp8GemmArgs& args) { BlockedGemm<Fp8Operands<PortableCodes>>::run(args); }

bool always() { return true; }
#if defined(__x86_64__)
// Linux lends the tile registers on request, once for all threads of a process; it refuses where it does not save them.
bool has_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

constexpr Fp8GemmCpuKernel kKernels[] = {
#if defined(__x86_64__)
    {"amx", has_amx, fp8_gemm_cpu_amx},
    {"avx512", has_avx512, fp8_gemm_cpu_avx512},
    {"avx2", has_avx2, fp8_gemm_cpu_avx2},
#endif
    {"portable", always, fp8_gemm_cpu_portable},
};

const Fp8GemmCpuKernel& chosen() {
  static const Fp8GemmCpuKernel* const kernel = [] {
    const Fp8GemmCpuKernel* k = kKernels;
    while (!k->supported()) ++k;
    return k;
  }();
  return *kernel;
}

// No terms to add: the bias, or zero.
void write_empty_sums(const Fp8GemmArgs& args) {
  if (args.accumulate) return;
  for (int64_t i = 0; i < args.m; ++i)
    for (int64_t j = 0; j < args.n; ++j) {
      float bias = 0.0f;
      if (args.bias && args.bias_type == DType::f32) bias = static_cast<const float*>(args.bias)[j];
      if (args.bias && args.bias_type == DType::bf16) bias = bf16_to_float(static_cast<const uint16_t*>(args.bias)[j]);
      if (args.out_type == DType::f32) static_cast<float*>(args.out)[i * args.ldo + j] = bias;
      if (args.out_type == DType::bf16) static_cast<uint16_t*>(args.out)[i * args.ldo + j] = float_to_bf16(bias);
    }
}

}  // namespace

const Fp8GemmCpuKernel* fp8_gemm_cpu_kernels(int* count) {
  *count = static_cast<int>(sizeof(kKernels) / sizeof(kKernels[0]));
  return kKernels;
}

const char* fp8_gemm_cpu_isa() { return chosen().isa; }

void fp8_gemm_cpu(const Fp8GemmArgs& args) {
  if (args.m == 0 || args.n == 0) return;
  args.k == 0 ? write_empty_sums(args) : chosen().run(args);
}

}  // namespace eightfold
