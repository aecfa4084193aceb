"""Rotary position embedding (RoFormer, arXiv 2104.09864), halves of a head paired as in Hugging Face models; alone, or
fused with the norm of heads before it (Qwen3, arXiv 2505.09388), or its gradient with the casts after it."""

from typing import NamedTuple

import torch
from torch import Tensor

from eightfold.ops import _library, layouts  # noqa: F401  (loads torch.ops.eightfold)
from eightfold.ops.quant import QuantizedTensor

_ops = torch.ops.eightfold


class NormRotary(NamedTuple):
    """What ``rms_norm_rotary`` gives; the last two are None unless ``training``."""

    y: Tensor
    input: QuantizedTensor | None  # x as [batch * tokens * heads, dim] in groups (1, 128), for the backward pass
    rstd: Tensor | None  # float32 [batch * tokens * heads]


def rotary_tables(frequency: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, float32 [batch, tokens, 1, dim / 2].

    Args:
        frequency: float32 [dim / 2], contiguous: the angle between neighbouring tokens, in radians.
        positions: int32 or int64 [batch, tokens].

    Raises RuntimeError for other dtypes, shapes, layouts or devices.
    """
    return _ops.rotary_tables(frequency, positions.to(torch.int64).contiguous())


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Each head's halves (x1, x2) become (x1 cos - x2 sin, x2 cos + x1 sin), in float32, rounded once.

    Args:
        x: bfloat16 or float32 [batch, tokens, heads, dim], dim even and contiguous, any other strides.
        cos, sin: float32 [batch or 1, tokens, 1, dim / 2], contiguous.
        inverse: rotates back, which is also the gradient.

    Returns a contiguous tensor of x's shape and dtype. Differentiable in x. Raises RuntimeError for other dtypes,
    shapes or layouts.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotary.apply(x, cos, sin, inverse)
    return _ops.rotary(x, cos, sin, inverse)


def rotary_backward_quantize(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, *, columns: bool = True, bias: bool = False
) -> tuple[QuantizedTensor, QuantizedTensor | None, Tensor | None]:
    """Attention's gradients as operands of the products before it: ``quantize_beside`` of the gradients of queries and
    keys, rotated back, and of values, from one read of each.

    The bytes are those of ``rotary(dq, cos, sin, inverse=True)``, the same for dk, then ``quantize_beside``.

    Args:
        dq, dk, dv: bfloat16 or float32 [batch, tokens, heads, dim] of one dtype, the heads of each its own number, dim
            even and contiguous, any other strides; heads * dim of dq and dk is a multiple of 128.
        cos, sin: as for ``rotary``.
        columns: whether the second result is wanted.
        bias: whether the third is: float32 [columns], the sums of the rounded values over batch and tokens.

    Returns codes of [batch * tokens, columns of dq, dk and dv beside each other] in groups (1, 128) and (128, 1), and
    the sums, whose order is that of csrc/rotary/rotary_backward.h: the same bits on every run, device and CPU. On CUDA
    one kernel for dims of 64 and 128, a multiple of 8 tokens, and strides whole in 16 bytes; else several. Raises
    RuntimeError for other dtypes, shapes or layouts.
    """
    codes, scales, col_codes, col_scales, dbias = _ops.rotary_backward_quantize(dq, dk, dv, cos, sin, columns, bias)
    return (
        QuantizedTensor(codes, scales, (1, 128)),
        QuantizedTensor(col_codes, col_scales, (128, 1)) if columns else None,
        dbias if bias else None,
    )


def rms_norm_rotary(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6, *, training: bool = False
) -> NormRotary:
    """``rotary(rms_norm(x))`` of each head, from one read; with ``training`` also what the backward pass needs.

    The bits are those of the two ops in sequence: the norm's result is rounded to x's dtype before it is rotated.

    Args:
        x: bfloat16 or float32 [batch, tokens, heads, dim], dim even and contiguous, any other strides: a slice of the
            projection's output will do.
        weight: bfloat16 or float32 [dim].
        cos, sin: as for ``rotary``.
        eps: of the norm.

    Returns y contiguous, in x's shape and dtype. It has no gradient: ``nn.functional.fp8_rms_norm_rotary`` has. On CUDA
    one kernel for bfloat16, a dim of at most 128 that is a multiple of 16, and strides whole in 16 bytes; else several.
    Raises RuntimeError for other dtypes, shapes or layouts.
    """
    y, codes, scales, rstd = _ops.rms_norm_rotary(x, weight, eps, cos, sin, training)
    return NormRotary(y, QuantizedTensor(codes, scales, (1, 128)), rstd) if training else NormRotary(y, None, None)


def rms_norm_rotary_backward(
    dy: Tensor, x: QuantizedTensor, rstd: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``rms_norm_rotary``, with the bits of ``rotary(dy, inverse=True)`` and ``rms_norm_backward``.

    Args:
        dy: gradient of y, of its dtype and shape, dim contiguous, any other strides.
        x, rstd: as ``rms_norm_rotary`` left them.
        weight, cos, sin: as it was given them.

    Returns (dx, contiguous, as dy, dweight float32 [dim]); dweight has the same bits on every run and thread count.
    Raises ValueError for another group than (1, 128), RuntimeError for other dtypes, shapes or layouts.
    """
    if tuple(x.group) != (1, 128):
        raise ValueError(f"rms_norm_rotary_backward: x.group must be (1, 128), got {tuple(x.group)}")
    return _ops.rms_norm_rotary_backward(dy, x.codes, x.scales, rstd, weight, cos, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(x, cos, sin, inverse):
        return _ops.rotary(x, cos, sin, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, cos, sin, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return _Rotary.apply(grad, cos, sin, not ctx.inverse), None, None, None


@torch.library.register_fake("eightfold::rotary_tables")
def _(frequency, positions):
    shape = *positions.shape, 1, frequency.shape[0]
    return frequency.new_empty(shape), frequency.new_empty(shape)


@torch.library.register_fake("eightfold::rotary")
def _(x, cos, sin, inverse=False):
    return x.new_empty(x.shape)


@torch.library.register_fake("eightfold::rotary_backward_quantize")
def _(dq, dk, dv, cos, sin, columns=True, bias=False):
    rows, cols = dq.shape[0] * dq.shape[1], sum(x.shape[2] * x.shape[3] for x in (dq, dk, dv))

    def cast(group):
        return layouts.empty_codes(rows, cols, group, dq.device), layouts.empty_scales(rows, cols, group, dq.device)

    nothing = (dq.new_empty((0, 0), dtype=t) for t in (layouts.CODES, torch.float32))
    dbias = dq.new_empty(cols if bias else 0, dtype=torch.float32)
    return *cast((1, 128)), *(cast((128, 1)) if columns else nothing), dbias


@torch.library.register_fake("eightfold::rms_norm_rotary")
def _(x, weight, eps, cos, sin, training):
    rows, dim = x.shape[0] * x.shape[1] * x.shape[2], x.shape[3]
    if not training:
        saved = (x.new_empty(shape, dtype=t) for shape, t in (((0, 0), layouts.CODES), ((0, 0), torch.float32)))
        return x.new_empty(x.shape), *saved, x.new_empty(0, dtype=torch.float32)
    saved = (make(rows, dim, (1, 128), x.device) for make in (layouts.empty_codes, layouts.empty_scales))
    return x.new_empty(x.shape), *saved, x.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("eightfold::rms_norm_rotary_backward")
def _(dy, x_codes, x_scales, rstd, weight, cos, sin):
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[3], dtype=torch.float32)
