// out[M,N] = a[M,K] @ b[N,K]^T in bf16 or fp32, accumulated in fp32: a library product whose rows do not know of each other.
//
// Reinforcement learning scores with many rows what it drew with few, and a token's probability must have the same bits in both. So an
// element depends on its own row of a and row of b only, bitwise: not on m, on the rows around it, on the tiles, on the number of threads
// or on the run. That is all that sets it apart from a vendor's product.
//
// Data movement: a and b are K-major and read once per tile of the other; the floor is (M*K + N*K) elements in, M*N out, 2*M*N*K FLOP.
// The result is rounded once, to out_type. m = 0 and n = 0 write nothing; k = 0 writes zero.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace eightfold {

struct GemmArgs {
  const void* a;          // [m, k], row stride lda; 16-byte aligned, as is every row
  const void* b;          // [n, k], row stride ldb; as a
  DType type;             // of a and b: bf16, or f32 (CPU only)
  void* out;              // [m, n], row stride ldo
  DType out_type;         // f32 or bf16
  int64_t m, n, k;        // n % 8 == 0, k % 8 == 0
  int64_t lda, ldb, ldo;  // in elements
};

void gemm_cpu(const GemmArgs& args);                 // threads: core/threads.h
void gemm_sm90(const GemmArgs& args, void* stream);  // cudaStream_t

}  // namespace eightfold
