"""How a decoder computes its linears, norms and SwiGLU: in fp32, in bf16, or in FP8 through the fused functions.

A strategy has four methods; the decoder reads the same whichever one it holds. `residual` is the stream that x is added
to before the norm; the sum comes back as the new stream.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Precision = Literal["fp32", "bf16", "fp8"]


class _RMSNorm(torch.autograd.Function):
    """x * rstd * weight in fp32, rounded once; saves x and rstd, where torch's composition saves three fp32 copies."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        rstd = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        normed, grad = x.float() * rstd, grad.float()
        scaled = grad * weight.float()
        dx = rstd * (scaled - normed * (scaled * normed).mean(dim=-1, keepdim=True))
        dweight = (grad * normed).flatten(0, -2).sum(dim=0)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up in fp32, rounded once; saves gate and up only."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return (F.silu(gate.float()) * up.float()).to(gate.dtype)

    @staticmethod
    def backward(ctx, grad):
        gate, up = (x.float() for x in ctx.saved_tensors)
        grad, s = grad.float(), torch.sigmoid(gate)
        d_gate = grad * up * s * (1 + gate * (1 - s))
        return d_gate.to(ctx.saved_tensors[0].dtype), (grad * gate * s).to(ctx.saved_tensors[0].dtype)


class FP32:
    dtype = torch.float32

    def linear(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())

    def norm(self, x: torch.Tensor, norm, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream, normed stream)."""
        stream = x if residual is None else x + residual
        return stream, _RMSNorm.apply(stream, norm.weight, norm.eps)

    def norm_linears(self, x, norm, layers, residual=None) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(stream, the outputs of `layers` on the normed stream)."""
        stream, y = self.norm(x, norm, residual)
        return stream, tuple(self.linear(y, layer) for layer in layers)

    def norm_mlp(self, x, norm, mlp, residual=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream, the SwiGLU block's output on the normed stream)."""
        stream, (gate, up) = self.norm_linears(x, norm, (mlp.gate_proj, mlp.up_proj), residual)
        return stream, self.linear(_SwiGLU.apply(gate, up), mlp.down_proj)


class BF16(FP32):
    dtype = torch.bfloat16

    def linear(self, x, layer):
        from ..nn.functional import bf16_linear

        return bf16_linear(x, layer.weight, layer.bias)


STRATEGIES = {"fp32": FP32, "bf16": BF16}


def strategy(precision: Precision) -> FP32:
    """The strategy object of a precision name."""
    if precision not in STRATEGIES:
        raise ValueError(f"precision: expected one of {', '.join(STRATEGIES)}, got {precision!r}")
    return STRATEGIES[precision]()
