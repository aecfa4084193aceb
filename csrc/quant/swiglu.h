// SwiGLU, alone or with the casts around it: h = gate * sigmoid(gate) * up, the input of the down projection.
//
// Forward: h in fp32, rounded to gate's dtype, written or cast in groups (1, 128). Training also casts gate and up from the same load;
// these codes are all that the backward pass keeps (2 bytes per element instead of 4, and h is never stored).
//   bytes per element in bf16: 4 read, 1 written (2 for h itself, 3 in training)
//
// Backward, from dh and the codes of gate and up, with s = sigmoid(gate):
//   dgate = dh * up * s * (1 + gate * (1 - s))     dup = dh * gate * s     h = gate * s * up
// each rounded to dh's dtype. dgate and dup feed dgrad (row codes) and wgrad (column codes); h is down's wgrad operand (column codes).
//   bytes per element: 2 + 1 + 1 read, 5 written, all from one load of a 128 x 128 tile
#pragma once

#include "core/dtype.h"
#include "quant/cast.h"

namespace eightfold::quant {

// gate and up: [rows, cols] in `dtype` (bf16 or f32), element (r, c) at r * ld + c: both may be halves of one wider buffer.
struct SwigluForward {
  const void* gate;
  const void* up;
  int64_t gate_ld, up_ld;
  DType dtype;
  int64_t rows, cols;
  void* y;                        // h itself, [rows, cols] contiguous in `dtype`; null: not wanted
  Quantized h, gate_out, up_out;  // codes null: not wanted; gate_out and up_out both or neither
};

struct SwigluBackward {
  const void* dh;
  int64_t dh_ld;
  DType dtype;
  RowCodes gate, up;
  int64_t rows, cols;
  bool beside;  // row codes of dgate and dup are halves of one buffer [rows, 2 * cols]
  Quantized dgate_rows, dup_rows;
  Quantized dgate_cols, dup_cols, h_cols;
};

void swiglu_cpu(const SwigluForward& op);
void swiglu_backward_quantize_cpu(const SwigluBackward& op);
void swiglu_sm90(const SwigluForward& op, void* stream);
void swiglu_backward_quantize_sm90(const SwigluBackward& op, void* stream);

}  // namespace eightfold::quant
