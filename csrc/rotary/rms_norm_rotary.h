// The norm of each head of queries or keys (quant/norm.h) and their rotation (rotary.h) in one pass, and the pass back. The bits are those
// of the two in sequence: the norm's result is rounded to the dtype before it is rotated, the gradient that is rotated back before the
// norm's backward pass reads it, and dweight is summed in the order of quant/norm.h, a row being a head of a token.
//
// Bytes an element, from bf16: forward 2 + 2, with what the backward pass needs 1 more and 8 a head; backward 2 + 1 + 2 and 8 a head.
// The two apart move 4 more each way. Tables are read once for four heads of a token, from the cache.
//
// GPU: 16 lanes a row, eight elements each, as in quant/norm_short_sm90.cu; the other half of a pair comes by shuffles. Limits there:
// bf16, dim a multiple of 16 up to 128, 2^31 - 1 heads, addresses and strides whole in 16 bytes. CPU: any even dim.
#pragma once

#include "quant/norm.h"
#include "rotary/rotary.h"

namespace eightfold {

struct Heads {  // [batch, tokens, heads, dim] in bf16 or f32, element strides, dim contiguous and even
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
  DType dtype;
  int64_t batch, tokens, heads, dim;

  constexpr int64_t rows() const { return batch * tokens * heads; }  // also for the device
};

struct RotaryTables {  // [1 or batch, tokens, dim / 2], dense
  const float *cos, *sin;
  int64_t batch_stride;  // 0 where all sequences share one table
};

inline Rotary rotary_of(const Heads& x, const RotaryTables& tables, void* y, bool inverse) {
  return {x.data, x.batch_stride, x.token_stride, x.head_stride,       y,      x.dtype, x.batch, x.tokens, x.heads,
          x.dim,  tables.cos,     tables.sin,     tables.batch_stride, inverse};
}

struct RmsNormRotary {
  Heads x;
  RotaryTables tables;
  const void* weight;  // [dim] in `weight_dtype`
  DType weight_dtype;
  float eps;
  void* y;                  // dense, in x's dtype
  quant::Quantized x_rows;  // of x as [rows, dim]; codes null: not wanted
  float* rstd;              // [rows], null: not wanted
};

struct RmsNormRotaryBackward {
  Heads dy;
  RotaryTables tables;
  quant::RowCodes x_codes;  // and rstd, as the forward pass left them
  const float* rstd;
  const void* weight;
  DType weight_dtype;
  void* dx;         // dense, in dy's dtype
  float* dweight;   // [dim]
  float* partials;  // workspace [backward_runs(rows, dim), dim]

  quant::RmsNormBackward norm(const void* rotated_back) const {  // what follows the rotation
    return {rotated_back, nullptr, x_codes, rstd, weight, nullptr, dy.dtype, weight_dtype, dy.rows(), dy.dim, dx, dweight, partials};
  }
};

void rms_norm_rotary_cpu(const RmsNormRotary& op);
void rms_norm_rotary_backward_cpu(const RmsNormRotaryBackward& op);

// Whether the limits hold.
bool rms_norm_rotary_fits_sm90(const RmsNormRotary& op);
bool rms_norm_rotary_backward_fits_sm90(const RmsNormRotaryBackward& op);
void rms_norm_rotary_sm90(const RmsNormRotary& op, void* stream);
void rms_norm_rotary_backward_sm90(const RmsNormRotaryBackward& op, void* stream);

}  // namespace eightfold
