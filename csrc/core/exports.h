// The C functions that libeightfold.so exports to `_C`, which finds them by name at run time: the library links no Python, and
// `_C` can be built for another Python without rebuilding the kernels.
#pragma once

#include <cstdint>

#define EF_EXPORT extern "C" __attribute__((visibility("default")))

// A JSON object: {"cuda": bool, "cuda_version": "13.0" or null, "compiler": "...", "cpu_gemm": "avx2"}.
EF_EXPORT const char* eightfold_build_info();
