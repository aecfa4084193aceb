"""Rotary position embedding (RoFormer, arXiv 2104.09864), halves of a head paired as in Hugging Face models."""

import torch
from torch import Tensor

from eightfold.ops import _library  # noqa: F401  (loads torch.ops.eightfold)

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
