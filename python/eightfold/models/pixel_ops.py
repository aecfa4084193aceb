"""Fused ops over channels-last pixels where their kernels take dtype and sizes, else their torch compositions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eightfold import ops

CUDA_CHANNELS = 8  # kernels take multiples of as many
_ATTENTION_DIMS = (32, 64, 128)
_CUDA_MOST_NORM = 2048  # channels


def attention_kernel_takes(heads: Tensor) -> bool:
    """Whether `ops.linear_attention` takes heads [..., dim]."""
    return heads.shape[-1] in _ATTENTION_DIMS and (heads.dtype == torch.bfloat16 or heads.device.type == "cpu")


def depthwise_glu(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """`ops.depthwise_glu` of x [B, H, W, 2h] with the layer's weight and bias."""
    if glu_kernel_takes(x):
        return ops.depthwise_glu(x, *depthwise_parameters(layer))
    wide = F.silu(x.float()).permute(0, 3, 1, 2)  # a view: channels stay last in memory
    value, gate = F.conv2d(wide, layer.weight.float(), layer.bias.float(), padding=1, groups=x.shape[-1]).chunk(2, 1)
    return (value * F.silu(gate)).permute(0, 2, 3, 1).to(x.dtype).contiguous()


def glu_kernel_takes(x: Tensor) -> bool:
    """Whether `ops.depthwise_glu` takes x [..., 2h]."""
    return x.device.type == "cpu" or (x.dtype == torch.bfloat16 and x.shape[-1] % (2 * CUDA_CHANNELS) == 0)


def depthwise_parameters(layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias in a dtype that `ops.depthwise_glu` reads."""
    read = torch.float32, torch.bfloat16
    return tuple(each if each.dtype in read else each.float() for each in (layer.weight, layer.bias))


def bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    """silu(x + bias) of x [..., C]."""
    return ops.bias_silu(x, bias) if _taken(x, bias) else F.silu(x + bias)


def rms_norm_add(x: Tensor, norm: nn.Module, residual: Tensor, eps: float) -> Tensor:
    """The norm over the channels of x [..., C] with the weight and bias of `norm`, plus the residual."""
    if x.shape[-1] <= _CUDA_MOST_NORM and _taken(x, norm.weight, norm.bias, residual):
        return ops.rms_norm_add(x, norm.weight, norm.bias, residual, eps)
    return F.rms_norm(x, x.shape[-1:], norm.weight, eps).add_(norm.bias).add_(residual)


def _taken(x: Tensor, *others: Tensor) -> bool:
    """Whether a kernel without a gradient takes x."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others))
    fits = x.device.type == "cpu" or x.shape[-1] % CUDA_CHANNELS == 0
    return fits and not wanted and x.dtype in (torch.bfloat16, torch.float32)
