// What attention leaves of its backward pass, to operands of the products before it: the gradients of queries and keys are rotated
// back (rotary.h) and rounded to their dtype, those of values are taken as they are, and all are cast beside each other, by rows
// (1 x 128) and by columns (128 x 1). The bytes are those of rotary, then quantize_beside. On request, too: the gradient of the
// layers' biases, which is the sum of the rounded values over the tokens.
//
// Bytes an element, from bf16: 2 + 1 + 1 + 8/128. The separate ops move 4 more for queries and keys, and sums 2 more for all. The
// tables are 512 bytes a token (heads of 128) and are read again by every head, from the second-level cache.
//
// Sums are fp32, in an order that the shape alone decides: eight rows in turn (a band), two bands, eight such pairs in turn (a tile
// of 128 rows), ceil(tiles / 8) tiles in turn (a run), eight runs in turn. Rows that do not exist count as zeros.
//
// GPU: the tile kernel of quant/tile_cast.cuh. A thread holds octets of a row; the octet that pairs with one is dim / 16 lanes away.
// Limits there: dim 64 or 128, a multiple of 8 tokens in a sequence, addresses and strides whole in 16 bytes. CPU: any.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "quant/cast.h"

namespace eightfold {

constexpr int kSumRuns = 8;

struct RotaryBackward {
  struct Gradient {  // [batch, tokens, heads, dim], element strides, dim contiguous
    const void* data;
    int64_t batch_stride, token_stride, head_stride, heads;
  };
  Gradient parts[3];  // of queries, keys and values; heads * dim of the first two is a multiple of 128
  DType dtype;        // bf16 or f32
  int64_t batch, tokens, dim;
  const float *cos, *sin;  // as in Rotary
  int64_t table_batch_stride;
  quant::Quantized row_codes, col_codes;  // of [batch * tokens, cols()]; col_codes.codes null: not wanted
  float* sums;                            // [cols()], null: not wanted
  float* partials;                        // workspace for sums: [row tiles, cols()]

  int64_t rows() const { return batch * tokens; }
  int64_t first(int part) const { return part == 0 ? 0 : first(part - 1) + parts[part - 1].heads * dim; }
  int64_t cols() const { return first(3); }
};

void rotary_backward_quantize_cpu(const RotaryBackward& op);

// Whether the limits hold; col_codes are wanted.
bool rotary_backward_fits_sm90(const RotaryBackward& op);
void rotary_backward_quantize_sm90(const RotaryBackward& op, void* stream);

// The sums alone, of matrices beside each other, with the same bits; partials as above.
void column_sums_sm90(const quant::Parts& x, float* sums, float* partials, void* stream);

}  // namespace eightfold
