// What stands between the convolutions of an autoencoder, over pixels of channels [rows, cols], in fp32 and rounded once:
//
//   bias_silu      y = s * sigmoid(s), s = x + bias
//   rms_norm_add   y = x * rstd * weight + bias + residual, rstd = 1 / sqrt(mean of x^2 + eps)
//
// Floor: each input read once, the result written once (4 bytes an element in bf16, and 6). torch takes two and four passes with
// intermediate results: 8 and 18 bytes. A sum goes over a row's octets, lane by lane, then over lanes as a tree: in one order for a width.
//
// GPU: an octet a thread; a row for 16 or 32 lanes of up to eight octets each. Limits there: cols a multiple of 8, up to 2,048 for the
// norm, addresses whole in 16 bytes. CPU: any.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace eightfold::conv {

constexpr int64_t kMaxNormCols = 2048;  // on the GPU

struct PixelVector {  // [cols]
  const void* data;
  DType dtype;  // bf16 or f32
};

struct BiasSilu {
  const void* x;  // dense, as y
  DType dtype;    // bf16 or f32, of x and y
  int64_t rows, cols;
  PixelVector bias;
  void* y;
};

struct RmsNormAdd {
  const void *x, *residual;
  DType dtype;
  int64_t rows, cols;
  PixelVector weight, bias;
  float eps;
  void* y;
};

void bias_silu_cpu(const BiasSilu& op);
void bias_silu_sm90(const BiasSilu& op, void* stream);
void rms_norm_add_cpu(const RmsNormAdd& op);
void rms_norm_add_sm90(const RmsNormAdd& op, void* stream);

}  // namespace eightfold::conv
