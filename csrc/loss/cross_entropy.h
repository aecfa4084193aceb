// The loss of a language model's head on a chunk of logits, and its gradient while they are at hand. For each row, x = logits * (1 / T),
//   loss = log sum_j exp(x_j) - x_label     grad_j = (exp(x_j) / sum exp - [j == label]) / T * (gradient that reaches the loss)
// in fp32, multiplied in that order; the gradient is rounded once. A row whose label is -100 has loss 0 and gradient 0 (times what
// reaches it); any other label outside [0, cols) gives NaN, never a read out of bounds. A row depends on itself alone and sums in a
// fixed order.
//
// Floor: logits read once, gradient written once (6 bytes a logit with a bf16 gradient). A block takes one row: an online maximum
// and sum, then a second pass that finds the row in the L2 cache (rows of up to 40,000 logits; longer ones are read twice). Of few rows
// eight blocks take each, with the same sums: a token that is generated has the log-probability that training gives it.
// torch's composition (logsumexp, subtract, exp, mask, cast) takes about 56 bytes a logit.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace eightfold {

constexpr int64_t kIgnoredLabel = -100;

struct CrossEntropy {
  const float* logits;  // element (r, c) at r * ld + c
  int64_t rows, cols, ld;
  const int64_t* labels;
  const float* temperatures;  // [rows], T; 0, at which a draw takes the most likely token, counts as 1; null: 1
  const float* grad_output;   // [rows], gradient of each row's loss; null: 1
  float* loss;                // [rows]
  void* grad;                 // [rows, cols] dense in grad_type (bf16 or f32), or null
  DType grad_type;
};

void cross_entropy_cpu(const CrossEntropy& op);
void cross_entropy_sm90(const CrossEntropy& op, void* stream);

}  // namespace eightfold
