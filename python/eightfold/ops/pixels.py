"""What stands between convolutions of an autoencoder (DC-AE, arXiv 2410.10733): a pass over channels-last pixels."""

import torch
from torch import Tensor

from eightfold.ops import _library  # noqa: F401  (loads torch.ops.eightfold)

_ops = torch.ops.eightfold


def bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    """``silu(x + bias)`` in float32, rounded once to x's dtype; no gradient.

    Args:
        x: bfloat16 or float32 [..., C], contiguous; on CUDA C is a multiple of 8.
        bias: bfloat16 or float32 [C].

    Raises RuntimeError for other dtypes, shapes or layouts.
    """
    return _ops.bias_silu(x, bias)


def rms_norm_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float = 1e-5) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight + bias + residual`` over the last dimension in float32, rounded once to x's
    dtype; no gradient.

    Args:
        x: bfloat16 or float32 [..., C], contiguous; on CUDA C is a multiple of 8, up to 2,048.
        weight, bias: bfloat16 or float32 [C], of one dtype.
        residual: of x's shape and dtype, contiguous.

    Raises RuntimeError for other dtypes, shapes or layouts.
    """
    return _ops.rms_norm_add(x, weight, bias, residual, eps)


@torch.library.register_fake("eightfold::bias_silu")
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.register_fake("eightfold::rms_norm_add")
def _(x, weight, bias, residual, eps=1e-5):
    return x.new_empty(x.shape)
