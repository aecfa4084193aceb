"""How a decoder computes its linears, norms and SwiGLU: in fp32, in bf16, or in FP8 through the fused functions.

The decoder reads the same whichever strategy it holds. `residual` is added to x before the norm; the sum comes back as
the new stream, because one kernel does both.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from eightfold.models.head import logits
from eightfold.nn import ServedCodes, WeightCache
from eightfold.nn import functional as fused
from eightfold.ops import rotary

Precision = Literal["fp32", "bf16", "fp8"]
Save = Literal["columns", "input"]


class _RMSNorm(torch.autograd.Function):
    """x * rstd * weight in fp32, rounded once; saves x and rstd, where torch's composition saves three fp32 copies."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        rstd = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd * weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
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
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        dtype, gate, up, grad = gate.dtype, gate.float(), up.float(), grad.float()
        s = torch.sigmoid(gate)
        d_gate = grad * up * s * (1 + gate * (1 - s))
        return d_gate.to(dtype), (grad * gate * s).to(dtype)


class FP32:
    dtype = torch.float32

    def linear(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())

    def attention_output(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """A linear whose input attention has saved already."""
        return self.linear(x, layer)

    def norm(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return _RMSNorm.apply(x, norm.weight, norm.eps)

    def norm_linears(self, x, norm, layers, residual=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(stream, the outputs of `layers` on the normed stream), stream = x + residual."""
        stream = x if residual is None else x + residual
        y = self.norm(stream, norm)
        return stream, [self.linear(y, layer) for layer in layers]

    def norm_qkv(self, x, norm, layers, tables, head_dim, residual=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(stream, [q, k, v] as heads [B, T, heads, head_dim], q and k rotated by the tables cos and sin)."""
        stream, qkv = self.norm_linears(x, norm, layers, residual)
        q, k, v = (y.unflatten(-1, (-1, head_dim)) for y in qkv)
        return stream, [rotary(q, *tables), rotary(k, *tables), v]

    def norm_mlp(self, x, norm, mlp, residual=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream, the SwiGLU block's output on the normed stream), stream = x + residual."""
        stream, (gate, up) = self.norm_linears(x, norm, (mlp.gate_proj, mlp.up_proj), residual)
        return stream, self.linear(_SwiGLU.apply(gate, up), mlp.down_proj)

    def head(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """fp32 logits."""
        return logits(x, layer.weight)

    @contextmanager
    def constant_weights(self):
        """For inference: inside, weights must not change, and what is made from them (FP8 codes; on the CPU the
        bf16-rounded weights, widened to fp32) is kept from one forward to the next."""
        yield


class BF16(FP32):
    dtype = torch.bfloat16

    def __init__(self):
        self._kept: dict[nn.Linear, torch.Tensor] | None = None

    def linear(self, x, layer):
        if not self._keeps(layer):
            return fused.bf16_linear(x, layer.weight, layer.bias)
        bias = None if layer.bias is None else layer.bias.to(self.dtype).float()
        return F.linear(x.float(), self._widened(layer), bias).to(self.dtype)

    def head(self, x, layer):
        return F.linear(x.float(), self._widened(layer)) if self._keeps(layer) else super().head(x, layer)

    def _keeps(self, layer):
        return self._kept is not None and layer.weight.device.type == "cpu"

    def _widened(self, layer):
        if layer not in self._kept:
            self._kept[layer] = layer.weight.detach().to(self.dtype).float()
        return self._kept[layer]

    @contextmanager
    def constant_weights(self):
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None


class FP8(BF16):
    def __init__(self, save: Save = "columns"):
        super().__init__()
        self.save = save
        self._caches: dict[nn.Linear, WeightCache] | None = None
        self.served: ServedCodes | None = None  # codes from elsewhere: then no linear's weight is read

    def _cache(self, layer):
        if self.served is not None:
            return self.served
        return None if self._caches is None else self._caches.setdefault(layer, WeightCache())

    def linear(self, x, layer):
        return fused.fp8_linear(x, layer.weight, layer.bias, cache=self._cache(layer))

    def attention_output(self, x, layer):
        return fused.fp8_linear(x, layer.weight, layer.bias, save="input", cache=self._cache(layer))

    def norm(self, x, norm):
        return fused.fp8_rms_norm(x, norm.weight, norm.eps)

    def norm_linears(self, x, norm, layers, residual=None):
        weights, biases, caches = self._parameters(layers)
        stream, out = fused.fp8_norm_linears(
            x, norm.weight, norm.eps, weights, biases, residual, self.save, caches=caches
        )
        return x if stream is None else stream, out

    def norm_qkv(self, x, norm, layers, tables, head_dim, residual=None):
        weights, biases, caches = self._parameters(layers)
        stream, out = fused.fp8_norm_qkv(
            x, norm.weight, norm.eps, weights, biases, tables, head_dim, residual, self.save, caches=caches
        )
        return x if stream is None else stream, out

    def _parameters(self, layers):
        return zip(*((l.weight, l.bias, self._cache(l)) for l in layers), strict=True)

    def norm_mlp(self, x, norm, mlp, residual=None):
        layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        if mlp.gate_proj.bias is not None:
            raise ValueError("mlp_bias: the FP8 SwiGLU block has no biases, got True; use precision='bf16'")
        weights, caches = [l.weight for l in layers], [self._cache(l) for l in layers]
        stream, out = fused.fp8_norm_swiglu_mlp(x, norm.weight, norm.eps, *weights, residual, caches=caches)
        return x if stream is None else stream, out

    @contextmanager
    def constant_weights(self):
        self._caches = {}
        try:
            with super().constant_weights():
                yield
        finally:
            self._caches = None


STRATEGIES = {"fp32": FP32, "bf16": BF16, "fp8": FP8}


def strategy(precision: Precision, save: Save = "columns") -> FP32:
    """The strategy object of a precision name; ``save`` is that of `nn.functional.fp8_norm_linears`, for FP8."""
    if precision not in STRATEGIES:
        raise ValueError(f"precision: expected one of {', '.join(STRATEGIES)}, got {precision!r}")
    if save not in ("columns", "input"):
        raise ValueError(f"save: expected 'columns' or 'input', got {save!r}")
    return FP8(save) if precision == "fp8" else STRATEGIES[precision]()
