"""Rotary position embedding and its tables: bits of the reference, strides, gradients, torch's machinery, errors."""

import pytest
import torch

from eightfold.ops import rotary, rotary_tables
from eightfold.reference import rotary as reference
from eightfold.reference import rotary_tables as reference_tables

op = torch.ops.eightfold.rotary
SHAPES = [(1, 1, 1, 2), (2, 5, 3, 64), (1, 130, 4, 128), (3, 7, 2, 36), (0, 4, 2, 16), (2, 3, 1, 6)]


def case(shape, dtype, device, batched=False):
    batch, tokens, _, dim = shape
    angle = torch.rand(batch if batched else 1, tokens, 1, dim // 2, device=device) * 100
    return torch.randn(shape, device=device).to(dtype), angle.cos(), angle.sin()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_reference(shape, dtype, inverse, device):
    for batched in (False, True):
        x, cos, sin = case(shape, dtype, device, batched and shape[0] > 0)
        assert torch.equal(op(x, cos, sin, inverse), reference(x, cos, sin, inverse))


def test_tables(device):
    """Of angles that float32 gives, to its last bits; a position has the same row wherever it stands."""
    frequency = 10000.0 ** -(torch.arange(64, device=device) / 64)
    positions = torch.tensor([[0, 1, 7, 4095], [131071, 2**24 + 1, 7, 31]], device=device)
    tables = rotary_tables(frequency, positions)
    for ours, expected in zip(tables, reference_tables(frequency, positions), strict=True):
        assert ours.shape == (2, 4, 1, 64)
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, expected, rtol=0, atol=1.2e-7)
        assert torch.equal(ours[0, 2], ours[1, 2])
    for others in (positions.int(), positions.t().contiguous().t()):
        assert all(torch.equal(a, b) for a, b in zip(rotary_tables(frequency, others), tables, strict=True))
    assert rotary_tables(frequency, positions[:0])[0].shape == (0, 4, 1, 64)
    torch.library.opcheck(torch.ops.eightfold.rotary_tables, (frequency, positions))
    with pytest.raises(RuntimeError, match="rotary_tables: frequency must be float32, got float64"):
        rotary_tables(frequency.double(), positions)
    with pytest.raises(RuntimeError, match=r"rotary_tables: positions must have 2 dimensions, got shape \[4\]"):
        rotary_tables(frequency, positions[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strided_input(dtype, device):
    """A slice of one projection's output that holds queries, keys and values; heads before tokens; odd offsets."""
    _, cos, sin = case((2, 9, 4, 64), dtype, device)
    wide = torch.randn(2, 9, 12 * 64, device=device).to(dtype)
    slice_ = wide[..., 4 * 64 : 8 * 64].unflatten(-1, (4, 64))
    swapped = torch.randn(2, 4, 9, 64, device=device).to(dtype).transpose(1, 2)
    odd = torch.randn(2, 9, 4, 67, device=device).to(dtype)[..., 1:65]
    for x in (slice_, swapped, odd):
        y = op(x, cos, sin)
        assert y.is_contiguous()
        assert torch.equal(y, reference(x, cos, sin))


def test_gradient_rotates_back(device):
    x, cos, sin = case((2, 5, 3, 64), torch.float32, device)
    x.requires_grad_()
    y = rotary(x, cos, sin)
    grad = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    (expected,) = torch.autograd.grad(reference(x.double(), cos.double(), sin.double()).to(torch.float32), x, grad)
    torch.testing.assert_close(ours, expected)
    (strided,) = torch.autograd.grad(y, x, grad.transpose(-1, -2).contiguous().transpose(-1, -2))
    assert torch.equal(strided, ours)
    torch.testing.assert_close(rotary(rotary(x, cos, sin), cos, sin, inverse=True), x)


def test_torch_citizen(device):
    x, cos, sin = case((2, 5, 3, 64), torch.bfloat16, device)
    torch.library.opcheck(op, (x, cos, sin, True))
    compiled = torch.compile(lambda t: rotary(t * 2, cos, sin).sum(), fullgraph=True)
    x = x.requires_grad_()
    ours, expected = torch.autograd.grad(compiled(x), x), torch.autograd.grad(rotary(x * 2, cos, sin).sum(), x)
    torch.testing.assert_close(ours, expected)


@pytest.mark.gpu
def test_cuda_graph():
    x, cos, sin = case((2, 5, 3, 64), torch.bfloat16, "cuda")
    graph = torch.cuda.CUDAGraph()
    op(x, cos, sin)
    with torch.cuda.graph(graph):
        y = op(x, cos, sin)
    x.normal_()
    graph.replay()
    assert torch.equal(y, reference(x, cos, sin))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 64)}, r"rotary: x must have 4 dimensions, got shape \[2, 5, 64\]"),
        ({"x": torch.zeros(2, 5, 3, 64, dtype=torch.float16)}, "rotary: x must be bfloat16 or float32, got float16"),
        ({"x": torch.zeros(2, 5, 3, 63)}, r"rotary: x must have an even last dimension, got shape \[2, 5, 3, 63\]"),
        ({"x": torch.zeros(2, 5, 64, 3).transpose(2, 3)}, "rotary: x must have stride 1 in its last dimension"),
        ({"cos": torch.zeros(1, 4, 1, 32)}, r"rotary: cos must have shape \[1, 5, 1, 32\], got \[1, 4, 1, 32\]"),
        ({"sin": torch.zeros(3, 5, 1, 32)}, r"rotary: sin must have shape \[2, 5, 1, 32\], got \[3, 5, 1, 32\]"),
        ({"sin": torch.zeros(2, 5, 1, 32)}, r"rotary: sin must have shape \[1, 5, 1, 32\], got \[2, 5, 1, 32\]"),
        ({"cos": torch.zeros(1, 5, 1, 32).double()}, "rotary: cos must be float32, got float64"),
        ({"cos": torch.zeros(1, 5, 1, 64)[..., ::2]}, "rotary: cos must be contiguous"),
    ],
)
def test_errors(change, message):
    x, cos, sin = case((2, 5, 3, 64), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=message):
        op(**{"x": x, "cos": cos, "sin": sin, **change})
