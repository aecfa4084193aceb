// Sequences one after the other.
#include <algorithm>
#include <cmath>

#include "confidence/uncover.h"

namespace eightfold {
namespace {

void uncover_block(const Uncover& op, int64_t b) {
  int64_t* tokens = op.tokens + b * op.ld + op.at[b];
  const int64_t* ids = op.ids + b * op.rows;
  const float* confidence = op.confidence + b * op.rows;
  int64_t order[kUncoverRows], candidates = 0;
  for (int64_t i = 0; i < op.rows; ++i)
    if (tokens[i] == op.mask_id && ids[i] >= 0 && ids[i] != op.mask_id && !std::isnan(confidence[i])) order[candidates++] = i;
  std::stable_sort(order, order + candidates, [&](int64_t i, int64_t j) { return confidence[i] > confidence[j]; });
  const int64_t most = op.counts == nullptr ? candidates : std::min<int64_t>(candidates, op.counts[b]);
  int64_t taken = std::min<int64_t>(candidates, 1);
  while (taken > 0 && taken < most && confidence[order[taken]] >= op.bounds[taken]) ++taken;
  if (op.last_too && taken > 0 && taken + 1 == candidates) ++taken;
  for (int64_t n = 0; n < taken; ++n) tokens[order[n]] = ids[order[n]];

  const int64_t* first_mask = std::find(tokens, tokens + op.rows, op.mask_id);
  op.left[b] = static_cast<int32_t>(std::count(first_mask, static_cast<const int64_t*>(tokens + op.rows), op.mask_id));
  if (op.ended == nullptr) return;
  const auto ends = [&](int64_t token) { return std::find(op.eos_ids, op.eos_ids + op.eos_count, token) != op.eos_ids + op.eos_count; };
  if (std::any_of(static_cast<const int64_t*>(tokens), first_mask, ends)) op.ended[b] = 1;
}

}  // namespace

void uncover_cpu(const Uncover& op) {
  for (int64_t b = 0; b < op.batch; ++b) uncover_block(op, b);
}

}  // namespace eightfold
