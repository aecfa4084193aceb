// AdamW over many tensors at once, both moments in E4M3 with dynamic range expansion (dre.h).
//
//   m, v = decode(states)       g = grad * grad_scale
//   m = b1 m + (1 - b1) g       v = b2 v + (1 - b2) g^2
//   p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)        with these fresh fp32 moments
//   states = encode(m, v)
//
// Data movement, once each way: parameter, gradient (read), 2 x 1.039 bytes of state. Floor per parameter: 10.2 B with bf16
// parameters and gradients, 16.2 B with fp32 (28 B for AdamW with fp32 states): 3.4 and 5.4 ms for 1 G parameters at 3.0 TB/s.
// Arithmetic is 10 powers, roots and reciprocals an element: 0.65 cycles of an SM's special-function unit, below the bf16 floor's
// 0.79; the 55 instructions take 0.43. (Reading two of the powers from a table in shared memory was slower on an H100, and so were
// evict-first loads and stores: 95 % of copy bandwidth without, 90 to 91 % with.)
//
// Shape of the kernel (sm_90a): 8 lanes own a group of 128, each lane packs of 8 (fp32 parameters: 4) neighbours interleaved so
// that every load of a warp is whole sectors. With bf16 a lane loads its next group before it encodes this one. Moments are kept
// in units in which a decoded power and its group's factor are one operand of the update's multiply-add (UnitConstants). Even
// lanes reduce and work out the scale of m, odd lanes that of v. One launch takes up to kMaxTensors tensors in its parameter
// block; a block of threads finds its tensor there and takes a group for every 8 lanes, then those a stride of all blocks of that
// tensor further, so that what is in flight lies together. Tensors that are not aligned or have rows that are no multiple of 128,
// and stochastic states, take a second instantiation. The CPU kernel is the same over groups, with dre.h's own arithmetic.
//
// Random bits: random_bits.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "optim/dre.h"
#include "optim/random_bits.h"

namespace eightfold {

// rows x row_length elements, contiguous; at least one. Groups restart at each row: metadata [rows, ceil(row_length / 128)].
struct AdamwTensor {
  void* param;       // f32, or bf16: rounded stochastically, or to nearest from `master`
  const void* grad;  // f32 or bf16
  float* master;     // the parameter in f32, or null
  uint8_t *m_codes, *v_codes;
  float *m_maxima, *v_maxima;
  uint8_t *m_exponents, *v_exponents;
  const float* step;  // on the tensors' device, already counting this step: 1, 2, ...
  int64_t rows, row_length;
  int64_t offset;  // of the first element in the random stream
  DType param_type, grad_type;
};

struct AdamwOptions {
  const float* lr;          // on the tensors' device
  const float* grad_scale;  // likewise, or null for 1
  double beta1, beta2, eps, weight_decay;
  bool stochastic_states;
  uint64_t seed;
};

void adamw_dre_cpu(const AdamwTensor* tensors, int64_t count, const AdamwOptions& options);

// A tensor may have at most 2^31 - 1 groups.
void adamw_dre_cuda(const AdamwTensor* tensors, int64_t count, const AdamwOptions& options, void* stream);

// What the host knows about the scalars, in fp32 for either kernel.
struct AdamwConstants {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps, weight_decay;
};

inline AdamwConstants adamw_constants(const AdamwOptions& o) {
  return {static_cast<float>(o.beta1),     static_cast<float>(1 - o.beta1),       static_cast<float>(o.beta2),
          static_cast<float>(1 - o.beta2), static_cast<float>(std::log(o.beta1)), static_cast<float>(std::log(o.beta2)),
          static_cast<float>(o.eps),       static_cast<float>(o.weight_decay)};
}

// The CUDA kernel's units: gradients times 2^12, m times 2^12 / (1 - beta1), v times 2^24 / (1 - beta2). Fresh gradients then
// need no factor, and no second moment that fp32 can hold is subnormal.
constexpr float kMomentUnit = 4096.0f;

struct UnitConstants {
  AdamwConstants plain;
  float m_feed, v_feed;  // stored maximum -> decayed moment in its unit
  float m_unit, v_unit;  // moment in its unit -> moment
  float root_unit;       // sqrt(v) in its unit -> sqrt(v)
};

inline UnitConstants unit_constants(const AdamwOptions& o) {
  const double unit = kMomentUnit, m = (1 - o.beta1) / unit, v = (1 - o.beta2) / (unit * unit);
  return {adamw_constants(o),    static_cast<float>(o.beta1 / m), static_cast<float>(o.beta2 / v),
          static_cast<float>(m), static_cast<float>(v),           static_cast<float>(std::sqrt(v))};
}

// What one step of one tensor needs: bias corrections are -expm1(t log b), exact where 1 - b^t would cancel.
struct AdamwScalars {
  float grad_scale, decay, step_size, root_scale;
};

EF_HD AdamwScalars adamw_scalars(const AdamwConstants& c, float lr, float step, float grad_scale) {
  float correction1 = -expm1f(step * c.log_beta1), correction2 = -expm1f(step * c.log_beta2);
  return {grad_scale, 1.0f - lr * c.weight_decay, lr / correction1, 1.0f / sqrtf(correction2)};
}

}  // namespace eightfold
