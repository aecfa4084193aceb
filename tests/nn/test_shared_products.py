"""Layers that read one input share products: the bits, the launches and the memory of that, beside one by one."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eightfold.nn import WeightCache, _products
from eightfold.nn import functional as F
from layer_cases import DTYPES, EPS, H, make, relative

WIDTHS = (256, 128, 144)  # of q, k and v, say: the last need not be a multiple of 128
INTER = 384


def attention_inputs(device, dtype, weight_dtype=torch.float32):
    x, residual = make(device, (150, H), (150, H), dtype=dtype, scale=1.0)
    return [x, residual, *make(device, (H,), *((w, H) for w in WIDTHS), *((w,) for w in WIDTHS), dtype=weight_dtype)]


def attention(x, residual, norm, q, k, v, *biases, caches=None):
    total, out = F.fp8_norm_linears(x, norm, EPS, [q, k, v], biases or None, residual, caches=caches)
    return [total, *out]


def mlp_inputs(device, dtype, weight_dtype=torch.float32):
    x, residual = make(device, (150, H), (150, H), dtype=dtype, scale=1.0)
    return [x, residual, *make(device, (H,), (INTER, H), (INTER, H), (H, INTER), dtype=weight_dtype)]


def mlp(x, residual, norm, gate, up, down, caches=None):
    return list(F.fp8_norm_swiglu_mlp(x, norm, EPS, gate, up, down, residual, caches=caches))


CASES = {"attention": (attention_inputs, attention), "mlp": (mlp_inputs, mlp)}


def run(function, inputs, dys=None, **options):
    outs = function(*inputs, **options)
    torch.manual_seed(1)
    dys = [torch.randn_like(out) for out in outs]
    return outs, torch.autograd.grad(outs, [t for t in inputs if t.requires_grad], dys)


@pytest.fixture
def one_by_one(monkeypatch):
    def enter():
        monkeypatch.setattr(_products, "can_stack", lambda weights: False)

    return enter


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_products_one_by_one(device, name, dtype, weight_dtype, one_by_one):
    """All but what depends on the sum over layers in the input gradient: x's and the norm weight's."""
    make_inputs, function = CASES[name]
    inputs = make_inputs(device, dtype, weight_dtype)
    outs, grads = run(function, inputs)
    one_by_one()
    apart, apart_grads = run(function, inputs)
    assert all(torch.equal(a, b) for a, b in zip(outs, apart, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads[3:], apart_grads[3:], strict=True))
    rounding = {torch.float32: 2e-6 if device.type == "cpu" else 2e-5, torch.bfloat16: 3e-4}
    for a, b in zip(grads[:3], apart_grads[:3], strict=True):
        assert relative(a, b) < max(rounding[dtype], rounding[a.dtype])


@pytest.mark.parametrize("name", CASES)
def test_no_gradients_and_caches_change_no_bit(device, name):
    make_inputs, function = CASES[name]
    inputs = make_inputs(device, torch.bfloat16)
    outs, grads = run(function, inputs)
    caches = [WeightCache() for _ in range(3)]
    for _ in range(2):
        cached, cached_grads = run(function, inputs, caches=caches)
        with torch.no_grad():
            for options in ({}, {"caches": caches}):
                assert all(torch.equal(a, b) for a, b in zip(outs, function(*inputs, **options), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(outs, cached, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(grads, cached_grads, strict=True))
    with torch.no_grad():
        inputs[3].mul_(-1)  # the first weight
    fresh, again = function(*inputs), function(*inputs, caches=caches)
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))
    assert not torch.equal(fresh[1], outs[1])


@pytest.mark.parametrize("name", CASES)
def test_frozen_weights_change_no_other_gradient(device, name):
    make_inputs, function = CASES[name]
    inputs = make_inputs(device, torch.bfloat16)
    _, wanted = run(function, inputs)
    for frozen in ((3,), (4,), (3, 4), (0, 1, 2)):
        some = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
        _, grads = run(function, some)
        kept = [want for i, want in enumerate(wanted) if i not in frozen]
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "eightfold":
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))


def test_launches(device):
    """One product where three or two were, one cast for all weights; nothing is added up in memory."""
    inputs = attention_inputs(device, torch.bfloat16)
    with Calls() as forward, torch.no_grad():
        attention(*inputs)
    assert forward.counts == {"add_rms_norm_quantize": 1, "quantize_stacked": 1, "fp8_gemm": 1}
    with Calls() as both:
        run(attention, inputs)
    assert both.counts == {
        "add_rms_norm_quantize": 1,
        "quantize_stacked": 2,  # forward, and transposed for the input gradient
        "fp8_gemm": 3 + 1 + 1,
        "quantize_beside": 1,
        "rms_norm_backward": 1,
    }
    with Calls() as both:
        run(mlp, mlp_inputs(device, torch.bfloat16))
    assert both.counts == {
        "add_rms_norm_quantize": 1,
        "quantize_stacked": 3,  # gate and up; in the backward pass down, then gate and up
        "quantize": 1,
        "swiglu_quantize": 1,
        "quantize_both": 1,
        "swiglu_backward_quantize": 1,
        "fp8_gemm": 2 + 2 + 2,
        "rms_norm_backward": 1,
    }


def test_memory(device):
    """Outputs own their memory in training, where a backward pass may keep one of them; gradients share theirs."""
    inputs = attention_inputs(device, torch.bfloat16)
    outs, grads = run(attention, inputs)
    assert all(out.untyped_storage().nbytes() == out.numel() * 2 for out in outs)
    assert all(grad.is_contiguous() for grad in grads)
    assert len({grad.untyped_storage().data_ptr() for grad in grads[3:6]}) == 1
    parameters = [torch.nn.Parameter(t.detach()) for t in inputs[2:]]
    for _ in range(2):  # the second adds in place
        torch.autograd.backward(attention(*inputs[:2], *parameters), [torch.ones_like(out) for out in outs])
    once = torch.autograd.grad(attention(*inputs[:2], *parameters), parameters, [torch.ones_like(o) for o in outs])
    assert all(torch.equal(p.grad, 2 * grad) for p, grad in zip(parameters, once, strict=True))


@pytest.mark.parametrize(
    ("shapes", "dtypes", "together"),
    [
        ([(128, 64), (128, 64)], "bb", True),
        ([(128, 64), (80, 64)], "bb", True),
        ([(80, 64), (128, 64)], "bb", False),
        ([(128, 64)], "b", False),
        ([(128, 64), (128, 64)], "bf", False),
        ([(128, 64)] * 8, "b" * 8, True),
        ([(128, 64)] * 9, "b" * 9, False),
    ],
)
def test_which_weights_share(device, shapes, dtypes, together):
    kinds = {"b": torch.bfloat16, "f": torch.float32}
    weights = [torch.randn(s, device=device, dtype=kinds[d]) for s, d in zip(shapes, dtypes, strict=True)]
    assert _products.can_stack(weights) == together
    x = torch.randn(5, 64, device=device, dtype=torch.bfloat16)
    norm = torch.ones(64, device=device)
    _, outs = F.fp8_norm_linears(x, norm, EPS, weights)
    alone = [F.fp8_norm_linears(x, norm, EPS, [w])[1][0] for w in weights]
    assert all(torch.equal(a, b) for a, b in zip(outs, alone, strict=True))


def test_biases_of_some_layers(device):
    x, residual, norm, q, k, v, *biases = attention_inputs(device, torch.bfloat16)
    for some in ([None, biases[1], None], [biases[0], biases[1].bfloat16(), biases[2]]):
        with torch.no_grad():
            _, outs = F.fp8_norm_linears(x, norm, EPS, [q, k, v], some, residual)
            alone = [
                F.fp8_norm_linears(x, norm, EPS, [w], [b], residual)[1][0] for w, b in zip((q, k, v), some, strict=True)
            ]
        assert all(torch.equal(a, b) for a, b in zip(outs, alone, strict=True))
