"""SwiGLU, alone or fused with casts: h = gate * sigmoid(gate) * up, the input of an MLP's down projection.

Sources: COAT (arXiv 2410.19313, section 5) and DeepSeek-V3 (arXiv 2412.19437, section 3.3.3): gate and up are saved in
FP8 and h is recomputed from them, so that a training step stores 2 bytes an element.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from eightfold.ops import _library, layouts  # noqa: F401  (loads torch.ops.eightfold)
from eightfold.ops.quant import QuantizedTensor

_ops = torch.ops.eightfold

ROWS, COLS = (1, 128), (128, 1)


class SwigluCasts(NamedTuple):
    """All in groups (1, 128); the last two are None unless ``training``."""

    h: QuantizedTensor
    gate: QuantizedTensor | None
    up: QuantizedTensor | None


class SwigluGradients(NamedTuple):
    """Rows are operands of dgrad, columns of the weight gradients of gate, up and down.

    With ``beside``, dgate and dgate_cols hold [dgate | dup], and dup and dup_cols are None.
    """

    dgate: QuantizedTensor
    dgate_cols: QuantizedTensor
    dup: QuantizedTensor | None
    dup_cols: QuantizedTensor | None
    h_cols: QuantizedTensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer, arXiv 2002.05202), for inference: it has no gradient.

    Args:
        gate, up: bfloat16 or float32 [tokens, features] of one dtype, last dimension contiguous, any row stride: both
            may be halves of one wider buffer.

    Returns [tokens, features] in gate's dtype, contiguous; computed in float32 and rounded once. Raises RuntimeError
    for other dtypes, shapes or layouts.
    """
    return _ops.swiglu(gate, up)


def swiglu_quantize(gate: Tensor, up: Tensor, *, training: bool = False) -> SwigluCasts:
    """``quantize(silu(gate) * up, (1, 128))`` from one read; with ``training`` also gate and up in FP8.

    Arguments and errors are those of ``swiglu``, whose result is cast.
    """
    codes, scales, *saved = _ops.swiglu_quantize(gate, up, training)
    h = QuantizedTensor(codes, scales, ROWS)
    if not training:
        return SwigluCasts(h, None, None)
    return SwigluCasts(h, QuantizedTensor(*saved[:2], ROWS), QuantizedTensor(*saved[2:], ROWS))


def swiglu_backward_quantize(
    dh: Tensor, gate: QuantizedTensor, up: QuantizedTensor, *, beside: bool = False
) -> SwigluGradients:
    """Gradients of gate and up, and h recomputed, all as FP8 operands of the GEMMs that follow, from one read.

    Args:
        dh: gradient of h, bfloat16 or float32 [tokens, features], last dimension contiguous, any row stride.
        gate, up: as ``swiglu_quantize`` saved them.
        beside: dgate and dup side by side in one buffer, for one product each with the weights [gate; up]; features are
            then a multiple of 128. The bytes are the same.

    Raises ValueError for another group, RuntimeError for other dtypes, shapes or layouts.
    """
    for name, q in (("gate", gate), ("up", up)):
        if tuple(q.group) != ROWS:
            raise ValueError(f"swiglu_backward_quantize: {name}.group must be {ROWS}, got {tuple(q.group)}")
    out = _ops.swiglu_backward_quantize(dh, gate.codes, gate.scales, up.codes, up.scales, beside)
    groups = (ROWS, COLS, ROWS, COLS, COLS)
    casts = [QuantizedTensor(out[2 * i], out[2 * i + 1], g) for i, g in enumerate(groups)]
    return SwigluGradients(*casts[:2], *([None, None] if beside else casts[2:4]), casts[4])


def _empty_cast(like: Tensor, group: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rows, cols = like.shape
    return layouts.empty_codes(rows, cols, group, like.device), layouts.empty_scales(rows, cols, group, like.device)


@torch.library.register_fake("eightfold::swiglu")
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("eightfold::swiglu_quantize")
def _(gate, up, training):
    h = _empty_cast(gate, ROWS)
    if training:
        return *h, *_empty_cast(gate, ROWS), *_empty_cast(gate, ROWS)
    return *h, *(gate.new_empty((0, 0), dtype=t) for t in (layouts.CODES, torch.float32) * 2)


@torch.library.register_fake("eightfold::swiglu_backward_quantize")
def _(dh, gate_codes, gate_scales, up_codes, up_scales, beside=False):
    if not beside:
        return tuple(t for group in (ROWS, COLS, ROWS, COLS, COLS) for t in _empty_cast(dh, group))
    both = dh.new_empty(dh.shape[0], 2 * dh.shape[1])
    nothing = (dh.new_empty((0, 0), dtype=t) for t in (layouts.CODES, torch.float32) * 2)
    return *_empty_cast(both, ROWS), *_empty_cast(both, COLS), *nothing, *_empty_cast(dh, COLS)
