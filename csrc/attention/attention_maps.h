// The tensor maps of attention's operands: boxes of 64 of the dimension by some rows of one head, 128-byte swizzle.
#pragma once

#include <algorithm>

#include "attention/attention.h"
#include "core/tensor_map.h"

namespace eightfold::attention {

constexpr int kRowsOfBox = kAttentionTile;

// [tokens, heads, dim]: a box begins at (column, head, token).
inline CUtensorMap rows_map(const AttentionRows& rows, int64_t tokens, int64_t heads, int64_t dim, uint32_t of_box = kRowsOfBox) {
  return encode_tensor_map({rows.data,
                            {dim, heads, tokens},
                            {0, 2 * rows.head_stride, 2 * rows.token_stride},
                            {64, 1, of_box},
                            CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                            2,
                            CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B});
}

// [pages, kv_heads, page_size, dim], dense: a box, of `most` keys of a page or all of it, begins at (column, key of the page, head, page).
inline CUtensorMap pages_map(const void* pages, const PagedAttention& op, int most = kRowsOfBox) {
  const int64_t row = 2 * op.dim, head = row * op.page_size;
  return encode_tensor_map({pages,
                            {op.dim, op.page_size, op.kv_heads, op.page_count},
                            {0, row, head, head * op.kv_heads},
                            {64, static_cast<uint32_t>(std::min<int64_t>(op.page_size, most)), 1, 1},
                            CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                            2,
                            CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B});
}

}  // namespace eightfold::attention
