"""The three products of a linear layer, on codes: what every autograd Function of `functional` is composed of.

    forward   Y  = Q1x128(X)     Q128x128(W)^T
    dgrad     dX = Q1x128(dY)    Q128x128(W)         the same weight codes: a square grid transposes exactly
    wgrad     dW = Q128x1(dY)^T  Q128x1(X)           both operands grouped along the tokens

(Jet-RL, section 4; DeepSeek-V3 report, section 3.3.) Weights are never kept in FP8 between forward and backward, unless
their layer has a `WeightCache`: the parameter is there anyway, and casting it again costs one read of it.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from eightfold.ops import _library, gemm  # noqa: F401  (loads torch.ops.eightfold; the package registers the fakes)

ops = torch.ops.eightfold

ROWS, COLUMNS, BLOCKS = [1, 128], [128, 1], [128, 128]
Codes = tuple[Tensor, Tensor]  # codes and scales


class WeightCache:
    """Keeps the (128, 128) codes of one parameter while it is the same object, storage and version: 1 byte an element.

    Writes that torch does not count (through `.data` or another library's kernels) need `clear()`. Not used while
    compiling, nor for parameters made in inference mode, which have no version.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._weight, self._key, self._codes = None, None, None

    def codes(self, weight: Tensor) -> Codes:
        if weight.is_inference():
            return quantize_weight(weight, None)
        key = (weight._version, weight.data_ptr(), weight.shape)
        if self._weight is None or self._weight() is not weight or self._key != key:
            self._codes = quantize_weight(weight, None)
            self._weight, self._key = weakref.ref(weight), key
        return self._codes

    def __reduce__(self):  # copies and pickles of a layer start empty
        return WeightCache, ()


def quantize_weight(weight: Tensor, cache: WeightCache | None) -> Codes:
    if cache is not None and not torch.compiler.is_compiling():
        return cache.codes(weight)
    codes, scales = ops.quantize(weight.contiguous(), BLOCKS)
    return codes, scales


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
    return gemm.product(*rows, *quantize_weight(weight, cache), 128, bias, dtype)


def input_gradient(grads: list[Codes], weights: list[Tensor], caches: list, dtype: torch.dtype) -> Tensor:
    """Sum over layers of dY W, added up in float32 and rounded once."""
    if torch.compiler.is_compiling():
        return _compiled_input_gradient([g[0] for g in grads], [g[1] for g in grads], list(weights), dtype)
    total = None
    for rows, weight, cache in zip(grads, weights, caches, strict=True):
        codes, scales = quantize_weight(weight, cache)
        transposed = ops.transpose_codes(codes), scales.t().contiguous()
        if total is None:
            total = gemm.product(*rows, *transposed, 128, None, dtype if len(weights) == 1 else torch.float32)
        else:
            ops.fp8_gemm_accumulate_(total, *rows, *transposed)
    return total.to(dtype)


def weight_gradient(grad_columns: Codes, input_columns: Codes, dtype: torch.dtype) -> Tensor:
    """dY^T X, [out_features, in_features]; tokens are the contraction."""
    (dy, dy_scales), (x, x_scales) = grad_columns, input_columns
    return gemm.product(dy.t(), dy_scales.t(), x.t(), x_scales.t(), 1, None, dtype)


def weight_gradient_of_input(grad_columns: Codes, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dY^T X, casting X [..., in_features] here."""
    if torch.compiler.is_compiling():
        return _compiled_weight_gradient(*grad_columns, x, dtype)
    return weight_gradient(grad_columns, ops.quantize(flat(x), COLUMNS), dtype)


# The compiler would move a cast of a weight, or of a saved input, from the backward pass into the forward and save its
# result: a byte for every parameter. Inside an op of its own it stays with the gradient that it needs.


@torch.library.custom_op("eightfold_nn::linear_input_gradient", mutates_args=())
def _compiled_input_gradient(
    codes: Sequence[Tensor], scales: Sequence[Tensor], weights: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    return input_gradient(list(zip(codes, scales, strict=True)), list(weights), [None] * len(weights), dtype)


@_compiled_input_gradient.register_fake
def _(codes, scales, weights, dtype):
    return weights[0].new_empty(codes[0].shape[0], weights[0].shape[1], dtype=dtype)


@torch.library.custom_op("eightfold_nn::linear_weight_gradient", mutates_args=())
def _compiled_weight_gradient(dy_codes: Tensor, dy_scales: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return weight_gradient_of_input((dy_codes, dy_scales), x, dtype)


@_compiled_weight_gradient.register_fake
def _(dy_codes, dy_scales, x, dtype):
    return x.new_empty(dy_codes.shape[1], x.shape[-1], dtype=dtype)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.sum(0, dtype=torch.float32).to(dtype)
