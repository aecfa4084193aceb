#include <vector>

#include "attention/paged_store_cpu.h"
#include "core/threads.h"
#include "quant/fused_cpu.h"
#include "quant/norm.h"
#include "rotary/rotary.h"

namespace eightfold {
namespace {

using namespace attention;

std::vector<float> weight_of(const RopeCacheWrite& op, const void* weight) {
  std::vector<float> wide(weight ? op.store.dim : 0);
  if (weight) quant::widen(weight, op.weight_dtype, 0, op.store.dim, wide.data());
  return wide;
}

// A row of a head, normalised unless `weight` is empty, and rotated; to element `to` of `out`.
void turn(const RopeCacheWrite& op, const AttentionRows& x, const std::vector<float>& weight, int64_t token, int64_t head, float* wide,
          void* out, int64_t to) {
  const int64_t dim = op.store.dim, half = dim / 2;
  quant::widen(x.data, op.store.dtype, element_of(x, token, head), dim, wide);
  if (!weight.empty()) {
    quant::rms_norm_row(wide, weight.data(), dim, op.eps, wide);
    quant::round_span(wide, op.store.dtype, dim);
  }
  rotate_head(wide, op.cos + token * half, op.sin + token * half, half, 1.0f);
  quant::narrow(wide, dim, out, op.store.dtype, to);
}

}  // namespace

// A task is a head with all tokens in order, as in paged_store_cpu: first those of k and v, then those of q.
void rope_cache_write_cpu(const RopeCacheWrite& op) {
  const PagedStore& store = op.store;
  const std::vector<float> q_weight = weight_of(op, op.q_weight), k_weight = weight_of(op, op.k_weight);
  parallel_for(store.kv_heads + op.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(store.dim), turned(store.dim);  // `turned` in the dtype, which is no wider
    for (int64_t task = begin; task < end; ++task)
      for (int64_t token = 0; token < store.tokens; ++token) {
        if (task >= store.kv_heads) {
          const int64_t head = task - store.kv_heads;
          turn(op, op.q, q_weight, token, head, wide.data(), op.out.data, element_of(op.out, token, head));
          continue;
        }
        if (store.slots[token] < 0) continue;
        const int64_t place = place_of(store, store.slots[token], task);
        turn(op, store.k, k_weight, token, task, wide.data(), turned.data(), 0);
        store_row(store, turned.data(), 0, place, store.k_pages, store.k_scales, wide.data());
        store_row(store, store.v.data, element_of(store.v, token, task), place, store.v_pages, store.v_scales, wide.data());
      }
  });
}

}  // namespace eightfold
