"""Convolutions over images of channels-last pixels, fused with what stands around them.

``depthwise_glu`` is the middle of the feed-forward block of SANA (arXiv 2410.10629, section 2.2), between its two 1x1
convolutions, which are products of pixels with a weight.
"""

import torch
from torch import Tensor

from eightfold.ops import _library, layouts  # noqa: F401  (loads torch.ops.eightfold)
from eightfold.ops.quant import QuantizedTensor

_ops = torch.ops.eightfold


def depthwise_glu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``d[..., :C] * silu(d[..., C:])`` with d the depthwise 3x3 convolution of ``silu(x)``, padded with zeros.

    Args:
        x: bfloat16 (on the CPU also float32) [batch, height, width, 2C], contiguous; C a multiple of 8 on CUDA.
        weight: bfloat16 or float32 [2C, 3, 3] or [2C, 1, 3, 3], as torch's convolution has it.
        bias: bfloat16 or float32 [2C].

    Returns [batch, height, width, C] in x's dtype, computed in float32 and rounded once. Differentiable; the backward
    pass makes everything from x again, and its gradients have the same bits on every run. Raises RuntimeError for other
    dtypes, shapes or layouts.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        return _DepthwiseGlu.apply(x, weight, bias)
    return _ops.depthwise_glu(x, weight, bias)


def depthwise_glu_quantize(x: Tensor, weight: Tensor, bias: Tensor) -> QuantizedTensor:
    """``quantize(depthwise_glu(x, weight, bias).flatten(0, 2), (1, 128))`` without the tensor between; no gradient.

    Arguments and errors are those of ``depthwise_glu``.
    """
    return QuantizedTensor(*_ops.depthwise_glu_quantize(x, weight, bias), (1, 128))


def depthwise_glu_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``depthwise_glu``, whose result had the gradient ``dy``.

    Args:
        dy: [batch, height, width, C] in x's dtype, contiguous.
        x, weight, bias: as given to ``depthwise_glu``.

    Returns dx in x's dtype, dweight in weight's shape and dbias, both float32. Raises RuntimeError for other dtypes,
    shapes or layouts.
    """
    return _ops.depthwise_glu_backward(dy, x, weight, bias)


class _DepthwiseGlu(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return _ops.depthwise_glu(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        dx, dweight, dbias = _ops.depthwise_glu_backward(dy.contiguous(), x, weight, bias)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


@torch.library.register_fake("eightfold::depthwise_glu")
def _(x, weight, bias):
    return x.new_empty(*x.shape[:3], x.shape[3] // 2)


@torch.library.register_fake("eightfold::depthwise_glu_quantize")
def _(x, weight, bias):
    rows, cols = x.shape[0] * x.shape[1] * x.shape[2], x.shape[3] // 2
    return (
        layouts.empty_codes(rows, cols, (1, 128), x.device),
        layouts.empty_scales(rows, cols, (1, 128), x.device),
    )


@torch.library.register_fake("eightfold::depthwise_glu_backward")
def _(dy, x, weight, bias):
    return x.new_empty(x.shape), *(t.new_empty(t.shape, dtype=torch.float32) for t in (weight, bias))
