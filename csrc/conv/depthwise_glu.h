// The middle of SANA's feed-forward block, between its two 1x1 convolutions (which are products), in one pass over channels-last pixels:
//
//   s = silu(x)        d = depthwise 3x3 of s, zeros around the image, plus bias        y = d[:C] * silu(d[C:])
//
// in fp32, rounded to x's dtype once, written or cast in groups (1, 128). Bytes per pixel in bf16: 4 C read, 2 C written (codes: C).
// FLOP per pixel: 36 C and 3 C logistic functions; an H100 has about as much to compute as to load, so no SiLU is taken twice
// but at the edges of a block's part (depthwise_glu.cuh).
//
// Backward, from dy and x alone: s and d again, then with dd = (dy * silu(gate), dy * value * silu'(gate)) for d = (value, gate)
//   dx = silu'(x) * transposed convolution of dd, rounded once      dweight = sum of dd * s under the tap      dbias = sum of dd
// Bytes per pixel: 6 C read, 4 C written. The sums run over spans of pixels that the image's size alone decides, in a fixed order, and
// the spans' sums are folded in order: the same bits on every run. dx of an image does not depend on the batch around it.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "quant/cast.h"

namespace eightfold::conv {

struct Images {
  int64_t batch, height, width, channels;  // channels: C
  int64_t pixels() const { return batch * height * width; }
};

// weight [2 C, 9] and bias [2 C] are each bf16 or f32.
struct DepthwiseWeights {
  const void *weight, *bias;
  DType weight_dtype, bias_dtype;
};

// x [batch, height, width, 2 C], y and dy [batch, height, width, C], contiguous in `dtype`: f32 or bf16 on the CPU, bf16 on a GPU.
struct DepthwiseGlu {
  Images images;
  DType dtype;
  const void* x;
  DepthwiseWeights weights;
  void* y;                 // null: not wanted
  quant::Quantized codes;  // of y as [pixels, C]; codes null: not wanted
};

struct DepthwiseGluBackward {
  Images images;
  DType dtype;
  const void *dy, *x;
  DepthwiseWeights weights;
  void* dx;
  float *dweight, *dbias;
  float* partials;  // workspace [spans, 10, 2 C]: sums for the nine taps and the bias
};

// Spans of pixels; each device has its own, the reference none.
int64_t depthwise_glu_spans_cpu(const Images& images);
int64_t depthwise_glu_spans_sm90(const Images& images);

void depthwise_glu_cpu(const DepthwiseGlu& op);
void depthwise_glu_backward_cpu(const DepthwiseGluBackward& op);

// C is a multiple of 8; x, y, dy and dx start at multiples of 16 bytes.
void depthwise_glu_sm90(const DepthwiseGlu& op, void* stream);
void depthwise_glu_backward_sm90(const DepthwiseGluBackward& op, void* stream);

}  // namespace eightfold::conv
