// Keeps the compiler from moving memory accesses across this point; no instruction.
#pragma once

#define EF_COMPILER_FENCE() asm volatile("" ::: "memory")
