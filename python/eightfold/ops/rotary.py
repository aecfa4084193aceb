"""Rotary position embedding (RoFormer, arXiv 2104.09864), halves of a head paired as in Hugging Face models."""

import torch
from torch import Tensor

from eightfold.ops import _library, layouts  # noqa: F401  (loads torch.ops.eightfold)
from eightfold.ops.quant import QuantizedTensor

_ops = torch.ops.eightfold


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Each head's halves (x1, x2) become (x1 cos - x2 sin, x2 cos + x1 sin), in float32, rounded once.

    Args:
        x: bfloat16 or float32 [batch, tokens, heads, dim], dim even and contiguous, any other strides.
        cos, sin: float32 [batch or 1, tokens, 1, dim / 2], contiguous.
        inverse: rotates back, which is also the gradient.

    Returns a contiguous tensor of x's shape and dtype. Differentiable in x. Raises RuntimeError for other dtypes,
    shapes or layouts.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotary.apply(x, cos, sin, inverse)
    return _ops.rotary(x, cos, sin, inverse)


def rotary_backward_quantize(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, *, columns: bool = True, bias: bool = False
) -> tuple[QuantizedTensor, QuantizedTensor | None, Tensor | None]:
    """Attention's gradients as operands of the products before it: ``quantize_beside`` of the gradients of queries and
    keys, rotated back, and of values, from one read of each.

    The bytes are those of ``rotary(dq, cos, sin, inverse=True)``, the same for dk, then ``quantize_beside``.

    Args:
        dq, dk, dv: bfloat16 or float32 [batch, tokens, heads, dim] of one dtype, the heads of each its own number, dim
            even and contiguous, any other strides; heads * dim of dq and dk is a multiple of 128.
        cos, sin: as for ``rotary``.
        columns: whether the second result is wanted.
        bias: whether the third is: float32 [columns], the sums of the rounded values over batch and tokens.

    Returns codes of [batch * tokens, columns of dq, dk and dv beside each other] in groups (1, 128) and (128, 1), and
    the sums, whose order is that of csrc/rotary/rotary_backward.h: the same bits on every run, device and CPU. On CUDA
    one kernel for dims of 64 and 128, a multiple of 8 tokens, and strides whole in 16 bytes; else several. Raises
    RuntimeError for other dtypes, shapes or layouts.
    """
    codes, scales, col_codes, col_scales, dbias = _ops.rotary_backward_quantize(dq, dk, dv, cos, sin, columns, bias)
    return (
        QuantizedTensor(codes, scales, (1, 128)),
        QuantizedTensor(col_codes, col_scales, (128, 1)) if columns else None,
        dbias if bias else None,
    )


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(x, cos, sin, inverse):
        return _ops.rotary(x, cos, sin, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, cos, sin, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return _Rotary.apply(grad, cos, sin, not ctx.inverse), None, None, None


@torch.library.register_fake("eightfold::rotary")
def _(x, cos, sin, inverse=False):
    return x.new_empty(x.shape)


@torch.library.register_fake("eightfold::rotary_backward_quantize")
def _(dq, dk, dv, cos, sin, columns=True, bias=False):
    rows, cols = dq.shape[0] * dq.shape[1], sum(x.shape[2] * x.shape[3] for x in (dq, dk, dv))

    def cast(group):
        return layouts.empty_codes(rows, cols, group, dq.device), layouts.empty_scales(rows, cols, group, dq.device)

    nothing = (dq.new_empty((0, 0), dtype=t) for t in (layouts.CODES, torch.float32))
    dbias = dq.new_empty(cols if bias else 0, dtype=torch.float32)
    return *cast((1, 128)), *(cast((128, 1)) if columns else nothing), dbias
