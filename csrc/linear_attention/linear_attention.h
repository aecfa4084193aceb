// Linear attention with the feature map phi = ReLU (Katharopoulos et al., arXiv 2006.16236; SANA, arXiv 2410.10629). Of a sample and head,
// with dim x dim states and sums over keys j that exist:
//
//   S = S_in + sum phi(k_j) v_j^T     z = z_in + sum phi(k_j)     D_i = phi(q_i) . z + eps     o_i = phi(q_i)^T S / D_i
//
// Backward, from q, k, v, S and z alone (g: gradient of o; dS_out, dz_out: of the states that the forward pass gives away):
//
//   dn_i = g_i / D_i    dD_i = -(o_i . dn_i)    dS = dS_out + sum phi(q_i) dn_i^T    dz = dz_out + sum phi(q_i) dD_i
//   dphi(q_i) = S dn_i + z dD_i    dphi(k_j) = dS v_j + dz    dv_j = dS^T phi(k_j)    ReLU's gradient at 0 is 0
//
// Everything is fp32, results are rounded once. S dn and z dD nearly cancel where the mean of v is far from 0 (by sqrt(tokens)), so on CUDA
// dn is rounded to bf16 before anything is made of it: gradients are those of a g that differs by half an ulp, and what cancels still does.
// States are operands in two bf16 parts, 2^-18 of an element away from fp32.
//
// Order of operations: tokens are split into spans by their number alone, so a token's output depends on its sample only. A span's sums run
// over its tokens in order; spans are added in order.
//
// Floor: q, k, v read and o written once, 8 bytes a token and channel; backward 14 (q, k, v, g read; dq, dk, dv written). With heads
// 70 x 32 at the 3.0 TB/s an H100 copies with: 2 x 1,024 tokens 36.7 MB = 12.2 us, 16 x 1,024 294 MB = 98 us, 2 x 16,384 587 MB = 196 us;
// backward 21, 171 and 343 us. 16 bytes of memory traffic bring 64 multiply-adds (dim 32): bytes bound it, even on mma.sync.
//
// GPU. Blocks take 128 columns (4 heads of 32, 2 of 64, one of 128), so that a token's row is read in runs of 256 bytes:
//
//   sums     k and v. A cluster of 8 blocks takes 8 neighbouring spans; tiles of tokens come through cp.async, three or more on their
//            way; a warp keeps 32 x 32 (dim 128: 32 x 64) of S and of z in registers, mma.sync over 16 tokens at a time, operands by
//            ldmatrix.trans, which turns tokens into the dimension that is summed over. The cluster folds its 8 states through distributed
//            shared memory, in order. Up to 4,096 tokens a cluster is all of a head, and its state the state
//   fold     more tokens: up to 32 clusters' states, in order, by a kernel of its own (2 MB for 2 x 16,384)
//   apply    q to o, a warp 16 tokens at a time, from registers to registers: a lane loads 16 bytes of a token and keeps them, because the
//            rows of S lie in shared memory in the order that makes these the left operand, its columns in the order that gives the lane 16
//            bytes of o. z is eight equal columns beside S: each lane finds its D in its own registers. Codes: the four lanes of a row
//            hold all 128 columns of a group
//
//   backward, queries   sums with another right operand: a warp makes D, o, dn, dD and dq of 16 tokens of a head, puts dn in the place of g
//                       in shared memory, and all warps then sum phi(q)^T [dn | dD] as above, to dS and dz
//   backward, keys      apply with two products: dk from v and dS, dv from k and dS
//
// Kernels start while the one before runs (programmatic dependent launch). apply and keys load their first tokens before they wait for
// states: q, k and v were there before the kernel of the sums went on. With 2 x 1,024 tokens all blocks of the sums run at once, and half
// of apply's beside them.
//
// Why so. wgmma takes 64 rows, twice a head's 32 of S; mma.sync needs 20 instructions for 32 tokens of a head and span of k and v, 4 KB
// that take a multiprocessor 315 clocks to fetch. A cluster folds on the chip what a kernel of its own would read back: 8 states a head are
// 38 MB for 16 x 1,024. Spans of up to 512 tokens: 4 blocks a multiprocessor (dim 32), two waves of them for 2 x 16,384.
//
// Predicted, not measured, heads 70 x 32. Forward: 2 x 16,384 213 us (sums 103, fold 3, apply 107: 92 % of copy), 16 x 1,024 112 us, 2 x
// 1,024 12 us in a graph (launch 1, sums 5.5, of which two waits for memory 2 and the cluster's fold 1.5, apply 5). Forward and backward: 2
// x 16,384 600 us against a floor of 539, 2 x 1,024 40 us. The queries' kernel, the one with most to compute, takes 510 instructions of a
// warp for 16 tokens of a head, whose 3 KB are 236 clocks of a multiprocessor's memory: half of its issue slots.
//
// Limits: dim 32, 64 or 128, contiguous, any other strides; on CUDA bf16, rows 16-byte aligned. Sizes may be 0. Offsets are 64-bit.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "quant/cast.h"

namespace eightfold {

// [batch, tokens, heads, dim], dim contiguous; element strides.
struct HeadRows {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

struct LinearAttention {
  HeadRows q, k, v;
  DType dtype;  // bf16, or on the CPU fp32
  int64_t batch, tokens, heads, dim;
  const uint8_t* key_mask;                // [batch, tokens] dense, 0: the key does not exist and is not read; may be null
  const float *state_in, *normalizer_in;  // as below; both or neither null
  float *state, *normalizer;              // S [batch, heads, dim, dim], z [batch, heads, dim], dense
  float eps;
  void* out;               // [batch, tokens, heads, dim] dense in `dtype`; null: codes
  quant::Quantized codes;  // of out, rounded to `dtype`, as rows [batch * tokens, heads * dim]
};

struct LinearAttentionBackward {
  LinearAttention forward;  // its inputs, its state and normalizer as it gave them
  HeadRows dout, dq, dk, dv;
  const float *dstate_out, *dnormalizer_out;  // gradients of state and normalizer; both or neither null
  float *dstate, *dnormalizer;                // of state_in and normalizer_in
};

void linear_attention_cpu(const LinearAttention& op);
void linear_attention_backward_cpu(const LinearAttentionBackward& op);

// Bytes of workspace for either pass; decided by sizes alone.
int64_t linear_attention_workspace_sm90(const LinearAttention& op);
void linear_attention_sm90(const LinearAttention& op, void* workspace, void* stream);
void linear_attention_backward_sm90(const LinearAttentionBackward& op, void* workspace, void* stream);

}  // namespace eightfold
