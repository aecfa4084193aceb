// The store of attention over pages, then that attention, without a mask.
#include <cstring>
#include <vector>

#include "block_attention/block_attention.h"

namespace eightfold {

void block_attention_cpu(const BlockAttention& op) {
  if (op.sequences == 0 || op.heads == 0) return;
  PagedStore store = op.cache;
  const int64_t tokens = op.sequences * op.rows;
  std::vector<int64_t> slots(tokens);
  std::vector<int32_t> pages(op.sequences), starts(op.sequences + 1);
  for (int64_t s = 0; s < op.sequences; ++s) {
    pages[s] = static_cast<int32_t>(s), starts[s + 1] = static_cast<int32_t>((s + 1) * op.rows);
    for (int64_t i = 0; i < op.rows; ++i) slots[s * op.rows + i] = op.lengths[s] > 0 ? s * store.page_size + op.at[s] + i : -1;
  }
  store.slots = slots.data(), store.tokens = tokens;
  if (store.k.data) paged_store_cpu(store);

  const int64_t bytes = op.rows * op.out.token_stride * (store.dtype == DType::f32 ? 4 : 2);
  for (int64_t s = 0; s < op.sequences; ++s)
    if (op.lengths[s] == 0) std::memset(static_cast<char*>(op.out.data) + s * bytes, 0, bytes);
  PagedAttention attend{};
  attend.q = op.q, attend.out = op.out;
  attend.k_pages = store.k_pages, attend.v_pages = store.v_pages;
  attend.k_scales = store.k_scales, attend.v_scales = store.v_scales;
  attend.dtype = store.dtype, attend.page_dtype = store.page_dtype;
  attend.tokens = tokens, attend.heads = op.heads, attend.kv_heads = store.kv_heads, attend.dim = store.dim;
  attend.page_count = op.sequences, attend.page_size = store.page_size;
  attend.pages = pages.data(), attend.starts = starts.data(), attend.lengths = op.lengths;
  attend.sequences = op.sequences, attend.most_pages = 1, attend.longest = op.rows;
  attend.scale = op.scale, attend.block = kNoMask;
  paged_attention_cpu(attend);
}

}  // namespace eightfold
