"""LayerNorm without parameters, modulated by a sample's vectors, alone or after a gated residual, and with casts.

The norms of diffusion transformers with AdaLN (DiT, arXiv 2212.09748; AdaLN-single: PixArt-alpha, arXiv 2310.00426), as
SANA has them. Computed in float32 and rounded once; every cast reads the rounded value, so a fused op has the bytes of
its parts. A token's result depends on that token and its sample's vectors alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from eightfold.ops import _library, layouts  # noqa: F401  (loads torch.ops.eightfold)
from eightfold.ops.quant import QuantizedTensor

_ops = torch.ops.eightfold

ROWS, COLS = (1, 128), (128, 1)


class ModulateCasts(NamedTuple):
    """What a fused norm gives; the last three are None unless ``training``."""

    rows: QuantizedTensor  # y as [batch * tokens, features] in groups (1, 128): the operand of the next forward GEMM
    cols: QuantizedTensor | None  # y in groups (128, 1): the operand of the weight gradient
    mean: Tensor | None  # float32 [batch, tokens]
    rstd: Tensor | None  # the same: 1 / sqrt(variance + eps)


class ModulateGradients(NamedTuple):
    """dx and dbranch in dy's dtype, the others float32 [batch, features]; dbranch and dgate None without a gate."""

    dx: Tensor
    dbranch: Tensor | None
    dgate: Tensor | None
    dscale: Tensor
    dshift: Tensor


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """``layer_norm(x) * (1 + scale) + shift``.

    Args:
        x: bfloat16 or float32 [batch, tokens, features], contiguous; on CUDA a multiple of 8 features, 8192 at most.
        scale, shift: bfloat16 or float32 [batch, features], both of one dtype, last dimension contiguous, any row
            stride: slices of one table [batch, 6, features] will do.

    Returns a tensor as x. Differentiable in all three; gradients have the same bits on every run. Raises RuntimeError
    for other dtypes, shapes or layouts.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, scale, shift)):
        return _LayerNormModulate.apply(x, scale, shift, eps)[0]
    return _ops.layer_norm_modulate(x, scale, shift, eps, False)[0]


def gated_residual_layer_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``r = x + gate * branch``, rounded to x's dtype, and ``layer_norm_modulate`` of r, from one read.

    Args:
        branch: as x.
        gate: as scale; None counts as one.

    The rest as for ``layer_norm_modulate``. Returns (r, y), both as x. Differentiable in all tensors.
    """
    tensors = (x, branch, gate, scale, shift)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _GatedResidual.apply(x, branch, gate, scale, shift, eps)[:2]
    return _ops.gated_residual_layer_norm_modulate(x, branch, gate, scale, shift, eps, False)[:2]


def layer_norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, training: bool = False
) -> ModulateCasts:
    """``quantize(layer_norm_modulate(x).flatten(0, 1))``; with ``training`` also what the backward pass needs beside x.

    Arguments and errors are those of ``layer_norm_modulate``. No gradient.
    """
    return _casts(_ops.layer_norm_modulate_quantize(x, scale, shift, eps, training), training)


def gated_residual_layer_norm_modulate_quantize(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    *,
    training: bool = False,
) -> tuple[Tensor, ModulateCasts]:
    """(r, casts): ``r = x + gate * branch`` and ``layer_norm_modulate_quantize`` of r, from one read. No gradient.

    Arguments and errors are those of ``gated_residual_layer_norm_modulate``.
    """
    r, *out = _ops.gated_residual_layer_norm_modulate_quantize(x, branch, gate, scale, shift, eps, training)
    return r, _casts(out, training)


def layer_norm_modulate_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    residual_grad: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
) -> ModulateGradients:
    """Gradients of ``layer_norm_modulate`` and, with ``branch`` and ``gate``, of the gated residual before it.

    Args:
        dy: gradient of y, bfloat16 or float32 [batch, tokens, features], contiguous.
        x: what was normalised, x or r, as dy.
        mean, rstd: float32 [batch, tokens], as the forward pass gave them.
        scale: as in the forward pass.
        residual_grad: added to dx in float32, before its only rounding; as dy.
        branch, gate: as in the forward pass, where it had a gate; both or neither.

    dbranch and dgate are made from dx before it is rounded. The sums over tokens have the same bits on every run and do
    not depend on other samples. Raises RuntimeError for other dtypes, shapes or layouts.
    """
    dx, dbranch, dgate, dscale, dshift = _ops.layer_norm_modulate_backward(
        dy, x, mean, rstd, scale, residual_grad, branch, gate
    )
    return ModulateGradients(dx, *((None, None) if gate is None else (dbranch, dgate)), dscale, dshift)


def _casts(out, training: bool) -> ModulateCasts:
    codes, scales, col_codes, col_scales, mean, rstd = out
    rows = QuantizedTensor(codes, scales, ROWS)
    if not training:
        return ModulateCasts(rows, None, None, None)
    return ModulateCasts(rows, QuantizedTensor(col_codes, col_scales, COLS), mean, rstd)


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(x, scale, shift, eps):
        return _ops.layer_norm_modulate(x, scale, shift, eps, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, shift, _ = inputs
        _, mean, rstd = output
        ctx.save_for_backward(x, mean, rstd, scale)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.shift_dtype = shift.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *_):
        *saved, scale = ctx.saved_tensors
        out = _ops.layer_norm_modulate_backward(dy.contiguous(), *saved, scale, None, None, None)
        return out[0], out[3].to(scale.dtype), out[4].to(ctx.shift_dtype), None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(x, branch, gate, scale, shift, eps):
        return _ops.gated_residual_layer_norm_modulate(x, branch, gate, scale, shift, eps, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, branch, gate, scale, shift, _ = inputs
        r, _, mean, rstd = output
        ctx.save_for_backward(r, mean, rstd, scale, *(() if gate is None else (branch, gate)))
        ctx.mark_non_differentiable(mean, rstd)
        ctx.shift_dtype = shift.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dr, dy, *_):
        r, mean, rstd, scale, *gated = ctx.saved_tensors
        branch, gate = gated or (None, None)
        dx, dbranch, dgate, dscale, dshift = _ops.layer_norm_modulate_backward(
            dy.contiguous(), r, mean, rstd, scale, dr.contiguous(), branch, gate
        )
        dbranch, dgate = (dx, None) if gate is None else (dbranch, dgate.to(gate.dtype))
        return dx, dbranch, dgate, dscale.to(scale.dtype), dshift.to(ctx.shift_dtype), None


def _fake_casts(x: Tensor, training: bool) -> tuple[Tensor, ...]:
    rows, cols = x.shape[0] * x.shape[1], x.shape[2]

    def cast(group):
        return layouts.empty_codes(rows, cols, group, x.device), layouts.empty_scales(rows, cols, group, x.device)

    nothing = tuple(x.new_empty((0, 0), dtype=t) for t in (layouts.CODES, torch.float32))
    return *cast(ROWS), *(cast(COLS) if training else nothing)


def _fake_statistics(x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[:2] if training else (0, 0)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("eightfold::layer_norm_modulate")
def _(x, scale, shift, eps, training):
    return x.new_empty(x.shape), *_fake_statistics(x, training)


@torch.library.register_fake("eightfold::layer_norm_modulate_quantize")
def _(x, scale, shift, eps, training):
    return *_fake_casts(x, training), *_fake_statistics(x, training)


@torch.library.register_fake("eightfold::gated_residual_layer_norm_modulate")
def _(x, branch, gate, scale, shift, eps, training):
    return x.new_empty(x.shape), x.new_empty(x.shape), *_fake_statistics(x, training)


@torch.library.register_fake("eightfold::gated_residual_layer_norm_modulate_quantize")
def _(x, branch, gate, scale, shift, eps, training):
    return x.new_empty(x.shape), *_fake_casts(x, training), *_fake_statistics(x, training)


@torch.library.register_fake("eightfold::layer_norm_modulate_backward")
def _(dy, x, mean, rstd, scale, residual_grad, branch, gate):
    samples, _, features = dy.shape

    def sums(wanted=True):
        return dy.new_empty((samples, features) if wanted else (0, 0), dtype=torch.float32)

    dbranch = dy.new_empty(dy.shape if gate is not None else (0, 0, 0))
    return dy.new_empty(dy.shape), dbranch, sums(gate is not None), sums(), sums()
