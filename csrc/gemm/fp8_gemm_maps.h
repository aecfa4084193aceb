// The tensor maps of fp8_gemm's operands: boxes of some rows by 128 of K.
#pragma once

#include "core/tensor_map.h"

namespace eightfold {

constexpr int kFp8GemmStepK = 128;  // codes of K in a step: a scale group, and one swizzled row of 128 bytes

inline CUtensorMap fp8_gemm_codes_map(const uint8_t* codes, int64_t rows, int64_t k, int64_t ld, int box_rows) {
  return encode_tensor_map({codes,
                            {k, rows},
                            {0, ld},
                            {kFp8GemmStepK, static_cast<uint32_t>(box_rows)},
                            CU_TENSOR_MAP_DATA_TYPE_UINT8,
                            1,
                            CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B});
}

// The same rows in an order in which a lane's results of the matrix instruction (core/wgmma.cuh) are eight neighbours: row
// 8 * h + 2 * q + e of 32 in shared memory is row 8 * q + 2 * h + e in device memory (q, h below 4, e below 2). A box begins at index
// (k, 0, 0, 0, row / 32); rows are a multiple of 32.
inline CUtensorMap fp8_gemm_arranged_columns_map(const uint8_t* codes, int64_t rows, int64_t k, int64_t ld, int box_rows) {
  return encode_tensor_map({codes,
                            {k, 2, 4, 4, rows / 32},
                            {0, ld, 8 * ld, 2 * ld, 32 * ld},
                            {kFp8GemmStepK, 2, 4, 4, static_cast<uint32_t>(box_rows / 32)},
                            CU_TENSOR_MAP_DATA_TYPE_UINT8,
                            1,
                            CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B});
}

// Rows of a of a math warpgroup, `blocks` times 64 (of which rows are a multiple): row 16 * w + 8 * half + r of block `block` in shared
// memory is row blocks * (16 * w + 2 * r) + 2 * block + half in device memory (w below 4, r below 8), so that a lane's rows are
// neighbours. A box of `box_rows` begins at index (k, 0, 0, 0, row / (64 * blocks)) and holds the block's 64 rows of each warpgroup.
inline CUtensorMap fp8_gemm_arranged_rows_map(const uint8_t* codes, int64_t rows, int64_t k, int64_t ld, int box_rows, int blocks,
                                              int block) {
  return encode_tensor_map({codes + 2 * block * ld,
                            {k, 8, 2, 4, rows / (64 * blocks)},
                            {0, 2 * blocks * ld, ld, 16 * blocks * ld, 64 * blocks * ld},
                            {kFp8GemmStepK, 8, 2, 4, static_cast<uint32_t>(box_rows / (64 * blocks))},
                            CU_TENSOR_MAP_DATA_TYPE_UINT8,
                            1,
                            CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B});
}

inline CUtensorMap fp8_gemm_scales_map(const float* scales, int64_t rows, int64_t steps, int64_t ld, int box_rows) {
  return encode_tensor_map({scales,
                            {rows, steps},
                            {0, 4 * ld},
                            {static_cast<uint32_t>(box_rows), 1},
                            CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                            4,
                            CU_TENSOR_MAP_SWIZZLE_NONE,
                            CU_TENSOR_MAP_L2_PROMOTION_NONE});
}

}  // namespace eightfold
