// The C functions that libeightfold.so exports to `_C`, which finds them by name at run time: the library links no Python, and
// `_C` can be built for another Python without rebuilding the kernels.
#pragma once

#include <cstdint>

#define EF_EXPORT extern "C" __attribute__((visibility("default")))

// A JSON object: {"cuda": bool, "cuda_version": "13.0" or null, "compiler": "...", "cpu_gemm": "avx2"}.
EF_EXPORT const char* eightfold_build_info();

// A JSON object: {"tile_m", "tile_n", "stages", "tiles_m", "tiles_n", "grid", "waves"}, all integers. m, n, k, sm_count > 0;
// b_group_rows is 1 or 128. The text lives until the thread's next call.
EF_EXPORT const char* eightfold_gemm_plan(int64_t m, int64_t n, int64_t k, int b_group_rows, int sm_count);
