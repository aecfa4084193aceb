"""The three products of a linear layer, on codes: what every autograd Function of `functional` is composed of.

    forward   Y  = Q1x128(X)     Q128x128(W)^T
    dgrad     dX = Q1x128(dY)    Q128x128(W)         the same weight codes: a square grid transposes exactly
    wgrad     dW = Q128x1(dY)^T  Q128x1(X)           both operands grouped along the tokens

(Jet-RL, section 4; DeepSeek-V3 report, section 3.3.) Layers that read one input share products: their weights are cast
one below the other and their output gradients beside each other, so that all input gradients are one product, and all
weight gradients. Weights of several dtypes, or not a multiple of 128 high (the last may be), go one by one: the bits of
outputs and weight gradients are the same, those of the input gradient differ by the order of its fp32 sum.

Weights are never kept in FP8 between forward and backward, unless their layer has a `WeightCache`: the parameter is
there anyway, and casting it again costs one read of it.
"""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eightfold.nn._accumulation import joined
from eightfold.nn._weight_cache import Codes, WeightCache, cast_weights
from eightfold.ops import _library  # noqa: F401  (loads torch.ops.eightfold; the package registers the fakes)
from eightfold.ops.gemm import product as multiply
from eightfold.ops.layouts import ceil_div

ops = torch.ops.eightfold

ROWS, COLUMNS = [1, 128], [128, 1]
MOST_STACKED = 8  # what quantize_stacked and quantize_beside take


def can_stack(weights: Sequence[Tensor]) -> bool:
    """Whether ``weights`` share products."""
    return (
        1 < len(weights) <= MOST_STACKED
        and all(weight.shape[0] % 128 == 0 for weight in weights[:-1])
        and all(weight.dtype == weights[0].dtype for weight in weights)
    )


def _cache(caches: Sequence[WeightCache | None]) -> WeightCache | None:
    """The cache of weights that share products: the first one's, if all have one."""
    return None if torch.compiler.is_compiling() or any(cache is None for cache in caches) else caches[0]


def quantize_weights(weights: Sequence[Tensor], caches: Sequence[WeightCache | None]) -> tuple[Tensor, Tensor, bool]:
    """Codes and scales of ``weights``, one below the other: [sum of out, in]; and whether they are settled."""
    cache = _cache(caches)
    return (*cast_weights(weights), False) if cache is None else (*cache.codes(*weights), cache.settled)


def _transposed_weights(weights: Sequence[Tensor], caches: Sequence[WeightCache | None]) -> Codes:
    """The same codes, [in, sum of out]."""
    cache = _cache(caches)
    if cache is None:
        return cast_weights(weights, transposed=True)
    codes, scales = cache.codes(*weights)
    return ops.transpose_codes(codes), scales.t().contiguous()


# Codes of the last layer input, so that layers reading the same tensor (q, k, v) cast it, and save it, once:
# [(weak reference, version, codes)] or empty.
_last_input: list[tuple] = []


def _forget(reference) -> None:
    if _last_input and _last_input[0][0] is reference:
        _last_input.clear()


def quantize_rows(x: Tensor) -> Codes:
    """Row codes of ``x`` [..., features] as [tokens, features]."""
    codes, scales = ops.quantize(flat(x), ROWS)
    return codes, scales


def quantize_input(x: Tensor) -> tuple[Codes, Codes]:
    """Row and column codes of ``x`` [..., features] as [tokens, features], for a layer that keeps the columns."""
    shared = not torch.compiler.is_compiling() and not x.is_inference()
    if shared and x.is_cuda and torch.cuda.is_current_stream_capturing():
        shared = False  # a captured graph's memory must not outlive it here
    for reference, version, both in tuple(_last_input) if shared else ():
        if reference() is x and version == x._version:
            return both
    codes, scales, col_codes, col_scales = ops.quantize_both(flat(x))
    both = (codes, scales), (col_codes, col_scales)
    if shared:
        _last_input[:] = [(weakref.ref(x, _forget), x._version, both)]
    return both


def flat(x: Tensor) -> Tensor:
    """[tokens, features], contiguous: a view wherever one exists."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def product(rows: Codes, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, cache: WeightCache | None) -> Tensor:
    """X W^T + bias, [tokens, out_features]."""
    codes, scales, settled = quantize_weights([weight], [cache])
    return multiply(*rows, codes, scales, 128, bias, dtype, settled)


def products(
    rows: Codes,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    caches: Sequence[WeightCache | None],
    as_one: bool,
) -> list[Tensor]:
    """X W^T + bias of each layer, [tokens, out_features].

    ``as_one`` lets them be columns of one product. Not for outputs that a backward pass keeps some of: one such view
    keeps the memory of all.
    """
    if not can_stack(weights):
        return [product(rows, w, b, dtype, c) for w, b, c in zip(weights, biases, caches, strict=True)]
    codes, scales, settled = quantize_weights(weights, caches)
    sizes = [weight.shape[0] for weight in weights]
    if as_one and all(bias is None for bias in biases):
        return list(multiply(*rows, codes, scales, 128, None, dtype, settled).split(sizes, 1))
    if as_one and all(bias is not None and bias.dtype == biases[0].dtype for bias in biases):
        bias = torch.cat(list(biases))
        return list(multiply(*rows, codes, scales, 128, bias, dtype, settled).split(sizes, 1))
    parts = zip(codes.split(sizes), scales.split([ceil_div(size, 128) for size in sizes]), biases, strict=True)
    return [multiply(*rows, part, part_scales, 128, bias, dtype, settled) for part, part_scales, bias in parts]


def rotated_heads(out: Sequence[Tensor], tables: tuple[Tensor, Tensor], head_dim: int) -> list[Tensor]:
    """Queries, keys and values [batch, tokens, heads * dim] as heads [batch, tokens, heads, dim], the first two rotated
    by ``tables``."""
    q, k, v = (y.unflatten(-1, (-1, head_dim)) for y in out)
    return [ops.rotary(q, *tables), ops.rotary(k, *tables), v]


class Gradients(NamedTuple):
    """Output gradients of one layer, or of several beside each other, as operands."""

    rows: Codes
    columns: Codes | None  # None where no weight gradient needs them
    layers: range


def output_gradients(dys: list[Tensor], weights: Sequence[Tensor], needed: Sequence[bool]) -> list[Gradients]:
    """Casts each ``dy`` [tokens, out]; ``needed`` says which weights get gradients."""
    if can_stack(weights) and all(dy.dtype == dys[0].dtype for dy in dys):
        codes, scales, *columns = ops.quantize_beside(dys, any(needed))
        return [Gradients((codes, scales), tuple(columns) if any(needed) else None, range(len(dys)))]
    out = []
    for i, dy in enumerate(dys):
        codes, scales, *columns = ops.quantize_both(dy) if needed[i] else ops.quantize(dy, ROWS)
        out.append(Gradients((codes, scales), tuple(columns) if needed[i] else None, range(i, i + 1)))
    return out


def attention_gradients(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    tables: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    needed: Sequence[bool],
    biases: bool,
) -> tuple[list[Gradients], list[Tensor] | None]:
    """``output_gradients`` of the layers behind queries, keys and values, from the gradients of what attention reads
    [batch, tokens, heads, dim]: the first two were rotated by ``tables`` and are rotated back. With ``biases``, the
    float32 sums over the tokens, too."""
    grads = [g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv)]
    if can_stack(weights) and all(g.dtype == dq.dtype for g in grads):
        codes, scales, *columns, sums = ops.rotary_backward_quantize(*grads, *tables, any(needed), biases)
        shared = [Gradients((codes, scales), tuple(columns) if any(needed) else None, range(3))]
        return shared, list(sums.split([weight.shape[0] for weight in weights])) if biases else None
    grads = [ops.rotary(grads[0], *tables, True), ops.rotary(grads[1], *tables, True), grads[2]]
    dys = [flat(g.flatten(2)) for g in grads]
    return output_gradients(dys, weights, needed), [column_sums(dy) for dy in dys] if biases else None


def input_gradient(
    gradients: Sequence[Gradients], weights: Sequence[Tensor], caches: Sequence, dtype: torch.dtype
) -> Tensor:
    """Sum over layers of dY W, added up in float32 and rounded once."""
    if torch.compiler.is_compiling():
        codes, scales = zip(*(g.rows for g in gradients), strict=True)
        return _compiled_input_gradient(codes, scales, [len(g.layers) for g in gradients], list(weights), dtype)
    total = None
    for rows, _, layers in gradients:
        operand = _transposed_weights([weights[i] for i in layers], [caches[i] for i in layers])
        if len(gradients) == 1:
            return multiply(*rows, *operand, 128, None, dtype)
        if total is None:
            total = multiply(*rows, *operand, 128, None, torch.float32)
        else:
            ops.fp8_gemm_accumulate_(total, *rows, *operand)
    return total.to(dtype)


def weight_gradients(
    gradients: Sequence[Gradients],
    input_columns: Codes,
    weights: Sequence[Tensor],
    needed: Sequence[bool],
    totals: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """dY^T X of each weight that needs it; of layers that share a product they are views of its result. Where there is
    a total, it is added to that, and None is returned."""
    out: list[Tensor | None] = [None] * len(weights)
    for _, columns, layers in gradients:
        sizes = [weights[i].shape[0] for i in layers]
        of_layers = [totals[i] for i in layers]
        total, new = joined(of_layers), all(total is None for total in of_layers)
        if all(needed[i] for i in layers) and (new or total is not None):
            whole = weight_gradient(columns, input_columns, weights[layers[0]].dtype, total)
            if whole is not None:
                out[layers.start : layers.stop] = whole.split(sizes) if len(sizes) > 1 else [whole]
            continue
        begin = 0
        for i, size in zip(layers, sizes, strict=True):
            if needed[i]:
                part = tuple(t[:, begin : begin + size] for t in columns)
                out[i] = weight_gradient(part, input_columns, weights[i].dtype, totals[i])
            begin += size
    return out


def weight_gradient(
    grad_columns: Codes, input_columns: Codes, dtype: torch.dtype, total: Tensor | None
) -> Tensor | None:
    """dY^T X, [out_features, in_features]; tokens are the contraction. With a ``total``, added to it: None."""
    (dy, dy_scales), (x, x_scales) = grad_columns, input_columns
    if total is None:
        return multiply(dy.t(), dy_scales.t(), x.t(), x_scales.t(), 1, None, dtype)
    ops.fp8_gemm_accumulate_(total, dy.t(), dy_scales.t(), x.t(), x_scales.t(), 1)
    return None


def weight_gradient_of_input(grad_columns: Codes, x: Tensor, dtype: torch.dtype, total: Tensor | None) -> Tensor | None:
    """``weight_gradient``, casting X [..., in_features] here."""
    if torch.compiler.is_compiling():
        return _compiled_weight_gradient(*grad_columns, x, dtype)
    return weight_gradient(grad_columns, ops.quantize(flat(x), COLUMNS), dtype, total)


# The compiler would move a cast of a weight, or of a saved input, from the backward pass into the forward and save its
# result: a byte for every parameter. Inside an op of its own it stays with the gradient that it needs.


@torch.library.custom_op("eightfold_nn::linear_input_gradient", mutates_args=())
def _compiled_input_gradient(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    counts: Sequence[int],
    weights: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    gradients, begin = [], 0
    for code, scale, count in zip(codes, scales, counts, strict=True):
        gradients.append(Gradients((code, scale), None, range(begin, begin + count)))
        begin += count
    return input_gradient(gradients, list(weights), [None] * len(weights), dtype)


@_compiled_input_gradient.register_fake
def _(codes, scales, counts, weights, dtype):
    return weights[0].new_empty(codes[0].shape[0], weights[0].shape[1], dtype=dtype)


@torch.library.custom_op("eightfold_nn::linear_weight_gradient", mutates_args=())
def _compiled_weight_gradient(dy_codes: Tensor, dy_scales: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return weight_gradient_of_input((dy_codes, dy_scales), x, dtype, None)


@_compiled_weight_gradient.register_fake
def _(dy_codes, dy_scales, x, dtype):
    return x.new_empty(dy_codes.shape[1], x.shape[-1], dtype=dtype)


def norm_columns(codes: Tensor, scales: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype) -> Codes:
    """Column codes of a norm's output, from the codes of its input."""
    make = _compiled_norm_columns if torch.compiler.is_compiling() else ops.rms_norm_columns
    col_codes, col_scales = make(codes, scales, rstd, weight, dtype)
    return col_codes, col_scales


@torch.library.custom_op("eightfold_nn::norm_columns", mutates_args=())
def _compiled_norm_columns(
    codes: Tensor, scales: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return ops.rms_norm_columns(codes, scales, rstd, weight, dtype)


@_compiled_norm_columns.register_fake
def _(codes, scales, rstd, weight, dtype):
    return ops.rms_norm_columns(codes, scales, rstd, weight, dtype)


def column_sums(dy: Tensor) -> Tensor:
    return dy.sum(0, dtype=torch.float32)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    return column_sums(dy).to(dtype)
