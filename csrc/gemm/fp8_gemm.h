// out[M,N] = a[M,K] @ b[N,K]^T (+ bias[N]) for E4M3 codes with fp32 scales: the one product of the library.
//
//   out[i,j] = sum over blocks g of 128 along K of  (sum over k in g of a[i,k] * b[j,k]) * (a_scales[i,g] * b_scales[j',g])
//
// where j' = j / b_group_rows. forward: a = Q1x128(X), b = Q128x128(W). dgrad: a = Q1x128(dY), b = W codes transposed. wgrad:
// a = columns of dY, b = columns of X, b_group_rows = 1, K = tokens. The sum inside a block is the product of exact codes,
// accumulated by the machine's dot unit (fp32 on CPUs); blocks are added to the fp32 result in the order of K.
//
// Data movement: a and b are K-major and read once per tile of the other; the floor is M*K + N*K bytes of codes, 4 * M*N (or
// 2 * M*N) bytes out, and 2*M*N*K FLOP. An element depends on its own row and column only, bitwise: not on M, on the rows around
// it, on the tiles, on the number of threads or on the run. bias is added in fp32 before the one rounding to out_type.
//
// NaN codes and NaN scales give NaN. m = 0 and n = 0 write nothing; k = 0 writes the bias, or zero.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace eightfold {

struct Fp8GemmArgs {
  const uint8_t* a;       // codes [m, k], row stride lda; 16-byte aligned, lda % 16 == 0
  const float* a_scales;  // element (i, g) at [i + g * ld_a_scales]; ld_a_scales % 4 == 0
  const uint8_t* b;       // codes [n, k], row stride ldb; as a
  const float* b_scales;  // b_group_rows 128: (j, g) at [(j / 128) * ld_b_scales + g]; 1: (j, g) at [j + g * ld_b_scales]
  const void* bias;       // [n] or null
  DType bias_type;        // f32 or bf16
  void* out;              // [m, n], row stride ldo
  DType out_type;         // f32 or bf16
  int64_t m, n, k;
  int64_t lda, ldb, ld_a_scales, ld_b_scales, ldo;  // in elements
  int b_group_rows;                                 // 128 (then n % 16 == 0) or 1
  bool settled;                                     // b and its scales were written before the kernels that may still run
  bool accumulate;                                  // out += the product, rounded once; no bias; bf16 out: b_group_rows is 1
};

void fp8_gemm_cpu(const Fp8GemmArgs& args);                 // threads: core/threads.h
void fp8_gemm_sm90(const Fp8GemmArgs& args, void* stream);  // cudaStream_t

// The CPU kernels, fastest first; each gives the properties above, with bits of its own.
struct Fp8GemmCpuKernel {
  const char* isa;      // "amx", "avx512", "avx2", "portable"
  bool (*supported)();  // by this processor and operating system
  void (*run)(const Fp8GemmArgs& args);
};
const Fp8GemmCpuKernel* fp8_gemm_cpu_kernels(int* count);
const char* fp8_gemm_cpu_isa();  // what fp8_gemm_cpu runs on this machine

}  // namespace eightfold
