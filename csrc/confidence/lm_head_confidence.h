// The language model's head without logits: of each row the token and its probability, for models that uncover the tokens of which they
// are sure (Fast-dLLM, arXiv 2505.22618, section 3.3).
//
//   x = hidden @ weight^T in fp32, with the bits of gemm or fp8_gemm; forbidden tokens are -inf
//   id = arg max of x (the lowest of equal ones), or of x / T + Gumbel noise (sampling/sampling.h) where the row's temperature T is not 0
//   confidence = exp(x[id] - max) / sum over v of exp(x[v] - max)
//
// A row that is not asked for (active) gives -1 and -inf. A row whose probabilities do not exist (a logit that is allowed is NaN or
// +inf, or all are -inf), or whose temperature is out of range, gives -1 and NaN. A temperature below 1e-30 counts as 0.
//
// The vocabulary is taken in tiles: 128 columns (bf16), 64 (codes), 1024 (CPU), whatever the number of rows. Each leaves its maximum, the
// sum relative to it, and its best token; a row's tiles are folded in one order. So a row's results have the same bits in any company.
//
// Data movement: the weight is read once for 256 rows, from then on nothing but 16 bytes a row and tile (20 with noise) is written and
// read. Floor: V * H elements of the weight. Up to some 128 rows it is memory that is waited for: the multiplication, and what is done
// with a tile's logits, take place while the copy engine fills the ring for the next tile.
#pragma once

#include <cstdint>

#include "gemm/fp8_gemm.h"
#include "gemm/gemm.h"
#include "sampling/sampling.h"

namespace eightfold {

struct LmHeadConfidence {
  bool codes;                        // which of the products it is; its out is not used
  GemmArgs plain;                    // k > 0
  Fp8GemmArgs quantized;             // b_group_rows 128, k > 0
  int64_t rows, vocabulary;          // m and n of the product
  const uint8_t* active;             // [rows], or null: all
  const int64_t* forbidden;          // [forbidden_count]; on CUDA, what is no column is passed over
  int64_t forbidden_count;           // below the vocabulary
  const float* temperatures;         // [rows], or null: all 0
  const int64_t *seeds, *positions;  // [rows] where there are temperatures
  int64_t* ids;                      // [rows]
  float* confidence;                 // [rows]
  void* workspace;                   // CUDA: lm_head_confidence_workspace bytes, 16-byte aligned
};

void lm_head_confidence_cpu(const LmHeadConfidence& op);
void lm_head_confidence_sm90(const LmHeadConfidence& op, void* stream);
int64_t lm_head_confidence_workspace(const LmHeadConfidence& op);

// --- words of a logit, for host and device ---

EF_HD bool confidence_temperature_valid(float temperature) { return temperature >= 0.0f && temperature < INFINITY; }
EF_HD bool confidence_is_drawn(float temperature) { return temperature >= 1e-30f && temperature < INFINITY; }

// What a drawn row is ranked by: x / T plus noise, in units of log 2. There is no maximum to subtract first: it is not known yet.
EF_HD float confidence_score(float x, float temperature, uint32_t word) { return sample_score(sample_log2(x, 0.0f, temperature), word); }

}  // namespace eightfold
