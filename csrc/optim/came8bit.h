// CAME over many tensors at once, the first moment in 8 bits (Luo et al., arXiv 2307.02047; 8 bits: SANA-1.5, arXiv 2501.18427).
//
// A matrix [rows, cols], g = grad * grad_scale, no bias correction:
//   v_rows = b2 v_rows + (1 - b2) row means of g^2 + eps1       v_cols likewise of columns
//   w = g rsqrt(v_rows / mean(v_rows)) rsqrt(v_cols)            w = w / max(1, RMS(w) / clip_threshold)
//   m = b1 m + (1 - b1) w
//   u_rows = b3 u_rows + (1 - b3) row means of (w - m)^2 + eps2, u_cols likewise
//   p = p (1 - lr wd) - lr m rsqrt(u_rows / mean(u_rows)) rsqrt(u_cols)
// Any other tensor keeps its whole second moment: w = g rsqrt(v), clipped likewise, p = p (1 - lr wd) - lr m.
//
// m is fp32, or a byte an element and (scale, minimum) for every 2,048 consecutive elements, wherever rows end: scale = (max - min) / 255,
// 0 where that is below 2^-126. The step takes the m that has not been through the 8 bits.
//
// The RMS is a sum over all w, which need all sums of g^2; u needs all w and the clip: three turns, two of them global. A fourth, which a
// plain reading of the formulas has (the clip, then u), is saved so: with w' = s' w for a guess s' of the scale 1 / max(1, ...),
// w - m = b1 (s w - m_old), and of d = w' - m_old the sums d^2, d w' and w'^2 give those of (s w - m_old)^2 for the true s = s' (1 + e):
//   sum d^2 + 2 e sum d w' + e^2 sum w'^2
// The guess is the RMS that g^2 would have if it were of rank one, which the first sums tell; it is exact where all of w is about m, which
// is where the sum would cancel.
//
// A NaN or Inf among the gradients of a tensor (of a matrix also a g^2 that overflows) makes its parameter, m and the u of the whole tensor
// NaN, through the mean and the RMS; it is never finite again. In other tensors a g^2 that overflows leaves v infinite and the element
// still.
//
// Bytes a parameter with bf16 parameters and gradients: 2 (g), 3 (g, m), 8 (g, m, p read; m, p written) = 13, with fp32 4 + 5 + 14 = 23;
// and 0.25 for partial sums: 4.4 and 7.8 ms for 1 G parameters at 3.0 TB/s, where what was touched last is not still in L2. A single turn
// would take 8. (Four turns: 15 and 27.)
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/fp8.h"
#include "optim/random_bits.h"

namespace eightfold {

constexpr int kCameBlock = 2048;

// At least one element; contiguous.
struct CameTensor {
  void* param;                               // f32, or bf16: rounded stochastically
  const void* grad;                          // f32 or bf16
  void* m;                                   // bytes, or f32 where m_scales is null
  float* m_scales;                           // [ceil(numel / 2048), 2]: scale, minimum
  float *v_rows, *v_cols, *u_rows, *u_cols;  // of a matrix; for other tensors v_rows is the whole second moment, the others null
  const float* step;                         // keys the random bits; on the tensors' device
  int64_t rows, cols;                        // 1 and numel unless a matrix
  int64_t offset;                            // of the first element in the random stream
  DType param_type, grad_type;

  bool factored() const { return v_cols != nullptr; }
  int64_t numel() const { return rows * cols; }
};

struct CameOptions {
  const float* lr;          // on the tensors' device
  const float* grad_scale;  // likewise, or null for 1
  double beta1, beta2, beta3, eps1, eps2, clip_threshold, weight_decay;
  uint64_t seed;
};

void came8bit_cpu(const CameTensor* tensors, int64_t count, const CameOptions& options);

// How the CUDA kernels take tensors: batches of one kind, each a launch for each phase, in one after the other the same scratch memory.
struct CameBatch {
  int kind;
  std::vector<const CameTensor*> tensors;
};

struct CamePlan {
  std::vector<CameBatch> batches;
  int64_t scratch_floats = 0;
};

// Rows and columns must be below 2^31.
CamePlan came8bit_plan(const CameTensor* tensors, int64_t count);
void came8bit_cuda(const CamePlan& plan, const CameOptions& options, float* scratch, void* stream);

struct CameConstants {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3, eps1, eps2, clip_threshold, weight_decay;
};

inline CameConstants came_constants(const CameOptions& o) {
  return {static_cast<float>(o.beta1),       static_cast<float>(1 - o.beta1), static_cast<float>(o.beta2),
          static_cast<float>(1 - o.beta2),   static_cast<float>(o.beta3),     static_cast<float>(1 - o.beta3),
          static_cast<float>(o.eps1),        static_cast<float>(o.eps2),      static_cast<float>(o.clip_threshold),
          static_cast<float>(o.weight_decay)};
}

// 1 / max(1, rms / clip_threshold); NaN for NaN.
EF_HD float came_clip(const CameConstants& c, float rms) {
  const float divisor = rms / c.clip_threshold;
  return divisor <= 1.0f ? 1.0f : 1.0f / divisor;
}

// s', from means over rows of v_rows and of the fresh means of g^2 + eps1, and means over rows and over columns of fresh / v.
EF_HD float came_guess(const CameConstants& c, float mean_v, float mean_fresh, float row_ratio, float col_ratio) {
  return came_clip(c, sqrtf(mean_v / mean_fresh * row_ratio * col_ratio));
}

// e, from the mean of w'^2.
EF_HD float came_correction(const CameConstants& c, float guess, float mean_ww) {
  return (came_clip(c, sqrtf(mean_ww) / guess) - guess) / guess;
}

// The mean of (w - m)^2 + eps2 from the means of d^2, d w' and w'^2.
EF_HD float came_instability(const CameConstants& c, float e, float dd, float dw, float ww) {
  const float mean = c.beta1 * c.beta1 * (dd + e * (2.0f * dw + e * ww));
  return (mean < 0.0f ? 0.0f : mean) + c.eps2;  // rounding may leave less than nothing; NaN stays
}

// A block's (scale, minimum), and what codes are made with.
struct CameScale {
  float scale, minimum, inverse;

  EF_HD CameScale(float low, float high) : scale((high - low) / 255.0f), minimum(low) {
    const bool finite = scale <= 3.4028234e38f && low >= -3.4028234e38f;
    if (scale < 1.17549435e-38f) scale = 0.0f;
    if (!finite) scale = minimum = bits_float(0x7FC00000u);
    inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  }

  // The code is the low byte: 2^23 leaves no room for fractions.
  EF_HD uint32_t code(float x) const { return float_bits(fmaf(x - minimum, inverse, 8388608.0f)); }
};

}  // namespace eightfold
