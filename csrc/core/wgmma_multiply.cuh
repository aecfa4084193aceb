// The instruction itself, on E4M3 and on bf16 operands, in every width that a kernel takes: the registers of 64 x kN outputs differ,
// nothing else.
#pragma once

#include <cstdint>

namespace eightfold {

// multiply: d = a @ b^T + (add ? d : 0) over 32 codes of K, a 64 rows, b kN rows; a and b as core/wgmma.cuh describes them.
// Asynchronous: d belongs to the tensor core from here to wgmma_wait_all.
template <int kN>
struct Wgmma;

// The first so many registers: as the assembler names them, and as its operands. Each list begins with the one before.
#define EF_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define EF_NAMES_20 EF_NAMES_16 ", %16, %17, %18, %19"
#define EF_NAMES_24 EF_NAMES_20 ", %20, %21, %22, %23"
#define EF_NAMES_28 EF_NAMES_24 ", %24, %25, %26, %27"
#define EF_NAMES_32 EF_NAMES_28 ", %28, %29, %30, %31"
#define EF_NAMES_40 EF_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define EF_NAMES_48 EF_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define EF_NAMES_64 EF_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define EF_NAMES_96                                                                  \
  EF_NAMES_64                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define EF_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define EF_REGISTERS_16 EF_FOUR(0), EF_FOUR(4), EF_FOUR(8), EF_FOUR(12)
#define EF_REGISTERS_20 EF_REGISTERS_16, EF_FOUR(16)
#define EF_REGISTERS_24 EF_REGISTERS_20, EF_FOUR(20)
#define EF_REGISTERS_28 EF_REGISTERS_24, EF_FOUR(24)
#define EF_REGISTERS_32 EF_REGISTERS_28, EF_FOUR(28)
#define EF_REGISTERS_40 EF_REGISTERS_32, EF_FOUR(32), EF_FOUR(36)
#define EF_REGISTERS_48 EF_REGISTERS_40, EF_FOUR(40), EF_FOUR(44)
#define EF_REGISTERS_64 EF_REGISTERS_48, EF_FOUR(48), EF_FOUR(52), EF_FOUR(56), EF_FOUR(60)
#define EF_REGISTERS_96 \
  EF_REGISTERS_64, EF_FOUR(64), EF_FOUR(68), EF_FOUR(72), EF_FOUR(76), EF_FOUR(80), EF_FOUR(84), EF_FOUR(88), EF_FOUR(92)

// a, b, add: the numbers of these operands, which follow the registers.
// clang-format off
#define EF_WGMMA(width, count, a, b, add)                                                                                    \
  template <>                                                                                                                \
  struct Wgmma<width> {                                                                                                      \
    static __device__ __forceinline__ void multiply(float (&d)[count], uint64_t operand_a, uint64_t operand_b, bool add_d) { \
      asm volatile(                                                                                                          \
          "{\n"                                                                                                              \
          ".reg .pred p;\n"                                                                                                  \
          "setp.ne.b32 p, %" #add ", 0;\n"                                                                                   \
          "wgmma.mma_async.sync.aligned.m64n" #width "k32.f32.e4m3.e4m3 "                                                    \
          "{" EF_NAMES_##count "}, %" #a ", %" #b ", p, 1, 1;\n"                                                             \
          "}\n"                                                                                                              \
          : EF_REGISTERS_##count                                                                                             \
          : "l"(operand_a), "l"(operand_b), "r"(static_cast<int32_t>(add_d)));                                               \
    }                                                                                                                        \
  }
// clang-format on

// The same on bf16, 16 of K at a time.
template <int kN>
struct WgmmaBf16;

// d += a @ b, a in registers: word 2 * h + r of a lane is row 16 * w + l / 4 + 8 * r, columns 8 * h + 2 * (l % 4) and the next; b as
// wgmma_columns_operand describes it. They belong to the tensor core until wgmma_wait_all, a too.
template <int kN>
struct WgmmaBf16OfRegisters;

// clang-format off
#define EF_WGMMA_BF16(width, count, a, b, add)                                                                               \
  template <>                                                                                                                \
  struct WgmmaBf16<width> {                                                                                                  \
    static __device__ __forceinline__ void multiply(float (&d)[count], uint64_t operand_a, uint64_t operand_b, bool add_d) { \
      asm volatile(                                                                                                          \
          "{\n"                                                                                                              \
          ".reg .pred p;\n"                                                                                                  \
          "setp.ne.b32 p, %" #add ", 0;\n"                                                                                   \
          "wgmma.mma_async.sync.aligned.m64n" #width "k16.f32.bf16.bf16 "                                                    \
          "{" EF_NAMES_##count "}, %" #a ", %" #b ", p, 1, 1, 0, 0;\n"                                                       \
          "}\n"                                                                                                              \
          : EF_REGISTERS_##count                                                                                             \
          : "l"(operand_a), "l"(operand_b), "r"(static_cast<int32_t>(add_d)));                                               \
    }                                                                                                                        \
  }
#define EF_WGMMA_BF16_OF_REGISTERS(width, count, a0, a1, a2, a3, b)                                                          \
  template <>                                                                                                                \
  struct WgmmaBf16OfRegisters<width> {                                                                                       \
    static __device__ __forceinline__ void multiply(float (&d)[count], const uint32_t* a, uint64_t operand_b) {              \
      asm volatile(                                                                                                          \
          "wgmma.mma_async.sync.aligned.m64n" #width "k16.f32.bf16.bf16 "                                                    \
          "{" EF_NAMES_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", 1, 1, 1, 1;\n"                         \
          : EF_REGISTERS_##count                                                                                             \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(operand_b));                                                     \
    }                                                                                                                        \
  }
// clang-format on

EF_WGMMA(32, 16, 16, 17, 18);
EF_WGMMA(40, 20, 20, 21, 22);
EF_WGMMA(48, 24, 24, 25, 26);
EF_WGMMA(56, 28, 28, 29, 30);
EF_WGMMA(64, 32, 32, 33, 34);
EF_WGMMA(80, 40, 40, 41, 42);
EF_WGMMA(96, 48, 48, 49, 50);
EF_WGMMA(128, 64, 64, 65, 66);
EF_WGMMA(192, 96, 96, 97, 98);

EF_WGMMA_BF16(64, 32, 32, 33, 34);
EF_WGMMA_BF16(128, 64, 64, 65, 66);
EF_WGMMA_BF16_OF_REGISTERS(64, 32, 32, 33, 34, 35, 36);
EF_WGMMA_BF16_OF_REGISTERS(96, 48, 48, 49, 50, 51, 52);
EF_WGMMA_BF16_OF_REGISTERS(128, 64, 64, 65, 66, 67, 68);

#undef EF_NAMES_16
#undef EF_REGISTERS_16
#undef EF_NAMES_20
#undef EF_REGISTERS_20
#undef EF_NAMES_24
#undef EF_REGISTERS_24
#undef EF_NAMES_28
#undef EF_REGISTERS_28
#undef EF_NAMES_32
#undef EF_REGISTERS_32
#undef EF_NAMES_40
#undef EF_REGISTERS_40
#undef EF_NAMES_48
#undef EF_REGISTERS_48
#undef EF_NAMES_64
#undef EF_REGISTERS_64
#undef EF_NAMES_96
#undef EF_REGISTERS_96
#undef EF_FOUR
#undef EF_WGMMA
#undef EF_WGMMA_BF16
#undef EF_WGMMA_BF16_OF_REGISTERS

}  // namespace eightfold
