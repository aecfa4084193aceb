// A row of a head into its page on the CPU, for whoever makes keys and values.
#pragma once

#include "attention/attention.h"

namespace eightfold::attention {

inline int64_t element_of(const AttentionRows& rows, int64_t token, int64_t head) {
  return token * rows.token_stride + head * rows.head_stride;
}

// Where the row of a head goes, counted in rows; the slot is not below 0.
inline int64_t place_of(const PagedStore& op, int64_t slot, int64_t head) {
  return (slot / op.page_size * op.kv_heads + head) * op.page_size + slot % op.page_size;
}

// op.dim elements of op.dtype from element `at` of `data`; `wide` has room for them in fp32.
void store_row(const PagedStore& op, const void* data, int64_t at, int64_t place, void* pages, float* scales, float* wide);

}  // namespace eightfold::attention
