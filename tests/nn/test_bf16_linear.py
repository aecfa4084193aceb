"""bfloat16 products on CPUs without bfloat16 units."""

import pytest
import torch

from eightfold.nn import functional as F
from layer_cases import DTYPES, make, relative


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("units", [False, True])
def test_bf16_linear(monkeypatch, weight_dtype, units):
    monkeypatch.setattr(F, "_CPU_HAS_BF16", units)
    (x,) = make("cpu", (2, 33, 64), dtype=torch.bfloat16)
    weight, bias = make("cpu", (48, 64), (48,), dtype=weight_dtype)
    out = F.bf16_linear(x, weight, bias)
    dy = torch.randn_like(out)
    grads = torch.autograd.grad(out, (x, weight, bias), dy)
    wide = [t.detach().bfloat16().double().requires_grad_() for t in (x, weight, bias)]
    want = torch.nn.functional.linear(*wide)
    wanted = torch.autograd.grad(want, wide, dy.double())
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), want, 2**-8, 1e-6)  # one rounding
    for grad, exact, tensor in zip(grads, wanted, (x, weight, bias), strict=True):
        assert grad.dtype == tensor.dtype
        assert relative(grad, exact) < 2**-8
    with torch.no_grad():
        assert torch.equal(F.bf16_linear(x, weight, bias), out)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(F.bf16_linear(x, weight, bias), out)


def test_bf16_linear_saves_bfloat16_only(monkeypatch):
    monkeypatch.setattr(F, "_CPU_HAS_BF16", False)
    x, weight = make("cpu", (33, 64), (48, 64), dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.bf16_linear(x, weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}
