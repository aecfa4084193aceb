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
from eightfold.ops import _library  # noqa: F401  (loads torch.ops.eightfold; the package registers the fakes)
from eightfold.ops.gemm import product as multiply
from eightfold.ops.layouts import ceil_div

ops = torch.ops.eightfold

ROWS, COLUMNS, BLOCKS = [1, 128], [128, 1], [128, 128]
MOST_STACKED = 8  # what quantize_stacked and quantize_beside take
Codes = tuple[Tensor, Tensor]  # codes and scales


class WeightCache:
    """Keeps the (128, 128) codes of a parameter, or of several as one, while each is the same object, storage and
    version: 1 byte an element. Codes of another version take the place of those before, at their address: a CUDA graph
    that reads them goes on with the new ones.

    Writes that torch does not count (through `.data` or another library's kernels) need `clear()` or `refresh()`. Not
    used while compiling, nor for parameters made in inference mode, which have no version.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._weights, self._key, self._codes = (), None, None

    def codes(self, *weights: Tensor) -> Codes:
        if any(weight.is_inference() for weight in weights):
            return _cast(weights)
        key = [(weight._version, weight.data_ptr(), weight.shape) for weight in weights]
        same = len(self._weights) == len(weights) and all(map(_is_of, weights, self._weights))
        if not same or self._key != key:
            with torch.inference_mode(False), torch.no_grad():  # made while generating, written again while training
                codes = _cast(weights)
                self._codes = write_over(self._codes, codes) if same else codes
            self._key = key
            if not same:
                self._weights = tuple(weakref.ref(weight) for weight in weights)
        return self._codes

    def refresh(self) -> None:
        """Casts what is kept again, whatever its version."""
        weights = tuple(reference() for reference in self._weights)
        if weights and all(weight is not None for weight in weights):
            self._key = None
            self.codes(*weights)

    def __reduce__(self):  # copies and pickles of a layer start empty
        return WeightCache, ()


def _is_of(weight: Tensor, reference: weakref.ref) -> bool:
    """Whether it is the referent or shares its memory and version, as what a checkpointed layer has saved does."""
    known = reference()
    if known is None or known is weight:
        return known is weight
    return known.data_ptr() == weight.data_ptr() and known.shape == weight.shape and known._version == weight._version


def write_over(kept: Codes | None, codes: Codes) -> Codes:
    """``codes`` at the addresses of ``kept``, where they fit."""
    if kept is None or any(old.shape != new.shape or old.device != new.device for old, new in zip(kept, codes)):
        return codes
    kept[0].view(torch.uint8).copy_(codes[0].view(torch.uint8))
    kept[1].copy_(codes[1])
    return kept


class ServedCodes(WeightCache):
    """Codes of many weights, made elsewhere: one cache for all layers of a model, whose weights are never read."""

    def clear(self) -> None:
        self._each: dict[Tensor, Codes] = {}
        self._stacks: dict[tuple[Tensor, ...], Codes] = {}

    def put(self, weight: Tensor, codes: Tensor, scales: Tensor) -> None:
        """(128, 128) codes and scales of ``weight``; in the place of those before."""
        self._each[weight] = write_over(self._each.get(weight), (codes, scales))

    def refresh(self) -> None:
        """Nothing: whoever made the codes puts new ones."""

    def codes(self, *weights: Tensor) -> Codes:
        if len(weights) == 1:
            return self._each[weights[0]]
        if weights not in self._stacks:
            codes, scales = zip(*(self._each[weight] for weight in weights), strict=True)
            with torch.inference_mode(False), torch.no_grad():
                stack = torch.cat([each.view(torch.uint8) for each in codes]).view(codes[0].dtype)
                stack_scales = torch.cat(scales)
            # What they were stacked from becomes views: a byte an element is kept, not two.
            parts = stack.split([len(each) for each in codes]), stack_scales.split([len(each) for each in scales])
            self._each.update(zip(weights, zip(*parts, strict=True), strict=True))
            self._stacks[weights] = stack, stack_scales
        return self._stacks[weights]


def can_stack(weights: Sequence[Tensor]) -> bool:
    """Whether ``weights`` share products."""
    return (
        1 < len(weights) <= MOST_STACKED
        and all(weight.shape[0] % 128 == 0 for weight in weights[:-1])
        and all(weight.dtype == weights[0].dtype for weight in weights)
    )


def _cast(weights: Sequence[Tensor], transposed: bool = False) -> Codes:
    if len(weights) == 1 and not transposed:
        codes, scales = ops.quantize(weights[0].contiguous(), BLOCKS)
    else:
        codes, scales = ops.quantize_stacked([weight.contiguous() for weight in weights], transposed)
    return codes, scales


def _cache(caches: Sequence[WeightCache | None]) -> WeightCache | None:
    """The cache of weights that share products: the first one's, if all have one."""
    return None if torch.compiler.is_compiling() or any(cache is None for cache in caches) else caches[0]


def quantize_weights(weights: Sequence[Tensor], caches: Sequence[WeightCache | None]) -> Codes:
    """Codes of ``weights``, one below the other: [sum of out, in]."""
    cache = _cache(caches)
    return _cast(weights) if cache is None else cache.codes(*weights)


def _transposed_weights(weights: Sequence[Tensor], caches: Sequence[WeightCache | None]) -> Codes:
    """The same codes, [in, sum of out]."""
    cache = _cache(caches)
    if cache is None:
        return _cast(weights, transposed=True)
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
    return multiply(*rows, *quantize_weights([weight], [cache]), 128, bias, dtype)


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
    codes, scales = quantize_weights(weights, caches)
    sizes = [weight.shape[0] for weight in weights]
    if as_one and all(bias is None for bias in biases):
        return list(multiply(*rows, codes, scales, 128, None, dtype).split(sizes, 1))
    if as_one and all(bias is not None and bias.dtype == biases[0].dtype for bias in biases):
        return list(multiply(*rows, codes, scales, 128, torch.cat(list(biases)), dtype).split(sizes, 1))
    parts = zip(codes.split(sizes), scales.split([ceil_div(size, 128) for size in sizes]), biases, strict=True)
    return [multiply(*rows, part, part_scales, 128, bias, dtype) for part, part_scales, bias in parts]


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
