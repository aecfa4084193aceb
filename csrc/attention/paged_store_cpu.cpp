#include <cstring>
#include <vector>

#include "attention/attention.h"
#include "core/fp8.h"
#include "core/threads.h"
#include "quant/span_cpu.h"

namespace eightfold {
namespace {

void store_row(const PagedStore& op, const AttentionRows& rows, int64_t token, int64_t head, int64_t place, void* pages, float* scales,
               float* row) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride;
  if (op.page_dtype != DType::e4m3) {
    const int64_t bytes = op.dtype == DType::f32 ? 4 : 2;
    std::memcpy(static_cast<char*>(pages) + place * op.dim * bytes, static_cast<const char*>(rows.data) + at * bytes, op.dim * bytes);
    return;
  }
  quant::widen(rows.data, op.dtype, at, op.dim, row);
  scales[place] = group_scale(bits_float(quant::amax_bits(row, op.dim)), false);
  quant::encode(row, op.dim, scales[place], static_cast<uint8_t*>(pages) + place * op.dim);
}

}  // namespace

// A task is a head with all tokens in order: where two name one slot, the later stays.
void paged_store_cpu(const PagedStore& op) {
  parallel_for(op.kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(op.dim);
    for (int64_t head = begin; head < end; ++head)
      for (int64_t token = 0; token < op.tokens; ++token) {
        const int64_t slot = op.slots[token];
        if (slot < 0) continue;
        const int64_t place = (slot / op.page_size * op.kv_heads + head) * op.page_size + slot % op.page_size;
        store_row(op, op.k, token, head, place, op.k_pages, op.k_scales, row.data());
        store_row(op, op.v, token, head, place, op.v_pages, op.v_scales, row.data());
      }
  });
}

}  // namespace eightfold
