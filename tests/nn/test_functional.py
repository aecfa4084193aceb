"""nn.functional as autograd sees it: shapes, strides, frozen parameters, checkpointing, autocast, misuse."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from eightfold.nn import functional as F
from layer_cases import CASES, DTYPES, EPS, H, gradients, make, setup_case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_has_the_same_bits_in_training_and_without_gradients(device, name, dtype):
    inputs, ours, _, _ = setup_case(name, device, dtype)
    training = ours(*inputs)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for out, want in zip(ours(*inputs), training, strict=True):
                assert not out.requires_grad
                assert torch.equal(out, want)


@pytest.mark.parametrize("name", CASES)
def test_runs_repeat_bitwise_also_under_checkpointing(device, name):
    inputs, ours, _, _ = setup_case(name, device, torch.bfloat16)
    dys = [torch.randn_like(out) for out in ours(*inputs)]
    first = gradients(ours, inputs, dys)
    again = gradients(ours, inputs, dys)
    recomputed = gradients(lambda *t: checkpoint(ours, *t, use_reentrant=False), inputs, dys)
    for a, b, c in zip(first, again, recomputed, strict=True):
        assert (a is None and b is None and c is None) or (torch.equal(a, b) and torch.equal(a, c))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,), (2, 3, 7)])
def test_leading_dimensions(device, name, shape):
    inputs, ours, _, _ = setup_case(name, device, torch.bfloat16, shape)
    outs = ours(*inputs)
    grads = torch.autograd.grad(outs, inputs, [torch.ones_like(o) for o in outs], allow_unused=True)
    for tensor, grad in zip(inputs, grads, strict=True):
        assert grad is None or (grad.shape == tensor.shape and grad.isfinite().all())
    if 0 not in shape:
        flat_inputs = [t.detach().reshape(-1, H).requires_grad_() if i < 2 else t for i, t in enumerate(inputs)]
        for out, want in zip(outs, ours(*flat_inputs), strict=True):
            assert torch.equal(out.reshape(want.shape), want)
    elif grads[-1] is not None:
        assert not grads[-1].any()


def test_one_vector(device):
    x, weight = make(device, (H,), (32, H))
    out = F.fp8_linear(x, weight)
    assert out.shape == (32,)
    assert torch.equal(out, F.fp8_linear(x[None], weight)[0])


@pytest.mark.parametrize("name", CASES)
def test_strided_inputs_and_gradients(device, name):
    inputs, ours, _, _ = setup_case(name, device, torch.bfloat16, (6, 20))
    strided = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in inputs[:2]]
    outs = ours(*inputs)
    dys = [torch.randn(o.shape[:-1], device=device, dtype=o.dtype)[..., None].expand(o.shape) for o in outs]
    ones = gradients(ours, inputs, [dy.contiguous() for dy in dys])
    others = gradients(ours, [*strided, *inputs[2:]], dys)
    for a, b in zip(ones, others, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_frozen_parameters_change_no_other_gradient(device, name):
    inputs, ours, _, _ = setup_case(name, device, torch.bfloat16)
    dys = [torch.randn_like(out) for out in ours(*inputs)]
    wanted = gradients(ours, inputs, dys)
    for frozen in range(len(inputs)):
        some = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
        got = iter(gradients(ours, some, dys))
        for i, want in enumerate(wanted):
            if i != frozen:
                grad = next(got)
                assert (grad is None and want is None) or torch.equal(grad, want), (frozen, i)


def test_save_option_does_not_change_gradients(device):
    x, weight, dy = make(device, (130, H), (64, H), (130, 64), dtype=torch.bfloat16, scale=1.0)
    one, other = (torch.autograd.grad(F.fp8_linear(x, weight, save=s), (x, weight), dy) for s in ("columns", "input"))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_linears_that_save_their_input(device, dtype):
    """One gradient differs, that of the weights: its operand was rounded twice."""
    (x, residual, norm, w, v, b), _, _, _ = setup_case("add_norm_linears", device, dtype)
    inputs = x, residual, norm, b, w, v
    results = []
    for save in ("columns", "input"):
        total, outs = F.fp8_norm_linears(x, norm, EPS, [w, v], [None, b], residual, save)
        torch.manual_seed(1)
        dys = [torch.randn_like(t) for t in (total, *outs)]
        results.append(((total, *outs), torch.autograd.grad((total, *outs), inputs, dys)))
    (outs, grads), (others, other_grads) = results
    assert all(torch.equal(a, b) for a, b in zip(outs, others, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads[:4], other_grads[:4], strict=True))
    for a, b in zip(grads[4:], other_grads[4:], strict=True):
        assert not torch.equal(a, b)
        assert (a - b).norm() / a.norm() < 0.045
    frozen = [t.detach() for t in (w, v)]
    _, outs = F.fp8_norm_linears(x, norm, EPS, frozen, None, residual, "input")
    assert torch.autograd.grad(outs, x, dys[1:])[0].isfinite().all()


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_weight_gradients_have_the_weight_dtype(device, weight_dtype):
    inputs, ours, _, _ = setup_case("add_norm_linears", device, torch.bfloat16, weight_dtype=weight_dtype)
    outs = ours(*inputs)
    for grad, t in zip(torch.autograd.grad(outs, inputs, [torch.ones_like(o) for o in outs]), inputs, strict=True):
        assert grad.dtype == t.dtype


def test_x_and_residual_get_gradients_of_their_own(device):
    (x, residual, *parameters), ours, _, _ = setup_case("add_norm_linears", device, torch.bfloat16)
    for _ in range(2):
        sum(out.float().sum() for out in ours(x, residual, *parameters)).backward()
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()


@pytest.mark.parametrize("name", CASES)
def test_autocast_computes_in_bfloat16(device, name):
    inputs, ours, _, _ = setup_case(name, device, torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outs = ours(*inputs)
    rounded = [t.detach().bfloat16() if i < 2 else t.detach() for i, t in enumerate(inputs)]
    for out, want in zip(outs, ours(*rounded), strict=True):
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, want)
    grads = torch.autograd.grad(outs, inputs, [torch.ones_like(o) for o in outs], allow_unused=True)
    assert all(g is None or g.dtype == torch.float32 for g in grads)


def test_a_second_derivative_raises(device):
    x, weight = make(device, (40, H), (32, H))
    (grad,) = torch.autograd.grad(F.fp8_linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_nan_in_one_token_stays_in_that_token(device):
    x, weight = make(device, (4, H), (32, H))
    with torch.no_grad():
        x[1, 3] = float("nan")
        out = F.fp8_linear(x, weight)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


def test_a_changed_tensor_is_cast_again(device):
    """Layers that read one tensor share its codes, but only while it has not been written to."""
    x, weight = make(device, (40, H), (32, H))
    x = x.detach()
    before = F.fp8_linear(x, weight)
    x.mul_(-1)
    assert torch.equal(F.fp8_linear(x, weight), -before)


def test_codes_of_the_last_input_go_with_it(device):
    from eightfold.nn import _products

    x, weight = make(device, (40, H), (32, H))
    x = x + 0
    F.fp8_linear(x, weight)
    assert _products._last_input
    del x
    assert not _products._last_input


X, W = torch.zeros(4, 32), torch.zeros(48, 32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(F.fp8_linear, X.half(), W), TypeError, "x must be bfloat16 or float32, got torch.float16"),
        (partial(F.fp8_linear, X, W, save="rows"), ValueError, "save must be 'columns' or 'input', got 'rows'"),
        (partial(F.fp8_linear, X, W[:, :16]), ValueError, r"weight must be \[out, 32\], .* got \[48, 16\]"),
        (partial(F.fp8_linear, X, W[:40]), ValueError, r"multiples of 16, got \[40, 32\]"),
        (partial(F.fp8_linear, X, W, torch.zeros(47)), ValueError, r"bias of weight must be \[48\], got \[47\]"),
        (partial(F.fp8_linear, torch.zeros(()), W), ValueError, "got a scalar"),
        (partial(F.fp8_rms_norm, X, torch.zeros(31), EPS), ValueError, r"must be \[32\], .* got \[31\]"),
        (
            partial(F.fp8_norm_linears, X, W[0], EPS, [W], save="no"),
            ValueError,
            "must be 'columns' or 'input', got 'no'",
        ),
        (partial(F.fp8_norm_linears, X, W[0], EPS, [W], []), ValueError, "got 1 weights, 0 biases and 1 caches"),
        (partial(F.fp8_norm_linears, X, W[0], EPS, [W], residual=X[:2]), ValueError, "residual must be as x"),
        (partial(F.fp8_norm_linears, X, W[0], EPS, [W, W.t()]), ValueError, r"weights\[1\] must be \[out, 32\]"),
        (partial(F.fp8_swiglu_mlp, X, W, W[:32], W.t()), ValueError, r"up_weight \[32, 32\] must be as gate"),
        (partial(F.fp8_swiglu_mlp, X, W, W, W), ValueError, r"down_weight must be \[out, 48\]"),
    ],
)
def test_errors_name_the_argument_and_its_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_layers_copy(device):
    from eightfold.nn import FP8SwiGLU

    layer = FP8SwiGLU(64, 96, device=device)
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 64, device=device)
    assert torch.equal(layer(x), twin(x))
