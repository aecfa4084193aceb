"""Rotary position embedding in plain torch (RoFormer, arXiv 2104.09864)."""

import torch
from torch import Tensor

from eightfold.reference.norm import rms_norm, rms_norm_backward
from eightfold.reference.quant import quantize_beside


def rotary_tables(frequency: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of ``positions`` [batch, tokens], rounded to float32, times ``frequency`` [dim / 2], float32
    [batch, tokens, 1, dim / 2]."""
    angle = positions[..., None, None].float() * frequency
    return angle.cos(), angle.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotates the halves of each head of ``x`` [batch, tokens, heads, dim] by the angles of ``cos`` and ``sin``.

    These are float32 [batch or 1, tokens, 1, dim / 2]. In float32, each operation rounded, the result rounded once to
    x's dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    sin = -sin if inverse else sin
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_backward_quantize(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, columns: bool = True, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``quantize_beside`` of dq and dk, rotated back, and dv, all [batch, tokens, heads, dim], and the sums of the
    rounded values over batch and tokens (float32; here added up in float64, in the kernels in an order of their own).

    The columns and the sums are of size 0 unless wanted.
    """
    parts = rotary(dq, cos, sin, inverse=True), rotary(dk, cos, sin, inverse=True), dv
    parts = [part.reshape(part.shape[0] * part.shape[1], part.shape[2] * part.shape[3]) for part in parts]
    dbias = torch.cat(parts, 1).double().sum(0).float() if bias else dq.new_empty(0, dtype=torch.float32)
    return *quantize_beside(parts, columns), dbias


def rms_norm_rotary(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, x_codes, x_scales, rstd): ``rms_norm`` of each head of ``x`` [batch, tokens, heads, dim], a row of [batch *
    tokens * heads, dim], and ``rotary`` of its result, which is rounded between the two.
    """
    y, *saved = rms_norm(x.flatten(0, 2), weight, eps, training)
    return rotary(y.view(x.shape), cos, sin), *saved


def rms_norm_rotary_backward(
    dy: Tensor, x_codes: Tensor, x_scales: Tensor, rstd: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx as dy, dweight in float32): ``rms_norm_backward`` of dy rotated back, which is rounded between the two."""
    rows = rotary(dy, cos, sin, inverse=True).reshape(x_codes.shape)
    dx, dweight = rms_norm_backward(rows, x_codes, x_scales, rstd, weight, None)
    return dx.view(dy.shape), dweight
