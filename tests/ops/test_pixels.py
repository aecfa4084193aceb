"""bias_silu and rms_norm_add: against fp64 and the reference, torch's machinery, errors."""

import pytest
import torch

from eightfold import reference
from eightfold.ops import bias_silu, rms_norm_add

ops = torch.ops.eightfold
DTYPES = [torch.bfloat16, torch.float32]
# Widths that fill 16 and 32 lanes of one to eight octets, and that do not.
SHAPES = [(0, 64), (1, 8), (3, 5, 7, 128), (2, 33, 136), (9, 256), (70, 512), (5, 1000), (2, 3, 2048)]
SHAPES_OF_CPU = [(4, 1), (3, 13), (2, 2051)]


def close(out, want):
    """Within a rounding of the dtype, and of float32 beside the largest value."""
    rtol = 2**-8 if out.dtype == torch.bfloat16 else 1e-6
    atol = 2e-6 * max(1.0, float(want.abs().max())) if want.numel() else 0.0
    torch.testing.assert_close(out.double(), want, rtol=rtol, atol=atol)


def data(shape, dtype, vectors, device):
    x, residual = (torch.randn(shape, device=device).to(dtype) * 3 for _ in range(2))
    weight, bias = (torch.randn(shape[-1], device=device).to(vectors) for _ in range(2))
    return x, weight, bias, residual


def skip_what_cuda_lacks(shape, device):
    if device.type == "cuda" and shape in SHAPES_OF_CPU:
        pytest.skip("whole octets alone on CUDA")


@pytest.mark.parametrize("vectors", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + SHAPES_OF_CPU, ids=str)
def test_against_fp64(shape, dtype, vectors, device):
    skip_what_cuda_lacks(shape, device)
    x, weight, bias, residual = data(shape, dtype, vectors, device)
    wide, w, b, r = (t.double() for t in (x, weight, bias, residual))
    silu = torch.nn.functional.silu(wide + b)
    norm = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w + b + r
    for out, want in ((bias_silu(x, bias), silu), (rms_norm_add(x, weight, bias, residual), norm)):
        assert out.shape == x.shape
        assert out.dtype == dtype
        close(out, want)
    close(reference.bias_silu(x, bias), silu)
    close(reference.rms_norm_add(x, weight, bias, residual), norm)


def test_a_row_depends_on_itself_alone(device):
    x, weight, bias, residual = data((65, 128), torch.bfloat16, torch.float32, device)
    whole = rms_norm_add(x, weight, bias, residual)
    for row in (0, 15, 16, 64):
        part = slice(row, row + 1)
        assert torch.equal(rms_norm_add(x[part], weight, bias, residual[part]), whole[part])


def test_not_finite(device):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0] * 2] * 2, device=device)
    out = bias_silu(x, torch.zeros(8, device=device))[0, :4]
    assert out[0].isnan()
    assert out[1] == float("inf")
    assert out[3] == 0
    assert rms_norm_add(x, *torch.ones(2, 8, device=device), x).isnan().all()


def test_torch_citizen(device):
    x, weight, bias, residual = data((3, 5, 64), torch.bfloat16, torch.float32, device)
    torch.library.opcheck(ops.bias_silu, (x, bias))
    torch.library.opcheck(ops.rms_norm_add, (x, weight, bias, residual, 1e-5))


X, VECTOR = torch.zeros(2, 16), torch.zeros(16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bias_silu(X.half(), VECTOR), "bias_silu: x must be bfloat16 or float32, got float16"),
        (lambda: bias_silu(X[:, ::2], VECTOR[:8]), "bias_silu: x must be contiguous"),
        (lambda: bias_silu(X, VECTOR[:8]), r"bias_silu: bias must have shape \[16\], got \[8\]"),
        (lambda: bias_silu(torch.zeros(()), VECTOR), r"bias_silu: x must have at least 1 dimension, got shape \[\]"),
        (lambda: rms_norm_add(X, VECTOR, VECTOR.bfloat16(), X), "rms_norm_add: bias must be float32, got bfloat16"),
        (lambda: rms_norm_add(X, VECTOR, VECTOR, X[:1]), r"residual must have shape \[2, 16\], got \[1, 16\]"),
        (lambda: rms_norm_add(X, VECTOR, VECTOR, X.bfloat16()), "rms_norm_add: residual must be float32, got bfloat16"),
        (lambda: rms_norm_add(X, VECTOR, VECTOR, X, -1.0), "rms_norm_add: eps must not be negative, got -1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.gpu
def test_errors_on_cuda():
    x, vector = X.cuda(), VECTOR.cuda()
    with pytest.raises(RuntimeError, match=r"bias_silu: x must have a multiple of 8 channels .*, got shape \[2, 12\]"):
        bias_silu(x[:, :12].contiguous(), vector[:12])
    with pytest.raises(RuntimeError, match=r"rms_norm_add: x must have a multiple of 8 channels up to 2048 on CUDA"):
        rms_norm_add(*(torch.zeros(shape, device="cuda") for shape in ((1, 4096), (4096,), (4096,), (1, 4096))))
