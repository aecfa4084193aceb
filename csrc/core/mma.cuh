// The matrix instruction of a single warp (mma.sync) on bf16 operands in registers, and the loads that bring them there.
//
// With l the lane: of a [16, 16], word 2 * h + r holds row l / 4 + 8 * r, columns 8 * h + 2 * (l % 4) and the next; of b [16, 8], word h
// holds rows 8 * h + 2 * (l % 4) and the next, column l / 4; of d [16, 8], element 2 * r + c is row l / 4 + 8 * r, column 2 * (l % 4) + c.
#pragma once

#include <cstdint>

namespace eightfold {

// d += a @ b. All lanes.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows of 8 bf16, at any multiples of 16 bytes of shared memory: lane l's address is row l % 8 of matrix l / 8. Word m
// of a lane holds row l / 4, columns 2 * (l % 4) and the next of matrix m. All lanes.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
// The same of the matrices turned: rows 2 * (l % 4) and the next, column l / 4.
__device__ __forceinline__ void load_matrices_turned(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

}  // namespace eightfold
