"""Gradients of RMS norm: against fp64 autograd and, from saved codes, the reference."""

import pytest
import torch

from eightfold.ops.norm import rms_norm_backward, rms_norm_quantize
from eightfold.reference import norm as reference
from fused_bytes import same_bytes
from norm_inputs import DTYPES, EPS, data

ops = torch.ops.eightfold


def fp64_gradients(dy, x, w, residual_grad=None):
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    y = x64 * (x64.square().mean(1, keepdim=True) + EPS).rsqrt() * w64
    y.backward(dy.double())
    dx = x64.grad if residual_grad is None else x64.grad + residual_grad.double()
    return dx, w64.grad


@pytest.mark.parametrize(
    "shape", [(1, 16), (300, 64), (70, 96), (20000, 128), (3, 129), (130, 144), (300, 1000), (33, 4096), (20, 8200)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients_are_fp64_autograd(shape, dtype, with_residual, device):
    x, w = data(*shape, dtype, device)
    dy = torch.randn_like(x)
    residual_grad = torch.randn_like(x) if with_residual else None
    rstd = ops.rms_norm(x, w, EPS, True)[3]
    dx, dweight = rms_norm_backward(dy, x, rstd, w, residual_grad)
    want_dx, want_dweight = fp64_gradients(dy, x, w, residual_grad)
    assert (dx.dtype, dweight.dtype) == (dtype, torch.float32)
    size = want_dx.abs().amax(1, keepdim=True)
    assert (
        (dx.double() - want_dx).abs() <= (2**-8 if dtype == torch.bfloat16 else 0) * want_dx.abs() + 4e-6 * size
    ).all()
    torch.testing.assert_close(dweight.double(), want_dweight, rtol=1e-5, atol=1e-5 * float(want_dweight.abs().max()))


@pytest.mark.parametrize("shape", [(130, 1040), (5000, 128), (130, 64)])
def test_gradients_from_saved_codes(shape, device):
    """The codes enter as the values they stand for; against exact autograd only E4M3's own error is left."""
    x, w = data(*shape, torch.float32, device, outliers=False)
    dy = torch.randn_like(x)
    saved = rms_norm_quantize(x, w, EPS, training=True)
    dx, dweight = rms_norm_backward(dy, saved.input, saved.rstd, w, x)
    from_values = rms_norm_backward(dy, saved.input.dequantize(torch.float32), saved.rstd, w, x)
    same_bytes(dx, from_values[0])
    same_bytes(dweight, from_values[1])
    want_dx, want_dweight = fp64_gradients(dy, x, w, x)
    for got, want in ((dx, want_dx), (dweight, want_dweight)):
        assert (got.double() - want).norm() / want.norm() < 0.04
    bf16 = rms_norm_backward(dy.bfloat16(), saved.input, saved.rstd, w.bfloat16())
    want = reference.rms_norm_backward(dy.bfloat16(), *_tensors(saved.input), saved.rstd, w.bfloat16(), None)
    torch.testing.assert_close(bf16[0], want[0], rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(bf16[1], want[1], rtol=1e-5, atol=1e-4)


def _tensors(q):
    return q.codes, q.scales


def test_no_rows_gives_a_zero_dweight(device):
    x, w = data(0, 256, torch.bfloat16, device)
    dx, dweight = rms_norm_backward(x, x, torch.empty(0, device=device), w)
    assert dx.shape == (0, 256)
    assert torch.equal(dweight, torch.zeros(256, device=device))
