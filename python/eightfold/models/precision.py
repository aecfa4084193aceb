"""How a decoder computes its linears, norms and SwiGLU: in fp32, in bf16, or in FP8 through the fused functions.

The decoder reads the same whichever strategy it holds. `residual` is added to x before the norm; the sum comes back as
the new stream, because one kernel does both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from eightfold.models.embedding import embedding
from eightfold.models.head import Codes, logits
from eightfold.nn import ServedCodes, WeightCache
from eightfold.nn import functional as fused
from eightfold.ops import QuantizedTensor, add_rms_norm, rotary, swiglu

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
        wide = gate.to(torch.float32, copy=True)
        return F.silu(wide, inplace=True).mul_(up).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        dtype, gate, up, grad = gate.dtype, gate.float(), up.float(), grad.float()
        s = torch.sigmoid(gate)
        d_gate = grad * up * s * (1 + gate * (1 - s))
        return d_gate.to(dtype), (grad * gate * s).to(dtype)


class KeptWeights:
    """What passes with constant weights make of them, at addresses that stay while this object lives, as CUDA graphs
    ask for: FP8 codes, and weights rounded to `dtype` (on the CPU widened to fp32 again, which it multiplies faster).
    `refresh()` makes all of it again of the weights of the moment."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype  # of the products that are not FP8
        self.codes: defaultdict[nn.Linear, WeightCache] = defaultdict(WeightCache)
        self._rounded: dict[tuple[nn.Linear, str], torch.Tensor] = {}
        self._widened: dict[tuple[nn.Linear, str], torch.Tensor] = {}
        self._stacked: dict[tuple[tuple[nn.Linear, ...], str], torch.Tensor] = {}

    def rounded(self, layer: nn.Linear, name: str = "weight") -> torch.Tensor | None:
        """The layer's weight, or its bias if it has one, in `dtype`: itself, where it has it."""
        parameter = getattr(layer, name)
        if parameter is None or parameter.dtype == self.dtype:
            return None if parameter is None else parameter.detach()
        return self._keep(self._rounded, layer, name, self.dtype)

    def widened(self, layer: nn.Linear, name: str = "weight") -> torch.Tensor | None:
        """The same values in fp32."""
        return None if getattr(layer, name) is None else self._keep(self._widened, layer, name, torch.float32)

    def stacked(self, layers: Sequence[nn.Linear], name: str = "weight") -> torch.Tensor | None:
        """The layers' weights, or their biases if they have them, in `dtype`, one below the other: a copy."""
        parts, key = [getattr(layer, name) for layer in layers], (tuple(layers), name)
        if parts[0] is None:
            return None
        if key not in self._stacked:
            with torch.inference_mode(False):
                self._stacked[key] = torch.cat([part.detach().to(self.dtype) for part in parts])
        return self._stacked[key]

    def _keep(self, store: dict, layer: nn.Linear, name: str, dtype: torch.dtype) -> torch.Tensor:
        if (layer, name) not in store:
            with torch.inference_mode(False):
                store[layer, name] = getattr(layer, name).detach().to(self.dtype).to(dtype)
        return store[layer, name]

    def refresh(self) -> None:
        for cache in self.codes.values():
            cache.refresh()
        for store in (self._rounded, self._widened):
            for (layer, name), kept in store.items():
                kept.copy_(getattr(layer, name).detach().to(self.dtype))
        for (layers, name), kept in self._stacked.items():
            parts = [getattr(layer, name).detach() for layer in layers]
            for into, part in zip(kept.split([len(part) for part in parts]), parts, strict=True):
                into.copy_(part)


class FP32:
    dtype = torch.float32
    fp8_head = False  # whether the head's product is taken in FP8
    fp8_cache = False  # whether keys and values are rounded as a cache in FP8 has them
    # Whether backward passes add the gradients of matrices to `.grad` as `nn.functional` says: for training on several
    # micro-batches a step.
    add_to_grad = False

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of a paged cache."""
        return torch.float8_e4m3fn if self.fp8_cache else self.dtype

    def __init__(self):
        self._kept: KeptWeights | None = None

    def embedding(self, ids: torch.Tensor, layer: nn.Embedding) -> torch.Tensor:
        return embedding(ids, layer.weight, self.add_to_grad).to(self.dtype)

    def linear(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())

    def takes_codes(self, head_dim: int) -> bool:
        """Whether `attention_output` may be given what heads of that size make as codes, in groups (1, 128)."""
        return False

    def attention_output(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """A linear whose input attention has saved already."""
        return self.linear(x, layer)

    def kernels_on(self, device: torch.device) -> bool:
        """Whether norms and SwiGLU there are kernels of `ops`: `norm` then has the bits of `ops.rms_norm`."""
        return False

    def norm(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return _RMSNorm.apply(x, norm.weight, norm.eps)

    def norm_rotary(self, x: torch.Tensor, norm: nn.Module, tables) -> torch.Tensor:
        """Heads [B, T, heads, head_dim], each normalised, then rotated by the tables cos and sin."""
        if self.kernels_on(x.device):
            return fused.fp8_rms_norm_rotary(x, norm.weight, norm.eps, tables)
        return rotary(self.norm(x, norm), *tables)

    def add_norm(self, x, norm, residual=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream, its norm), stream = x + residual."""
        if residual is None or torch.is_grad_enabled() or not self.kernels_on(x.device):
            stream = x if residual is None else x + residual
            return stream, self.norm(stream, norm)
        both = add_rms_norm(x.flatten(0, -2), residual.flatten(0, -2), norm.weight, norm.eps)
        return tuple(y.view(x.shape) for y in both)

    def norm_linears(self, x, norm, layers, residual=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(stream, the outputs of `layers` on the normed stream), stream = x + residual."""
        stream, y = self.add_norm(x, norm, residual)
        return stream, [self.linear(y, layer) for layer in layers]

    def norm_qkv(self, x, norm, layers, tables, head_dim, residual=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(stream, [q, k, v] as heads [B, T, heads, head_dim], q and k rotated by the tables cos and sin)."""
        stream, qkv = self.norm_linears(x, norm, layers, residual)
        q, k, v = (y.unflatten(-1, (-1, head_dim)) for y in qkv)
        return stream, [rotary(q, *tables), rotary(k, *tables), v]

    def norm_mlp(self, x, norm, mlp, residual=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream, the SwiGLU block's output on the normed stream), stream = x + residual."""
        stream, (gate, up) = self.norm_linears(x, norm, (mlp.gate_proj, mlp.up_proj), residual)
        return stream, self.linear(self.swiglu(gate, up), mlp.down_proj)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return _SwiGLU.apply(gate, up)

    def head(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """fp32 logits."""
        return logits(x, layer.weight)

    def head_codes(self, layer: nn.Linear) -> Codes | None:
        """The head's codes and scales where its product is taken in FP8."""
        return None

    def head_operand(self, layer: nn.Linear) -> torch.Tensor | Codes:
        """What `models.head.row_logits` multiplies by; while weights are constant, at one address."""
        codes = self.head_codes(layer)
        return self._kept.rounded(layer) if codes is None else codes

    @contextmanager
    def constant_weights(self, kept: KeptWeights | None = None):
        """For inference: inside, weights must not change, and what is made from them is kept from one forward to the
        next; in `kept`, if given, also from one such time to the next."""
        before = self._kept
        self._kept = KeptWeights(self.dtype) if kept is None else kept
        try:
            yield
        finally:
            self._kept = before


class BF16(FP32):
    dtype = torch.bfloat16

    def linear(self, x, layer):
        if self._kept is None:
            return fused.bf16_linear(x, layer.weight, layer.bias)
        if layer.weight.device.type != "cpu":
            return fused.bf16_linear(x, self._kept.rounded(layer), self._kept.rounded(layer, "bias"))
        weight, bias = self._kept.widened(layer), self._kept.widened(layer, "bias")
        return F.linear(x.float(), weight, bias).to(self.dtype)

    def norm_linears(self, x, norm, layers, residual=None):
        stream, y = self.add_norm(x, norm, residual)
        if torch.is_grad_enabled() or not self.kernels_on(y.device) or not self._stacks(layers):
            return stream, [self.linear(y, layer) for layer in layers]
        out = fused.bf16_linear(y, self._kept.stacked(layers), self._kept.stacked(layers, "bias"))
        return stream, list(out.split([layer.out_features for layer in layers], dim=-1))

    def _stacks(self, layers: Sequence[nn.Linear]) -> bool:
        """Whether the layers' products are one: where their weights are copied anyway, or a copy is small, as of q, k
        and v beside the rest of a layer."""
        rows = sum(layer.out_features for layer in layers)
        return layers[0].weight.dtype != self.dtype or rows <= 4 * layers[0].in_features

    def kernels_on(self, device):
        # One for five or six: a step of one token is a chain of kernels, with little to do for each.
        return self._kept is not None and device.type != "cpu"

    def norm(self, x, norm):
        if not self.kernels_on(x.device):
            return super().norm(x, norm)
        return fused.fp8_rms_norm(x, norm.weight, norm.eps)

    def swiglu(self, gate, up):
        if not self.kernels_on(gate.device) or torch.is_grad_enabled():
            return super().swiglu(gate, up)
        return swiglu(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)

    def head(self, x, layer):
        if self._kept is None or layer.weight.device.type != "cpu":
            return super().head(x, layer)
        return F.linear(x.float(), self._kept.widened(layer))


class FP8(BF16):
    def __init__(self, save: Save = "columns", fp8_head: bool = False, fp8_cache: bool = False):
        super().__init__()
        self.save, self.fp8_head, self.fp8_cache = save, fp8_head, fp8_cache
        self.codes: Mapping[nn.Linear, WeightCache] | None = None  # if given, also passes with gradients use them
        self.served: ServedCodes | None = None  # codes from elsewhere: then no linear's weight is read
        self.add_to_grad = False

    def _cache(self, layer):
        if self.served is not None:
            return self.served
        codes = self.codes if self._kept is None else self._kept.codes
        return None if codes is None else codes[layer]

    def options(self, layer):
        """What the functions of one layer in `nn.functional` are given beside tensors."""
        return {"cache": self._cache(layer), "add_to_grad": self.add_to_grad}

    def linear(self, x, layer):
        return fused.fp8_linear(x, layer.weight, layer.bias, **self.options(layer))

    def linear_of_codes(self, rows: QuantizedTensor, layer: nn.Linear) -> torch.Tensor:
        """`linear` of an input that is row codes already: [tokens, out], no gradient."""
        return fused.fp8_linear_of_codes(rows, layer.weight, layer.bias, self.dtype, cache=self._cache(layer))

    def takes_codes(self, head_dim):
        return head_dim == 128 and not torch.is_grad_enabled()

    def attention_output(self, x, layer):
        if isinstance(x, QuantizedTensor):
            return self.linear_of_codes(x, layer)[None]
        return fused.fp8_linear(x, layer.weight, layer.bias, save="input", **self.options(layer))

    def kernels_on(self, device):
        return True

    def norm(self, x, norm):
        return fused.fp8_rms_norm(x, norm.weight, norm.eps)

    def head_codes(self, layer):
        if not self.fp8_head:
            return None
        cache = self._cache(layer)
        return (WeightCache() if cache is None else cache).codes(layer.weight)

    def head(self, x, layer):
        return logits(x, layer.weight, self.head_codes(layer)) if self.fp8_head else super().head(x, layer)

    def norm_linears(self, x, norm, layers, residual=None):
        weights, biases, options = self._parameters(layers)
        stream, out = fused.fp8_norm_linears(x, norm.weight, norm.eps, weights, biases, residual, self.save, **options)
        return x if stream is None else stream, out

    def norm_qkv(self, x, norm, layers, tables, head_dim, residual=None):
        weights, biases, options = self._parameters(layers)
        stream, out = fused.fp8_norm_qkv(
            x, norm.weight, norm.eps, weights, biases, tables, head_dim, residual, self.save, **options
        )
        return x if stream is None else stream, out

    def _parameters(self, layers):
        weights, biases, caches = zip(*((l.weight, l.bias, self._cache(l)) for l in layers), strict=True)
        return weights, biases, {"caches": caches, "add_to_grad": self.add_to_grad}

    def norm_mlp(self, x, norm, mlp, residual=None):
        layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        if mlp.gate_proj.bias is not None:
            raise ValueError("mlp_bias: the FP8 SwiGLU block has no biases, got True; use precision='bf16'")
        weights, _, options = self._parameters(layers)
        stream, out = fused.fp8_norm_swiglu_mlp(x, norm.weight, norm.eps, *weights, residual, **options)
        return x if stream is None else stream, out


STRATEGIES = {"fp32": FP32, "bf16": BF16, "fp8": FP8}


def strategy(precision: Precision, save: Save = "columns", fp8_head: bool = False, fp8_cache: bool = False) -> FP32:
    """The strategy object of a precision name. For FP8, ``save`` is that of `nn.functional.fp8_norm_linears`,
    ``fp8_head`` takes the head's product in FP8 too, and ``fp8_cache`` rounds keys and values by `ops.kv_round`."""
    if precision not in STRATEGIES:
        raise ValueError(f"precision: expected one of {', '.join(STRATEGIES)}, got {precision!r}")
    if save not in ("columns", "input"):
        raise ValueError(f"save: expected 'columns' or 'input', got {save!r}")
    if precision == "fp8":
        return FP8(save, fp8_head, fp8_cache)
    for name, value in (("fp8_head", fp8_head), ("fp8_cache", fp8_cache)):
        if value:
            raise ValueError(f"{name}: expected False unless precision is 'fp8', got True with {precision!r}")
    return STRATEGIES[precision]()
