"""RMS normalisation, alone and fused with casts, in plain torch (COAT, section 4; DeepSeek-V3 report, section 3.3).

    rstd = 1 / sqrt(mean(x^2) + eps)        y = x * rstd * weight        in float32, rounded once to x's dtype

A fused op is its unfused parts to the last byte: the casts read the rounded y and the rounded sum. What only a backward
pass needs is of size 0 when ``training`` is false. Signatures are those of torch.ops.eightfold.*.
"""

import torch
from torch import Tensor

from eightfold.reference.quant import dequantize, quantize


def _nothing(like: Tensor, dims: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((0,) * dims, dtype=dtype, device=like.device)


def _codes_for_backward(x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    if training:
        return quantize(x, [1, 128])
    return _nothing(x, 2, torch.float8_e4m3fn), _nothing(x, 2, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, x_codes, x_scales, rstd) of ``x`` [tokens, features]; the codes are those of ``x`` in groups (1, 128)."""
    values = x.float()
    rstd = 1.0 / torch.sqrt(values.square().sum(1) / max(x.shape[1], 1) + eps)
    y = (values * rstd[:, None] * weight.float()).to(x.dtype).contiguous()
    return y, *_codes_for_backward(x, training), rstd if training else _nothing(x, 1, torch.float32)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(sum, y of sum), where sum = x + residual rounded to x's dtype."""
    total = (x.float() + residual.float()).to(x.dtype).contiguous()
    return total, rms_norm(total, weight, eps, False)[0]


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, training: bool) -> tuple[Tensor, ...]:
    """(codes, scales, col_codes, col_scales) of y in groups (1, 128) and (128, 1), (x_codes, x_scales) and rstd."""
    y, x_codes, x_scales, rstd = rms_norm(x, weight, eps, training)
    columns = quantize(y, [128, 1]) if training else _codes_for_backward(x, False)
    return *quantize(y, [1, 128]), *columns, x_codes, x_scales, rstd


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, training: bool
) -> tuple[Tensor, ...]:
    """(sum, then rms_norm_quantize of sum), where sum = x + residual rounded to x's dtype."""
    total = (x.float() + residual.float()).to(x.dtype).contiguous()
    return total, *rms_norm_quantize(total, weight, eps, training)


def rms_norm_columns(
    x_codes: Tensor, x_scales: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(col_codes, col_scales) of y, rounded to ``dtype``, from the (1, 128) codes of its input."""
    values = dequantize(x_codes, x_scales, [1, 128], torch.float32)
    return quantize((values * rstd[:, None] * weight.float()).to(dtype), [128, 1])


def rms_norm_backward(
    dy: Tensor, x: Tensor, x_scales: Tensor | None, rstd: Tensor, weight: Tensor, residual_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx in dy's dtype, dweight in float32) from ``x`` itself or from its (1, 128) codes and ``x_scales``.

    With xhat = x * rstd and g = dy * weight: dx = rstd * (g - xhat * mean(g * xhat)) + residual_grad, rounded once;
    dweight = sum over tokens of dy * xhat.
    """
    values = x.float() if x_scales is None else dequantize(x, x_scales, [1, 128], torch.float32)
    normed = values * rstd[:, None]
    g = dy.float() * weight.float()
    dx = rstd[:, None] * (g - normed * ((g * normed).sum(1, keepdim=True) / max(x.shape[1], 1)))
    if residual_grad is not None:
        dx = dx + residual_grad.float()
    return dx.to(dy.dtype).contiguous(), (dy.float() * normed).sum(0)
