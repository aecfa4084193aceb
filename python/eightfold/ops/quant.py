"""Casts to FP8 (E4M3) with one scale a group, and back.

Source of the scheme: groups of 1x128 for activations and 128x128 for weights as in DeepSeek-V3 (arXiv 2412.19437,
section 3.3.2), 1x16 as in COAT (arXiv 2410.19313, section 5.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.ops import _library, layouts

_ops = torch.ops.eightfold
_quantize, _quantize_both = _library.direct("quantize"), _library.direct("quantize_both")

Group = tuple[int, int]


@dataclass(frozen=True)
class QuantizedTensor:
    """An FP8 matrix: ``codes[i, j] * scales[i // group[0], j // group[1]]`` is its value.

    codes: float8_e4m3fn [rows, cols]; scales: float32 [ceil(rows / group[0]), ceil(cols / group[1])]. Shapes are
    logical; strides are those the matrix kernels read (eightfold.ops.layouts).
    """

    codes: Tensor
    scales: Tensor
    group: Group

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def t(self) -> "QuantizedTensor":
        """The transpose as a view. Column codes (128, 1) become row-major (1, 128), what a matrix product takes."""
        return QuantizedTensor(self.codes.t(), self.scales.t(), (self.group[1], self.group[0]))

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """codes * scales in float32, rounded once to ``dtype`` (bfloat16 or float32); row-major [rows, cols]."""
        return _ops.dequantize(self.codes, self.scales, list(self.group), dtype)


def quantize(x: Tensor, group: Group, power_of_two: bool = False) -> QuantizedTensor:
    """Casts ``x`` to FP8 with one scale for each ``group`` block.

    Args:
        x: bfloat16 or float32 [rows, cols], last dimension contiguous, any row stride.
        group: (1, 128) activations and gradients, (128, 128) weights, (128, 1) operands of a weight gradient, (1, 16).
        power_of_two: rounds scales up to a power of two; scaling is then exact, at up to one bit of range.

    A group that holds a NaN or an Inf gets a NaN scale and NaN codes. Raises RuntimeError for another dtype, rank,
    layout or group.
    """
    group = list(group)
    codes, scales = _quantize(x, group, True) if power_of_two else _quantize(x, group)
    return QuantizedTensor(codes, scales, (group[0], group[1]))


def quantize_both(x: Tensor, power_of_two: bool = False) -> tuple[QuantizedTensor, QuantizedTensor]:
    """``quantize`` in groups (1, 128) and (128, 1) from one read of ``x``: a gradient's operands of dgrad and wgrad."""
    codes, scales, col_codes, col_scales = _quantize_both(x, True) if power_of_two else _quantize_both(x)
    return QuantizedTensor(codes, scales, (1, 128)), QuantizedTensor(col_codes, col_scales, (128, 1))


def quantize_stacked(xs: Sequence[Tensor], *, transposed: bool = False) -> QuantizedTensor:
    """``quantize`` in groups (128, 128) of several weights laid one below the other, or of the transpose of that.

    The first is the operand of one product for several layers, [sum of rows, cols]; the second that of their common
    input gradient, [cols, sum of rows]. The bytes are those of each weight's own cast.

    Args:
        xs: 1 to 8, bfloat16 or float32 [rows, cols] of one dtype, last dimension contiguous; all but the last have a
            multiple of 128 rows.

    Raises RuntimeError for other dtypes, shapes or layouts.
    """
    return QuantizedTensor(*_ops.quantize_stacked(list(xs), transposed), (128, 128))


def quantize_beside(xs: Sequence[Tensor], *, columns: bool = True) -> tuple[QuantizedTensor, QuantizedTensor | None]:
    """``quantize_both`` of several matrices laid beside each other, in one launch; the second is None unless wanted.

    The bytes are those of each one's own cast.

    Args:
        xs: 1 to 8, bfloat16 or float32 [rows, cols] of one dtype, last dimension contiguous; all but the last have a
            multiple of 128 columns.

    Raises RuntimeError for other dtypes, shapes or layouts.
    """
    codes, scales, *cols = _ops.quantize_beside(list(xs), columns)
    return QuantizedTensor(codes, scales, (1, 128)), QuantizedTensor(*cols, (128, 1)) if columns else None


def requantize(q: QuantizedTensor, power_of_two: bool = False) -> QuantizedTensor:
    """From groups (1, 128) to (128, 1), through float32.

    Rounds a second time: prefer ``quantize_both`` where the source exists.

    Raises ValueError for another group, RuntimeError for a layout that ``quantize`` does not give.
    """
    if q.group != (1, 128):
        raise ValueError(f"requantize: q.group must be (1, 128), got {q.group}")
    return QuantizedTensor(*_ops.requantize(q.codes, q.scales, power_of_two), (128, 1))


def transpose(q: QuantizedTensor) -> QuantizedTensor:
    """Row-major transpose of a tensor in groups (128, 128); exact, for the scales transpose along.

    Raises ValueError for another group: its scales would not match (``q.t()`` is the view, ``requantize`` a cast).
    """
    if q.group != (128, 128):
        raise ValueError(f"transpose: q.group must be (128, 128), got {q.group}")
    return QuantizedTensor(_ops.transpose_codes(q.codes), q.scales.t().contiguous(), (128, 128))


def _empty(rows: int, cols: int, group: Group, like: Tensor) -> tuple[Tensor, Tensor]:
    return layouts.empty_codes(rows, cols, group, like.device), layouts.empty_scales(rows, cols, group, like.device)


@torch.library.register_fake("eightfold::quantize")
def _(x, group, power_of_two=False):
    return _empty(*x.shape, tuple(group), x)


@torch.library.register_fake("eightfold::quantize_both")
def _(x, power_of_two=False):
    return *_empty(*x.shape, (1, 128), x), *_empty(*x.shape, (128, 1), x)


@torch.library.register_fake("eightfold::quantize_stacked")
def _(xs, transposed=False):
    rows, cols = sum(x.shape[0] for x in xs), xs[0].shape[1]
    if not transposed:
        return _empty(rows, cols, (128, 128), xs[0])
    scales = layouts.empty_scales(cols, rows, (128, 128), xs[0].device)
    return layouts.empty_turned_codes(rows, cols, xs[0].device), scales


@torch.library.register_fake("eightfold::quantize_beside")
def _(xs, columns=True):
    rows, cols = xs[0].shape[0], sum(x.shape[1] for x in xs)
    if columns:
        return *_empty(rows, cols, (1, 128), xs[0]), *_empty(rows, cols, (128, 1), xs[0])
    nothing = (xs[0].new_empty((0, 0), dtype=t) for t in (layouts.CODES, torch.float32))
    return *_empty(rows, cols, (1, 128), xs[0]), *nothing


@torch.library.register_fake("eightfold::requantize")
def _(codes, scales, power_of_two=False):
    return _empty(*codes.shape, (128, 1), codes)


@torch.library.register_fake("eightfold::transpose_codes")
def _(codes):
    rows, cols = codes.shape
    return codes.new_empty((cols, rows))


@torch.library.register_fake("eightfold::dequantize")
def _(codes, scales, group, dtype):
    return codes.new_empty(codes.shape, dtype=dtype)
