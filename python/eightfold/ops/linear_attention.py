"""Linear attention with the feature map ReLU (Katharopoulos et al., arXiv 2006.16236; SANA, arXiv 2410.10629), with
gradients; no softmax, no mask of positions, cost linear in the tokens.

Of each sample and head, over the keys that exist:

    S = S_in + sum_j relu(k_j) v_j^T    z = z_in + sum_j relu(k_j)    o_i = relu(q_i)^T S / (relu(q_i) . z + eps)

A token's result depends on its own sample alone, not on the batch around it, and is the same bits again.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eightfold.ops import _library, layouts  # noqa: F401  (loads torch.ops.eightfold)
from eightfold.ops.quant import QuantizedTensor

_ops = torch.ops.eightfold
ROWS = (1, 128)


class LinearAttentionState(NamedTuple):
    """What all keys so far leave to those that follow: constant memory for sequences that come block by block."""

    state: Tensor  # S, float32 [batch, heads, dim, dim]
    normalizer: Tensor  # z, float32 [batch, heads, dim]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    carried: LinearAttentionState | None = None,
    eps: float = 1e-15,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """relu(q) (S_in + relu(k)^T v), each row divided by relu(q) . (z_in + the sum of relu(k)) + eps.

    Args:
        q, k, v: bfloat16, or float32 on the CPU, [batch, tokens, heads, dim] of one dtype, dim 32, 64 or 128 and
            contiguous, any other strides (on CUDA multiples of 8, from a multiple of 16 bytes): slices of one
            projection [batch, tokens, 3, heads, dim] or [batch, tokens, heads, 3, dim] are read where they are.
        key_mask: bool [batch, tokens], contiguous: False keys do not exist. Their values are not used, not even NaN.
        carried: S_in and z_in, contiguous; None: zeros.
        eps: 1e-37 or more, added in float32. A query whose relu is all zeros gives zeros.
        return_state: also returns S and z with these keys in them, for the block that follows.

    Sums, states and the division are float32; the result, contiguous in q's dtype, is rounded once. Differentiable once
    in q, k, v and carried, and through the states that are returned; relu's gradient at 0 is 0. Only q, k, v, S and z
    are kept for it. On CUDA gradients are those of an upstream gradient that differs by at most half an ulp of bfloat16
    (csrc/linear_attention/linear_attention.h). Raises RuntimeError for other dtypes, shapes, devices or layouts.
    """
    return _attend(q, k, v, key_mask, carried, eps, return_state)


def linear_attention_packed(
    qkv: Tensor,
    *,
    key_mask: Tensor | None = None,
    carried: LinearAttentionState | None = None,
    eps: float = 1e-15,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """``linear_attention`` of a projection to q, k and v, whose gradient comes as one tensor of its shape, contiguous:
    nothing is copied between it and the projection's products.

    Args:
        qkv: [batch, tokens, 3, heads, dim], otherwise as q; the other arguments, the result and errors as there.

    Raises ValueError for another shape.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"linear_attention_packed: qkv must have shape [batch, tokens, 3, heads, dim], got {list(qkv.shape)}"
        )
    return _attend(qkv, None, None, key_mask, carried, eps, return_state)


def linear_attention_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    carried: LinearAttentionState | None = None,
    eps: float = 1e-15,
    return_state: bool = False,
) -> QuantizedTensor | tuple[QuantizedTensor, LinearAttentionState]:
    """The bytes of ``quantize(linear_attention(q, k, v).view(batch * tokens, heads * dim), (1, 128))``, for the product
    that follows, without the result in between. Arguments and errors are those of ``linear_attention``; it has no
    gradient."""
    codes, scales, *states = _ops.linear_attention_quantize(q, k, v, key_mask, *(carried or (None, None)), eps)
    out = QuantizedTensor(codes, scales, ROWS)
    return (out, LinearAttentionState(*states)) if return_state else out


def _attend(q, k, v, key_mask, carried, eps, return_state):
    inputs = q, k, v, key_mask, *(carried or (None, None))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        out, *states = _LinearAttention.apply(*inputs, eps)
    else:
        out, *states = _ops.linear_attention(*_parts(q, k, v), *inputs[3:], eps)
    return (out, LinearAttentionState(*states)) if return_state else out


def _parts(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, ...]:
    return q.unbind(2) if k is None else (q, k, v)


class _LinearAttention(torch.autograd.Function):
    """Of q, k and v, or of qkv, None and None."""

    @staticmethod
    def forward(q, k, v, key_mask, state, normalizer, eps):
        return _ops.linear_attention(*_parts(q, k, v), key_mask, state, normalizer, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:4], *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, dstate, dnormalizer):
        q, k, v, key_mask, state, normalizer = ctx.saved_tensors
        parts = _parts(q, k, v)
        if grad is None:
            grad = parts[0].new_zeros(parts[0].shape)
        if grad.stride(-1) != 1 or any(stride % 8 for stride in grad.stride()[:-1]):  # what a kernel cannot read
            grad = grad.contiguous()
        if dstate is not None or dnormalizer is not None:
            dstate = torch.zeros_like(state) if dstate is None else dstate.contiguous()
            dnormalizer = torch.zeros_like(normalizer) if dnormalizer is None else dnormalizer.contiguous()
        dqkv, *carried = _ops.linear_attention_backward(
            grad, *parts, state, normalizer, key_mask, dstate, dnormalizer, ctx.eps
        )
        grads = (dqkv, None, None) if k is None else dqkv.unbind(2)
        return *grads, None, *(carried if ctx.needs_input_grad[4] or ctx.needs_input_grad[5] else (None, None)), None


def _states(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = q.shape
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in ((batch, heads, dim, dim), (batch, heads, dim)))


@torch.library.register_fake("eightfold::linear_attention")
def _(q, k, v, key_mask=None, state=None, normalizer=None, eps=1e-15):
    return q.new_empty(q.shape), *_states(q)


@torch.library.register_fake("eightfold::linear_attention_quantize")
def _(q, k, v, key_mask=None, state=None, normalizer=None, eps=1e-15):
    rows, cols = q.shape[0] * q.shape[1], q.shape[2] * q.shape[3]
    cast = layouts.empty_codes(rows, cols, ROWS, q.device), layouts.empty_scales(rows, cols, ROWS, q.device)
    return *cast, *_states(q)


@torch.library.register_fake("eightfold::linear_attention_backward")
def _(
    dout,
    q,
    k,
    v,
    state_out,
    normalizer_out,
    key_mask=None,
    dstate_out=None,
    dnormalizer_out=None,
    eps=1e-15,
):
    batch, tokens, heads, dim = q.shape
    return q.new_empty((batch, tokens, 3, heads, dim)), *_states(q)
