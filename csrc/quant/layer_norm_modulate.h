// LayerNorm without parameters and modulation by a sample's vectors (AdaLN), alone or after a gated residual, and with casts:
//
//   r    = x + gate * branch, rounded to x's dtype     (r = x without a branch; without a gate it counts as one)
//   mean = mean of r        rstd = 1 / sqrt(mean((r - mean)^2) + eps)        fp32, one per row
//   y    = (r - mean) * rstd * (1 + scale) + shift, rounded to x's dtype; its codes are those of the rounded value
//
// gate, scale and shift are vectors of a sample, which has `tokens` rows. A row's result depends on that row and its sample's vectors
// alone: the sums run in an order fixed by the number of columns. The variance is of differences from the mean, not of squares.
//
// Bytes per element in bf16: 2 read, 2 written (y) or 1 (codes); with a branch 4 read, and 2 written for r. Column codes, which training
// wants and which span 128 rows, come from a second kernel that makes y again: 2 read, 1 written.
//
// Backward, with xhat = (r - mean) * rstd and g = dy * (1 + scale):
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + residual_grad        dbranch = gate * dx        each rounded once
//   dgate = sum of dx * branch        dscale = sum of dy * xhat        dshift = sum of dy        over a sample's rows
// The sums are taken over each of modulate_runs() runs of a sample's rows, in order, and then folded in order. Bytes per element:
// 2 (dy) + 2 (r) + 2 (dx) [+ 2 residual_grad] [+ 4 (branch, dbranch)].
#pragma once

#include "core/dtype.h"
#include "quant/cast.h"

namespace eightfold::quant {

// Runs of consecutive rows of a sample, run r from tokens * r / runs on: of 4 rows or more.
constexpr int64_t kMostModulateRuns = 64;
constexpr int64_t modulate_runs(int64_t tokens) {
  const int64_t fewest = (tokens + 3) / 4;
  return fewest < kMostModulateRuns ? fewest : kMostModulateRuns;
}

// Vectors of a sample, in one dtype (bf16 or f32): element c of sample b at b * ld + c.
struct SampleVectors {
  const void* data;  // null: none
  int64_t ld;
};

// x, branch, r and y are [samples * tokens, cols] contiguous in `dtype` (bf16 or f32).
struct LayerNormModulate {
  const void *x, *branch;  // branch null: none
  SampleVectors gate, scale, shift;
  DType dtype, vector_dtype;
  int64_t samples, tokens, cols;
  float eps;
  void* r;             // written when branch is given
  void* y;             // null: not wanted
  Quantized y_rows;    // of y; codes null: not wanted
  Quantized y_cols;    // of y; wanted together with y_rows, mean and rstd
  float *mean, *rstd;  // [rows], both or neither

  constexpr int64_t rows() const { return samples * tokens; }
};

// dy, x (what was normalised), residual_grad, branch, dx and dbranch as x above.
struct LayerNormModulateBackward {
  const void *dy, *x, *residual_grad, *branch;  // residual_grad null: none; gate.data null: neither gate nor branch
  const float *mean, *rstd;
  SampleVectors scale, gate;
  DType dtype, vector_dtype;
  int64_t samples, tokens, cols;
  void *dx, *dbranch;
  float *dgate, *dscale, *dshift;  // [samples, cols]
  float* partials;                 // workspace [samples, runs, sums(), cols]

  constexpr int64_t rows() const { return samples * tokens; }
  constexpr int64_t sums() const { return gate.data ? 3 : 2; }  // of dshift, dscale, dgate
};

void layer_norm_modulate_cpu(const LayerNormModulate& op);
void layer_norm_modulate_backward_cpu(const LayerNormModulateBackward& op);

constexpr int64_t kMaxModulateCols = 8192;
void layer_norm_modulate_sm90(const LayerNormModulate& op, void* stream);
void layer_norm_modulate_backward_sm90(const LayerNormModulateBackward& op, void* stream);

}  // namespace eightfold::quant
