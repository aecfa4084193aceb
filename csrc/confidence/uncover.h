// Which tokens of a block a masked diffusion model's step uncovers, and whether a sequence has ended (Fast-dLLM, arXiv 2505.22618,
// section 3.3).
//
// Of each sequence's `rows` tokens from `at` on, candidates are those still masked whose predicted id is a token: not the mask's id, not
// negative, and of a confidence that is no NaN. They are ranked by confidence, the lower place first of equal ones. The first is taken; the
// n-th is if n is at most the sequence's count and its confidence reaches bounds[n - 1]. A rule is a choice of bounds:
//
//   threshold t   t
//   factor f      1 - f / (n + 1): with confidences that fall as bounds rise, the longest run that keeps (n + 1) (1 - confidence) <= f
//   counts        none (-inf)
//
// last_too: where all candidates but the last are taken by their bounds, the last is too; the published code's factor rule does so.
// Floor: a launch. A block takes a sequence, a thread one of its tokens.
#pragma once

#include <cstdint>

namespace eightfold {

constexpr int64_t kUncoverRows = 64;  // of a block, at most

struct Uncover {
  int64_t* tokens;  // [batch, max_tokens], row stride ld
  int64_t batch, rows, max_tokens, ld;
  const int32_t* at;        // [batch]; on CUDA a block that is not inside the sequence is left alone
  const int64_t* ids;       // [batch, rows]
  const float* confidence;  // [batch, rows]
  int32_t* left;            // [batch]: masks that stay in the block
  const int32_t* counts;    // [batch], or null: as many as reach their bounds
  const int64_t* eos_ids;   // [eos_count]
  int64_t eos_count;
  int32_t* ended;  // [batch], or null: 1 once one of eos_ids stands in the block with no mask before it
  int64_t mask_id;
  bool last_too;
  float bounds[kUncoverRows];
};

void uncover_cpu(const Uncover& op);
void uncover_sm90(const Uncover& op, void* stream);

}  // namespace eightfold
