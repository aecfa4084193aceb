"""Layers as functions: FP8 products forward and backward, and FP8 for everything that waits between the two.

What is saved for the backward pass, with U = tokens * hidden * 2 bytes (scales add 1/32 to each FP8 tensor):

    fp8_linear            column codes of the input: 0.5 U; with save="input" nothing, but the input by reference
    fp8_norm_linears      row codes of the norm's input, column codes of its output, rstd: 1 U for any number of linears
                          (with save="input" no columns: 0.5 U)
    fp8_norm_qkv          as fp8_norm_linears, and the tables by reference
    fp8_modulate_linear   the sum in x's dtype, column codes of the norm's output, mean, rstd; with a gate the branch by
                          reference: 1.5 U
    fp8_swiglu_mlp        column codes of the input, row codes of gate and up (h is recomputed): 0.5 U + intermediate
    fp8_norm_swiglu_mlp   as fp8_norm_linears and fp8_swiglu_mlp together: 1 U + intermediate
    fp8_rms_norm          row codes of the input, rstd: 0.5 U
    fp8_rms_norm_rotary   as fp8_rms_norm, and the tables by reference

``add_to_grad=True`` is for `backward` over several micro-batches: a weight's gradient is added to its `.grad` inside
the product that makes it and rounded once, wherever there is such a sum already that autograd would only add to (a
plain contiguous tensor, no hooks; `torch.autograd.grad` is not concerned, nor are compiled layers).

Common to all: x is [..., features] in bfloat16 or float32 (bfloat16 under autocast), results have x's dtype, sizes are
multiples of 16, weights are [out, in] and get gradients in their own dtype. Without gradients the same forward runs and
saves nothing: its bits do not depend on training. Weights are saved by reference and cast again in the backward pass.
Bad dtypes raise TypeError, bad shapes ValueError, each with what was expected and what came.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eightfold.nn import _autograd as a
from eightfold.nn import _products as p
from eightfold.nn._products import ops
from eightfold.nn._weight_cache import WeightCache
from eightfold.ops import QuantizedTensor

# Asked once: a constant for torch.compile.
_CPU_HAS_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    save: str = "columns",
    *,
    cache: WeightCache | None = None,
    add_to_grad: bool = False,
) -> Tensor:
    """x @ weight^T + bias; x [..., in], weight [out, in], bias [out] -> [..., out].

    ``save="columns"`` keeps the input as FP8 codes grouped along the tokens, made from unrounded x. ``save="input"``
    keeps x itself and makes the same codes in the backward pass: for an input that another op has saved already, as
    attention does its output. Gradients do not depend on the choice. (Jet-RL, section 4.)
    """
    if save not in ("columns", "input"):
        raise ValueError(f"fp8_linear: save must be 'columns' or 'input', got {save!r}")
    x = _activation("fp8_linear", x)
    _check_weight("fp8_linear", "weight", weight, x.shape[-1], bias)
    if _needs_grad(x, weight, bias):
        return a.Linear.apply(x, weight, bias, save == "input", cache, add_to_grad)
    out = p.product(p.quantize_rows(x), weight, bias, x.dtype, cache)
    return out.view(*x.shape[:-1], weight.shape[0])


def fp8_linear_of_codes(
    rows: QuantizedTensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    cache: WeightCache | None = None,
) -> Tensor:
    """``fp8_linear`` of an input that is row codes [tokens, in] in groups (1, 128) already -> [tokens, out] in
    ``dtype``, with the same bits; no gradient."""
    _check_weight("fp8_linear_of_codes", "weight", weight, rows.shape[1], bias)
    return p.product((rows.codes, rows.scales), weight, bias, dtype, cache)


def fp8_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded once; weight [features]."""
    x = _activation("fp8_rms_norm", x)
    _check_norm("fp8_rms_norm", weight, x.shape[-1])
    if _needs_grad(x, weight):
        return a.RMSNorm.apply(x, weight, eps)
    return ops.rms_norm(p.flat(x), weight, eps, False)[0].view(x.shape)


def fp8_rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, tables: tuple[Tensor, Tensor]) -> Tensor:
    """``rotary`` of ``fp8_rms_norm`` of each head, with the bits of the two in sequence, forward and backward.

    x [batch, tokens, heads, dim], dim contiguous; weight [dim]; tables: cos and sin as ``eightfold.ops.rotary`` takes
    them.
    """
    name = "fp8_rms_norm_rotary"
    x = _activation(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name}: x must be [batch, tokens, heads, dim], got {list(x.shape)}")
    _check_norm(name, weight, x.shape[-1])
    if _needs_grad(x, weight):
        return a.RMSNormRotary.apply(x, weight, eps, *tables)
    return ops.rms_norm_rotary(x, weight, eps, *tables, False)[0]


def fp8_norm_linears(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
    save: str = "columns",
    *,
    caches: Sequence[WeightCache | None] | None = None,
    add_to_grad: bool = False,
) -> tuple[Tensor | None, list[Tensor]]:
    """(s, [RMSNorm(s) @ w^T + b for each weight]) with s = x + residual; the first is None without a residual.

    One cast of the norm's output serves all the products, one saved column tensor all their weight gradients. The
    gradient of s is added inside the norm's backward kernel, and the gradients of the outputs are summed in float32.
    Without gradients the outputs may be views of one buffer.

    ``save="columns"`` keeps that column tensor. ``save="input"`` makes it in the backward pass of the norm's input,
    which is kept in FP8 anyway: 0.5 U less, and weight gradients whose operand was rounded twice (3.6 % off, not 2.6).
    """
    name = "fp8_norm_linears"
    return _norm_linears(name, x, norm_weight, eps, weights, biases, residual, save, caches, add_to_grad)


def fp8_norm_qkv(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    tables: tuple[Tensor, Tensor],
    head_dim: int,
    residual: Tensor | None = None,
    save: str = "columns",
    *,
    caches: Sequence[WeightCache | None] | None = None,
    add_to_grad: bool = False,
) -> tuple[Tensor | None, list[Tensor]]:
    """(s, [q, k, v]): ``fp8_norm_linears`` of the three layers before attention, as heads, and ``rotary`` of q and k.

    x [batch, tokens, features]; tables: cos and sin as ``eightfold.ops.rotary`` takes them; q, k and v [batch, tokens,
    heads, head_dim]. In the backward pass one read of their gradients rotates them back, casts them and adds up those
    of the biases (``eightfold.ops.rotary_backward_quantize``). All other bits are those of the functions apart.
    """
    name = "fp8_norm_qkv"
    if x.dim() != 3:
        raise ValueError(f"{name}: x must be [batch, tokens, features], got {list(x.shape)}")
    if len(weights) != 3:
        raise ValueError(f"{name}: weights must be those of queries, keys and values, got {len(weights)}")
    for i, weight in enumerate(weights):
        if weight.shape[0] % head_dim:
            raise ValueError(f"{name}: rows of weights[{i}] must be heads of {head_dim}, got {list(weight.shape)}")
    options = save, caches, add_to_grad, tables, head_dim
    return _norm_linears(name, x, norm_weight, eps, weights, biases, residual, *options)


def fp8_modulate_linear(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    cache: WeightCache | None = None,
    add_to_grad: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """(s, (LayerNorm(s) * (1 + scale) + shift) @ weight^T + bias) with s = x + gate * branch, rounded to x's dtype; the
    first is None without a branch, a gate of None counts as one.

    x and branch [batch, tokens, features]; scale, shift and gate, bfloat16 or float32 of one dtype, [batch, features]:
    ``eightfold.ops.gated_residual_layer_norm_modulate_quantize``, whose codes the product takes. The gradient of s is
    added inside the norm's backward kernel. (AdaLN: DiT, arXiv 2212.09748.)
    """
    name = "fp8_modulate_linear"
    x = _activation(name, x).contiguous()
    if x.dim() != 3:
        raise ValueError(f"{name}: x must be [batch, tokens, features], got {list(x.shape)}")
    branch = _like(name, "branch", x, branch)
    branch = None if branch is None else branch.contiguous()
    if branch is None and gate is not None:
        raise ValueError(f"{name}: gate must be None without a branch, got {list(gate.shape)}")
    for argument, vector in (("scale", scale), ("shift", shift), ("gate", gate)):
        if vector is not None and vector.shape != (x.shape[0], x.shape[2]):
            expected = f"[{x.shape[0]}, {x.shape[2]}], a vector of each sample"
            raise ValueError(f"{name}: {argument} must be {expected}, got {list(vector.shape)}")
    _check_weight(name, "weight", weight, x.shape[2], bias)
    if _needs_grad(x, branch, gate, scale, shift, weight, bias):
        out = a.ModulateLinear.apply(x, branch, gate, scale, shift, eps, weight, bias, cache, add_to_grad)
        return (None, out) if branch is None else out
    total, rows, _, _ = a.modulate_forward(x, branch, gate, scale, shift, eps, False)
    return total, p.product(rows, weight, bias, x.dtype, cache).view(*x.shape[:-1], weight.shape[0])


def _norm_linears(
    name, x, norm_weight, eps, weights, biases, residual, save, caches, add_to_grad, tables=(None, None), head_dim=None
):
    if save not in ("columns", "input"):
        raise ValueError(f"{name}: save must be 'columns' or 'input', got {save!r}")
    x = _activation(name, x)
    residual = _like(name, "residual", x, residual)
    biases = [None] * len(weights) if biases is None else list(biases)
    caches = (None,) * len(weights) if caches is None else tuple(caches)
    if not len(weights) == len(biases) == len(caches) or not weights:
        raise ValueError(f"{name}: got {len(weights)} weights, {len(biases)} biases and {len(caches)} caches")
    _check_norm(name, norm_weight, x.shape[-1])
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _check_weight(name, f"weights[{i}]", weight, x.shape[-1], bias)
    if _needs_grad(x, residual, norm_weight, *weights, *biases):
        options = save == "columns", caches, add_to_grad, *tables, head_dim
        out = a.NormLinears.apply(x, residual, norm_weight, eps, *options, *weights, *biases)
        return (None, list(out)) if residual is None else (out[0], list(out[1:]))
    total, rows, _, _ = a.norm_forward(x, residual, norm_weight, eps, False)
    out = p.products(rows, weights, biases, x.dtype, caches, as_one=True)
    out = [y.view(*x.shape[:-1], y.shape[1]) for y in out]
    return total, out if head_dim is None else p.rotated_heads(out, tables, head_dim)


def fp8_swiglu_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    caches: Sequence | None = None,
    add_to_grad: bool = False,
) -> Tensor:
    """(silu(x @ gate^T) * (x @ up^T)) @ down^T; gate and up are [intermediate, hidden], down [hidden, intermediate].

    Gate and up wait as FP8 row codes; h = silu(gate) * up is recomputed from them. (DeepSeek-V3 report, section 3.3.3.)
    """
    weights = (gate_weight, up_weight, down_weight)
    return _swiglu("fp8_swiglu_mlp", x, None, None, 0.0, weights, caches, add_to_grad)[1]


def fp8_norm_swiglu_mlp(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    residual: Tensor | None = None,
    *,
    caches: Sequence | None = None,
    add_to_grad: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """(s, fp8_swiglu_mlp(RMSNorm(s))) with s = x + residual; the first is None without a residual."""
    weights = (gate_weight, up_weight, down_weight)
    return _swiglu("fp8_norm_swiglu_mlp", x, residual, norm_weight, eps, weights, caches, add_to_grad)


def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias in bfloat16, forward and backward: rounded operands, sums in float32, results rounded once.

    On a CPU without bfloat16 matrix units, where torch's own bfloat16 product is several times slower than the float32
    one, the rounded operands are multiplied in float32; elsewhere this is torch.nn.functional.linear.
    """
    x = x.to(torch.bfloat16)
    if x.device.type == "cpu" and not _CPU_HAS_BF16:
        if _needs_grad(x, weight, bias):
            return a.BF16Linear.apply(x, weight, bias)
        return a.bf16_product(x, weight.t(), bias)
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _swiglu(name, x, residual, norm_weight, eps, weights, caches, add_to_grad):
    x = _activation(name, x)
    residual = _like(name, "residual", x, residual)
    caches = (None,) * 3 if caches is None else tuple(caches)
    gate_weight, up_weight, down_weight = weights
    _check_weight(name, "gate_weight", gate_weight, x.shape[-1], None)
    _check_weight(name, "up_weight", up_weight, x.shape[-1], None)
    if up_weight.shape != gate_weight.shape:
        raise ValueError(f"{name}: up_weight {list(up_weight.shape)} must be as gate_weight {list(gate_weight.shape)}")
    _check_weight(name, "down_weight", down_weight, gate_weight.shape[0], None)
    if norm_weight is not None:
        _check_norm(name, norm_weight, x.shape[-1])
    if _needs_grad(x, residual, norm_weight, *weights):
        out = a.SwiGLU.apply(x, residual, norm_weight, eps, *weights, caches, add_to_grad)
        return (None, out) if residual is None else out
    total = None
    if norm_weight is None:
        rows = p.quantize_rows(x)
    else:
        total, rows, _, _ = a.norm_forward(x, residual, norm_weight, eps, False)
    return total, a.swiglu_forward(rows, x, weights, caches, False)[0]


# ---- checks ----


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _activation(name: str, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        x = x.to(torch.bfloat16)
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"{name}: x must be bfloat16 or float32, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{name}: x must be [..., features], got a scalar")
    return x


def _like(name: str, argument: str, x: Tensor, other: Tensor | None) -> Tensor | None:
    if other is None:
        return None
    other = _activation(name, other)
    if other.shape != x.shape or other.dtype != x.dtype:
        expected, got = (tuple(x.shape), x.dtype), (tuple(other.shape), other.dtype)
        raise ValueError(f"{name}: {argument} must be as x, {expected}, got {got}")
    return other


def _check_norm(name: str, weight: Tensor, features: int) -> None:
    if weight.dim() != 1 or weight.shape[0] != features:
        raise ValueError(f"{name}: norm weight must be [{features}], the features of x, got {list(weight.shape)}")


def _check_weight(name: str, argument: str, weight: Tensor, features: int, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != features:
        raise ValueError(f"{name}: {argument} must be [out, {features}], as x has it, got {list(weight.shape)}")
    if weight.shape[0] % 16 or features % 16:
        raise ValueError(f"{name}: sizes of {argument} must be multiples of 16, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias of {argument} must be [{weight.shape[0]}], got {list(bias.shape)}")
