#include "attention/paged_store_cpu.h"

#include <cstring>
#include <vector>

#include "core/fp8.h"
#include "core/threads.h"
#include "quant/span_cpu.h"

namespace eightfold {

void attention::store_row(const PagedStore& op, const void* data, int64_t at, int64_t place, void* pages, float* scales, float* wide) {
  if (op.page_dtype != DType::e4m3) {
    const int64_t bytes = op.dtype == DType::f32 ? 4 : 2;
    std::memcpy(static_cast<char*>(pages) + place * op.dim * bytes, static_cast<const char*>(data) + at * bytes, op.dim * bytes);
    return;
  }
  quant::widen(data, op.dtype, at, op.dim, wide);
  scales[place] = group_scale(bits_float(quant::amax_bits(wide, op.dim)), false);
  quant::encode(wide, op.dim, scales[place], static_cast<uint8_t*>(pages) + place * op.dim);
}

// A task is a head with all tokens in order: where two name one slot, the later stays.
void paged_store_cpu(const PagedStore& op) {
  using namespace attention;
  parallel_for(op.kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(op.dim);
    for (int64_t head = begin; head < end; ++head)
      for (int64_t token = 0; token < op.tokens; ++token) {
        if (op.slots[token] < 0) continue;
        const int64_t place = place_of(op, op.slots[token], head);
        store_row(op, op.k.data, element_of(op.k, token, head), place, op.k_pages, op.k_scales, wide.data());
        store_row(op, op.v.data, element_of(op.v, token, head), place, op.v_pages, op.v_scales, wide.data());
      }
  });
}

}  // namespace eightfold
