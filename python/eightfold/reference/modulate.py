"""LayerNorm and modulation, alone and fused with a gated residual and with casts, in plain torch (AdaLN-single of
PixArt-alpha, arXiv 2310.00426, as SANA has it).

    r = x + gate * branch, rounded to x's dtype        (r = x without a branch; without a gate it counts as one)
    y = (r - mean) * rstd * (1 + scale) + shift        in float32, rounded once to x's dtype

mean and rstd = 1 / sqrt(variance + eps) are a token's, gate, scale and shift a sample's. A fused op is its unfused
parts to the last byte. What only a backward pass needs is of size 0 when ``training`` is false. Signatures are those
of torch.ops.eightfold.*.
"""

import torch
from torch import Tensor

from eightfold.reference.quant import quantize


def _nothing(like: Tensor, dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty((0,) * dims, dtype=dtype, device=like.device)


def _each(vector: Tensor) -> Tensor:
    """A sample's vector [batch, features] beside its tokens."""
    return vector.float()[:, None]


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of ``x`` [batch, tokens, features], ``scale`` and ``shift`` [batch, features]."""
    values, features = x.float(), max(x.shape[2], 1)
    mean = values.sum(2, keepdim=True) / features
    rstd = 1.0 / torch.sqrt((values - mean).square().sum(2, keepdim=True) / features + eps)
    y = ((values - mean) * rstd * (1.0 + _each(scale)) + _each(shift)).to(x.dtype).contiguous()
    if not training:
        return y, _nothing(x, 2), _nothing(x, 2)
    return y, mean[..., 0], rstd[..., 0]


def layer_norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, training: bool
) -> tuple[Tensor, ...]:
    """(codes, scales, col_codes, col_scales) of y as [batch * tokens, features] in groups (1, 128) and (128, 1), then
    mean and rstd."""
    y, mean, rstd = layer_norm_modulate(x, scale, shift, eps, training)
    columns = _nothing(x, 2, torch.float8_e4m3fn), _nothing(x, 2)
    if training:
        columns = quantize(y.flatten(0, 1), [128, 1])
    return *quantize(y.flatten(0, 1), [1, 128]), *columns, mean, rstd


def _gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    added = branch.float() if gate is None else _each(gate) * branch.float()
    return (x.float() + added).to(x.dtype).contiguous()


def gated_residual_layer_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, training: bool
) -> tuple[Tensor, ...]:
    """(r, then layer_norm_modulate of r)."""
    r = _gated_residual(x, branch, gate)
    return r, *layer_norm_modulate(r, scale, shift, eps, training)


def gated_residual_layer_norm_modulate_quantize(
    x: Tensor, branch: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, training: bool
) -> tuple[Tensor, ...]:
    """(r, then layer_norm_modulate_quantize of r)."""
    r = _gated_residual(x, branch, gate)
    return r, *layer_norm_modulate_quantize(r, scale, shift, eps, training)


def layer_norm_modulate_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    residual_grad: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dgate, dscale, dshift) where ``x`` is what was normalised: x, or r.

    With xhat = (x - mean) * rstd and g = dy * (1 + scale): dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) +
    residual_grad; dbranch = gate * dx; each rounded once to dy's dtype. dgate = sum over a sample's tokens of dx *
    branch, dscale of dy * xhat, dshift of dy, float32 [batch, features]. dbranch and dgate are of size 0 without
    ``branch`` and ``gate``, which come together.
    """
    grad, features = dy.float(), max(x.shape[2], 1)
    normed = (x.float() - mean[..., None]) * rstd[..., None]
    g = grad * (1.0 + _each(scale))
    along = (g * normed).sum(2, keepdim=True) / features
    dx = rstd[..., None] * (g - g.sum(2, keepdim=True) / features - normed * along)
    if residual_grad is not None:
        dx = dx + residual_grad.float()
    dbranch, dgate = _nothing(dy, 3, dy.dtype), _nothing(dy, 2)
    if gate is not None:
        dbranch, dgate = (_each(gate) * dx).to(dy.dtype).contiguous(), (dx * branch.float()).sum(1)
    return dx.to(dy.dtype).contiguous(), dbranch, dgate, (grad * normed).sum(1), grad.sum(1)
