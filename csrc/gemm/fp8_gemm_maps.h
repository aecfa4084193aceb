// The tensor maps of fp8_gemm's operands: boxes of some rows by 128 of K.
#pragma once

#include "core/tensor_map.h"

namespace eightfold {

constexpr int kFp8GemmStepK = 128;  // codes of K in a step: a scale group, and one swizzled row of 128 bytes

inline CUtensorMap fp8_gemm_codes_map(const uint8_t* codes, int64_t rows, int64_t k, int64_t ld, int box_rows) {
  return encode_tensor_map({codes, k, rows, ld, kFp8GemmStepK, static_cast<uint32_t>(box_rows), CU_TENSOR_MAP_DATA_TYPE_UINT8, 1,
                            CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B});
}

inline CUtensorMap fp8_gemm_scales_map(const float* scales, int64_t rows, int64_t steps, int64_t ld, int box_rows) {
  return encode_tensor_map({scales, rows, steps, 4 * ld, static_cast<uint32_t>(box_rows), 1, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4,
                            CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE});
}

}  // namespace eightfold
