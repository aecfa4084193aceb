"""What stands between the convolutions of an autoencoder, in plain torch (DC-AE, arXiv 2410.10733)."""

import torch
from torch import Tensor


def bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    """silu(x + bias) of ``x`` [..., C] and ``bias`` [C], in float32, rounded once."""
    return torch.nn.functional.silu(x.float() + bias.float()).to(x.dtype)


def rms_norm_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float = 1e-5) -> Tensor:
    """``x`` [..., C] over the root of its mean square, times ``weight``, plus ``bias`` and ``residual``, in float32,
    rounded once."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float() + bias.float() + residual.float()).to(x.dtype)
