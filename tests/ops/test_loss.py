"""Cross-entropy with its gradient: against fp64, ignored and impossible labels, rows alone, torch's machinery."""

import pytest
import torch
import torch.nn.functional as F

from eightfold.ops import cross_entropy
from eightfold.reference import cross_entropy as reference

op = torch.ops.eightfold.cross_entropy
SHAPES = [(1, 1), (3, 7), (5, 1000), (4, 1024), (2, 50257), (0, 16)]


def case(shape, device, scale=5.0):
    return torch.randn(shape, device=device) * scale, torch.randint(shape[1], shape[:1], device=device)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, grad_dtype, device):
    logits, labels = case(shape, device)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), exact)
    for function in (op, reference):
        loss, grad = function(logits, labels, True, grad_dtype)
        assert loss.dtype == torch.float32
        assert grad.dtype == grad_dtype
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=1e-5)
        tolerance = 2e-6 if grad_dtype == torch.float32 else 2**-8
        torch.testing.assert_close(grad.double(), expected_grad, rtol=max(2e-5, tolerance), atol=1e-7)
        assert torch.equal(function(logits, labels, False, grad_dtype)[0], loss)


@pytest.mark.parametrize("shape", [(5, 1000), (3, 20000), (200, 9000)], ids=str)
def test_temperatures(shape, device):
    """0 counts as 1; gradients are those of the logits."""
    logits, labels = case(shape, device)
    temperatures = torch.rand(shape[0], device=device) + 0.5
    temperatures[1], temperatures[2] = 0.0, 1.0
    exact = logits.double().requires_grad_()
    divisor = torch.where(temperatures > 0, temperatures, 1.0)[:, None]
    expected = F.cross_entropy(exact / divisor, labels, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), exact)
    for function in (op, reference):
        loss, grad = function(logits, labels, True, torch.float32, temperatures)
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(grad.double(), expected_grad, rtol=5e-5, atol=1e-7)
    assert torch.equal(
        op(logits[1:3], labels[1:3], False, torch.float32, temperatures[1:3])[0], op(logits, labels)[0][1:3]
    )


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 1000), (5, 49152), (7, 9001), (130, 9001), (130, 151936)], ids=str)
def test_grad_output(shape, grad_dtype, device):
    """The bits of the float32 gradient multiplied once and rounded once, and autograd's numbers."""
    logits, labels = case(shape, device)
    labels[1], labels[2], labels[3] = -100, -100, shape[1]
    temperatures = torch.rand(shape[0], device=device) + 0.5
    grad_output = torch.randn(shape[0], device=device)
    grad_output[1], grad_output[2] = -2.0, torch.nan
    for t in (None, temperatures):
        loss, grad = op(logits, labels, True, grad_dtype, t, grad_output)
        plain_loss, plain = op(logits, labels, True, torch.float32, t)
        wanted = (plain * grad_output[:, None]).to(grad_dtype)
        assert torch.equal(loss.nan_to_num(7.0), plain_loss.nan_to_num(7.0))
        assert grad.dtype == grad_dtype
        assert torch.equal(torch.isnan(grad), torch.isnan(wanted))
        assert torch.isnan(grad[2:4]).all()
        signs_too = torch.int32 if grad_dtype == torch.float32 else torch.int16
        assert torch.equal(*(x.nan_to_num(7.0).view(signs_too) for x in (grad, wanted)))
    rows = [0, *range(4, min(shape[0], 9))]
    exact = logits[rows].double().requires_grad_()
    expected = F.cross_entropy(exact / temperatures[rows, None], labels[rows], reduction="none")
    (expected_grad,) = torch.autograd.grad(expected, exact, grad_output[rows].double())
    for found in (grad, reference(logits, labels, True, grad_dtype, temperatures, grad_output)[1]):
        rtol = 5e-5 if grad_dtype == torch.float32 else 2**-8
        torch.testing.assert_close(found[rows].double(), expected_grad, rtol=rtol, atol=1e-6)
        assert torch.all(found[1] == 0)
        assert torch.isnan(found[2:4]).all()


def test_ignored_and_impossible_labels(device):
    logits, labels = case((6, 300), device)
    labels[1], labels[2], labels[4] = -100, 300, -1
    for function in (op, reference):
        loss, grad = function(logits, labels, True, torch.float32)
        assert loss[1] == 0
        assert torch.all(grad[1] == 0)
        assert torch.isnan(loss[[2, 4]]).all()
        assert torch.isnan(grad[[2, 4]]).all()
        assert torch.isfinite(loss[[0, 3, 5]]).all()


def test_extreme_logits(device):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 3.0, -torch.inf], [-3e38, 3e38, 0.0]], device=device)
    loss, grad = op(logits, torch.tensor([0, 1, 1], device=device), True, torch.float32)
    assert torch.equal(loss, torch.zeros(3, device=device))
    assert torch.equal(grad, torch.zeros(3, 3, device=device))
    logits[0, 2], logits[1, 0] = torch.nan, torch.inf
    loss, grad = op(logits, torch.tensor([0, 1, 1], device=device), True, torch.float32)
    assert torch.isnan(loss[:2]).all()
    assert torch.isnan(grad[0]).any()


@pytest.mark.parametrize("shape", [(9, 4097), (140, 40000), (140, 70001)], ids=str)
def test_a_row_depends_on_itself_alone(shape, device):
    """Also where a few rows are taken by more blocks than many are."""
    logits, labels = case(shape, device)
    temperatures, grad_output = torch.rand(shape[0], device=device) + 0.5, torch.randn(shape[0], device=device)
    whole = op(logits, labels, True, torch.bfloat16, temperatures, grad_output)
    for count in (1, 2, 100):
        for i in (0, 4, 8):
            part = slice(i, i + count)
            scales = temperatures[part].clone(), grad_output[part].clone()
            few = op(logits[part].clone(), labels[part], True, torch.bfloat16, *scales)
            assert all(torch.equal(a[part], b) for a, b in zip(whole, few, strict=True)), (count, i)


def test_row_stride(device):
    wide, labels = case((5, 1032), device)
    for part in (wide[:, :1000], wide[:, 3:1003]):
        labels.clamp_(max=999)
        for a, b in zip(op(part, labels, True), op(part.contiguous(), labels, True), strict=True):
            assert torch.equal(a, b)


def test_public_function():
    logits, labels = case((3, 7), "cpu")
    loss, grad = cross_entropy(logits, labels)
    assert grad is None
    assert torch.equal(cross_entropy(logits, labels, training=True)[0], loss)
    options = {"training": True, "grad_dtype": torch.float32}
    halved = cross_entropy(logits, labels, **options, grad_output=torch.full((3,), 0.5))
    assert torch.equal(halved[1], cross_entropy(logits, labels, **options)[1] / 2)


def test_torch_citizen(device):
    logits, labels = case((3, 40), device)
    for a_row in ((None, None), torch.rand(2, 3, device=device).unbind()):
        torch.library.opcheck(op, (logits, labels, True, torch.bfloat16, *a_row))
    compiled = torch.compile(lambda x: op(x * 2, labels, True)[0].sum(), fullgraph=True)
    torch.testing.assert_close(compiled(logits), op(logits * 2, labels, True)[0].sum())


@pytest.mark.gpu
def test_cuda_graph():
    logits, labels = case((3, 4000), "cuda")
    arguments = logits, labels, True, torch.bfloat16, None, torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    op(*arguments)
    with torch.cuda.graph(graph):
        loss, grad = op(*arguments)
    for x in (logits, arguments[-1]):
        x.normal_()
    graph.replay()
    expected = op(*arguments)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4)}, r"cross_entropy: logits must have 2 dimensions, got shape \[4\]"),
        ({"logits": torch.zeros(4, 8).bfloat16()}, "cross_entropy: logits must be float32, got bfloat16"),
        ({"logits": torch.zeros(8, 4).t()}, "cross_entropy: logits must have stride 1 in its last dimension"),
        ({"logits": torch.zeros(4, 0)}, r"cross_entropy: logits must have at least one column, got shape \[4, 0\]"),
        ({"labels": torch.zeros(4)}, "cross_entropy: labels must be int64, got float32"),
        ({"labels": torch.zeros(5).long()}, r"cross_entropy: labels must have shape \[4\], got \[5\]"),
        ({"labels": torch.zeros(8).long()[::2]}, "cross_entropy: labels must be contiguous"),
        ({"temperatures": torch.ones(3)}, r"cross_entropy: temperatures must have shape \[4\], got \[3\]"),
        ({"temperatures": torch.ones(4).double()}, "cross_entropy: temperatures must be float32, got float64"),
        ({"grad_output": torch.ones(3)}, r"cross_entropy: grad_output must have shape \[4\], got \[3\]"),
        ({"grad_output": torch.ones(4).bfloat16()}, "cross_entropy: grad_output must be float32, got bfloat16"),
        ({"grad_output": torch.ones(8)[::2]}, "cross_entropy: grad_output must be contiguous"),
        ({"grad_dtype": torch.float16}, "cross_entropy: grad_dtype must be bfloat16 or float32, got float16"),
    ],
)
def test_errors(change, message):
    arguments = {"logits": torch.zeros(4, 8), "labels": torch.zeros(4).long(), "training": True}
    with pytest.raises(RuntimeError, match=message):
        op(**{**arguments, **change})
