"""RMS normalisation, alone or fused with the casts around it.

y = x / sqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once to x's dtype; every cast reads the rounded
value, so a fused op has the bytes of its parts. A row's result depends on that row alone. Source of the flow: COAT
(arXiv 2410.19313, section 5): the norm's input is saved in FP8, its output goes to the next GEMM in FP8.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from eightfold.ops import _library, layouts  # noqa: F401  (loads torch.ops.eightfold)
from eightfold.ops.quant import QuantizedTensor

_ops = torch.ops.eightfold

ROWS, COLS = (1, 128), (128, 1)


class NormCasts(NamedTuple):
    """What a fused norm gives; the last three are None unless ``training``."""

    rows: QuantizedTensor  # y in groups (1, 128): the operand of the next forward GEMM
    cols: QuantizedTensor | None  # y in groups (128, 1): the operand of the weight gradient
    input: QuantizedTensor | None  # the norm's input in groups (1, 128), for rms_norm_backward
    rstd: Tensor | None  # float32 [tokens]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMS norm of each row.

    Args:
        x: bfloat16 or float32 [tokens, features], contiguous (CUDA: at most 16384 features).
        weight: bfloat16 or float32 [features].

    Returns [tokens, features] in x's dtype. Raises RuntimeError for other dtypes, shapes or layouts.
    """
    return _ops.rms_norm(x, weight, eps, False)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``x + residual``, rounded to x's dtype, and ``rms_norm`` of that sum, from one read; for inference: it has no
    gradient.

    ``residual`` has x's shape and dtype; the rest as ``rms_norm``. Returns (sum, y), both as x.
    """
    return _ops.add_rms_norm(x, residual, weight, eps)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float = 1e-6, *, training: bool = False) -> NormCasts:
    """``quantize(rms_norm(x))`` from one read; with ``training`` also what the backward pass needs.

    Arguments and errors are those of ``rms_norm``.
    """
    return _casts(_ops.rms_norm_quantize(x, weight, eps, training), training)


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, training: bool = False
) -> tuple[Tensor, NormCasts]:
    """``x + residual``, rounded to x's dtype, and ``rms_norm_quantize`` of that sum, from one read.

    ``residual`` has x's shape and dtype; the rest as ``rms_norm``. Returns (sum, casts).
    """
    total, *out = _ops.add_rms_norm_quantize(x, residual, weight, eps, training)
    return total, _casts(out, training)


def rms_norm_columns(
    x: QuantizedTensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    """The norm's output in groups (128, 1) again, from its input as the forward pass saved it.

    For who would rather not save ``NormCasts.cols``: a byte an element less, for a second rounding to E4M3 of what the
    weight gradient reads.

    Args:
        x: the norm's input in groups (1, 128), rstd: float32 [tokens]; both as the fused ops saved them.
        weight: bfloat16 or float32 [features].
        dtype: of the norm's output: torch.bfloat16 or torch.float32.

    Raises ValueError for another group, RuntimeError for other dtypes, shapes or layouts.
    """
    if tuple(x.group) != ROWS:
        raise ValueError(f"rms_norm_columns: x.group must be {ROWS}, got {tuple(x.group)}")
    return QuantizedTensor(*_ops.rms_norm_columns(x.codes, x.scales, rstd, weight, dtype), COLS)


def rms_norm_backward(
    dy: Tensor, x: Tensor | QuantizedTensor, rstd: Tensor, weight: Tensor, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``rms_norm`` (COAT, section 5).

    Args:
        dy: gradient of y, bfloat16 or float32 [tokens, features], contiguous.
        x: the norm's input: in dy's dtype, or in groups (1, 128) as the fused ops saved it.
        rstd: float32 [tokens], as the forward pass gave it.
        weight: bfloat16 or float32 [features].
        residual_grad: added to dx in float32, before its only rounding; dy's dtype and shape.

    Returns (dx in dy's dtype, dweight float32 [features]); dweight has the same bits on every run and thread count.
    Raises ValueError for another group, RuntimeError for other dtypes, shapes or layouts.
    """
    if isinstance(x, QuantizedTensor):
        if tuple(x.group) != ROWS:
            raise ValueError(f"rms_norm_backward: x.group must be {ROWS}, got {tuple(x.group)}")
        return _ops.rms_norm_backward(dy, x.codes, x.scales, rstd, weight, residual_grad)
    return _ops.rms_norm_backward(dy, x, None, rstd, weight, residual_grad)


def _casts(out, training: bool) -> NormCasts:
    codes, scales, col_codes, col_scales, x_codes, x_scales, rstd = out
    rows = QuantizedTensor(codes, scales, ROWS)
    if not training:
        return NormCasts(rows, None, None, None)
    return NormCasts(rows, QuantizedTensor(col_codes, col_scales, COLS), QuantizedTensor(x_codes, x_scales, ROWS), rstd)


def _empty_cast(like: Tensor, group: tuple[int, int], wanted: bool = True) -> tuple[Tensor, Tensor]:
    if not wanted:
        return like.new_empty((0, 0), dtype=layouts.CODES), like.new_empty((0, 0), dtype=torch.float32)
    rows, cols = like.shape
    return layouts.empty_codes(rows, cols, group, like.device), layouts.empty_scales(rows, cols, group, like.device)


@torch.library.register_fake("eightfold::rms_norm")
def _(x, weight, eps, training):
    rstd = x.new_empty(x.shape[0] if training else 0, dtype=torch.float32)
    return x.new_empty(x.shape), *_empty_cast(x, ROWS, training), rstd


@torch.library.register_fake("eightfold::add_rms_norm")
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("eightfold::rms_norm_quantize")
def _(x, weight, eps, training):
    rstd = x.new_empty(x.shape[0] if training else 0, dtype=torch.float32)
    return *_empty_cast(x, ROWS), *_empty_cast(x, COLS, training), *_empty_cast(x, ROWS, training), rstd


@torch.library.register_fake("eightfold::add_rms_norm_quantize")
def _(x, residual, weight, eps, training):
    rstd = x.new_empty(x.shape[0] if training else 0, dtype=torch.float32)
    casts = *_empty_cast(x, ROWS), *_empty_cast(x, COLS, training), *_empty_cast(x, ROWS, training)
    return x.new_empty(x.shape), *casts, rstd


@torch.library.register_fake("eightfold::rms_norm_columns")
def _(x_codes, x_scales, rstd, weight, dtype):
    return _empty_cast(x_codes, COLS)


@torch.library.register_fake("eightfold::rms_norm_backward")
def _(dy, x, x_scales, rstd, weight, residual_grad):
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[1], dtype=torch.float32)
