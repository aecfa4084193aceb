"""add_to_grad: weight gradients that are added to `.grad` by the products that make them, once and rounded once; and
every case that stays autograd's."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from eightfold.nn import FP8Linear, FP8SwiGLU, add_to_grads
from eightfold.nn import functional as F
from layer_cases import DTYPES, EPS, H, make

WIDTHS, INTER, HEAD = (256, 128, 144), 384, 16  # q, k and v share products; with 80 first, layers go one by one
QKV = [*((rows, H) for rows in WIDTHS), *((rows,) for rows in WIDTHS)]
MLP = [(INTER, H), (INTER, H), (H, INTER)]


def qkv(x, n, q, k, v, *biases, **options):
    angle = torch.linspace(0, 9, x.shape[1] * HEAD // 2, device=x.device).view(1, x.shape[1], 1, HEAD // 2)
    tables = angle.cos(), angle.sin()
    return F.fp8_norm_qkv(x, n, EPS, [q, k, v], biases, tables, HEAD, **options)[1]


# name -> (shapes of the parameters, the function)
CASES = {
    "linear": ([(144, H), (144,)], lambda x, w, b, **o: [F.fp8_linear(x, w, b, **o)]),
    "linear of a saved input": ([(144, H)], lambda x, w, **o: [F.fp8_linear(x, w, None, "input", **o)]),
    "norm_linears": (
        [(H,), *QKV],
        lambda x, n, q, k, v, *b, **o: F.fp8_norm_linears(x, n, EPS, [q, k, v], b, **o)[1],
    ),
    "norm_linears apart": (
        [(H,), (80, H), (128, H)],
        lambda x, n, q, k, **o: F.fp8_norm_linears(x, n, EPS, [q, k], **o)[1],
    ),
    "norm_qkv": ([(H,), *QKV], qkv),
    "modulate_linear": (
        [(2 * H,), (2 * H,), (144, H), (144,)],
        lambda x, s, t, w, b, **o: [F.fp8_modulate_linear(x, s.view(2, H), t.view(2, H), EPS, w, b, **o)[1]],
    ),
    "swiglu": (MLP, lambda x, *w, **o: [F.fp8_swiglu_mlp(x, *w, **o)]),
    "norm_swiglu": (
        [(H,), (80, H), (80, H), (H, 80)],
        lambda x, n, *w, **o: [F.fp8_norm_swiglu_mlp(x, n, EPS, *w, **o)[1]],
    ),
}


class Additions(TorchDispatchMode):
    """How many products were added to weight gradients, by the gradient's dtype."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.eightfold.fp8_gemm_accumulate_.default and len(args) > 5 and args[5] == 1:
            self.counts[args[0].dtype] += 1
        return function(*args, **(kwargs or {}))


def batches(device, count, dtype=torch.bfloat16):
    return [make(device, (2, 30 + 7 * i, H), dtype=dtype, scale=1.0)[0] for i in range(count)]


def run(function, x, parameters, **options):
    """A backward pass of its own output gradients."""
    outs = function(x, *parameters, **options)
    torch.manual_seed(x.shape[1])
    torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])


def float_gradients(function, x, parameters):
    """As the products have them before they are rounded: those of the same weights in float32."""
    wide = [p.detach().float().requires_grad_() for p in parameters]
    run(function, x.detach().requires_grad_(), wide)
    return [p.grad for p in wide]


def expected(function, xs, parameters, start=None):
    """Sums of the micro-batches: of matrices rounded once a step, of others as autograd rounds them."""
    totals = [None] * len(parameters) if start is None else [None if t is None else t.clone() for t in start]
    for x in xs:
        for i, (p, g) in enumerate(zip(parameters, float_gradients(function, x, parameters), strict=True)):
            if totals[i] is None:
                totals[i] = g.to(p.dtype)
            elif p.ndim == 2:
                totals[i] = (totals[i].float() + g).to(p.dtype)
            else:
                totals[i] = totals[i] + g.to(p.dtype)
    return totals


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_weight_gets_the_sum_rounded_once(device, name, weight_dtype):
    shapes, function = CASES[name]
    parameters, xs = make(device, *shapes, dtype=weight_dtype), batches(device, 3)
    wanted = expected(function, xs, parameters)
    with Additions() as additions:
        for x in xs:
            run(function, x, parameters, add_to_grad=True)
    assert all(torch.equal(p.grad, w) for p, w in zip(parameters, wanted, strict=True))
    products = 2 if name in ("norm_linears apart", "swiglu") else 1
    products = 3 if name == "norm_swiglu" else products  # gate and up are not a multiple of 128 high
    assert additions.counts == {weight_dtype: 2 * products}
    if weight_dtype == torch.bfloat16:  # what autograd adds is rounded before: the sums differ
        others = make(device, *shapes, dtype=weight_dtype)
        for ours, other in zip(parameters, others, strict=True):
            other.data.copy_(ours)
        for x in xs:
            run(function, x, others)
        assert not all(torch.equal(a.grad, b.grad) for a, b in zip(parameters, others, strict=True) if a.ndim == 2)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("present", [(True, True, True), (False, True, True), (True, False, True), (True, True, False)])
def test_gradients_that_do_not_lie_together(device, weight_dtype, present):
    """Each weight of a shared product has its own sum, or none yet."""
    shapes, function = CASES["norm_linears"]
    parameters, (x,) = make(device, *shapes, dtype=weight_dtype), batches(device, 1)
    for parameter, there in zip(parameters[1:4], present, strict=True):
        parameter.grad = torch.randn_like(parameter) if there else None
    wanted = expected(function, [x], parameters, [p.grad for p in parameters])
    run(function, x, parameters, add_to_grad=True)
    assert all(torch.equal(p.grad, w) for p, w in zip(parameters, wanted, strict=True))


@pytest.mark.parametrize("places", [(0, 256, 384), (144, 400, 0), (0, 272, 400)], ids=str)
def test_gradients_in_one_storage(device, places):
    """As a shared product leaves them, in another order, and with a gap: all but the first take a product each."""
    shapes, function = CASES["norm_linears"]
    parameters, (x,) = make(device, *shapes, dtype=torch.bfloat16), batches(device, 1)
    storage = torch.randn(sum(WIDTHS) + 16, H, device=device).bfloat16()
    before = storage.clone()
    for parameter, place, rows in zip(parameters[1:4], places, WIDTHS, strict=True):
        parameter.grad = storage[place : place + rows]
    wanted = expected(function, [x], parameters, [p.grad for p in parameters])
    with Additions() as additions:
        run(function, x, parameters, add_to_grad=True)
    assert additions.counts[torch.bfloat16] == (1 if places == (0, 256, 384) else 3)
    assert all(torch.equal(p.grad, w) for p, w in zip(parameters, wanted, strict=True))
    gap = slice(256, 272) if places[1] == 272 else slice(sum(WIDTHS), None)
    assert torch.equal(storage[gap], before[gap])


def test_a_frozen_weight_of_a_shared_product(device):
    shapes, function = CASES["norm_linears"]
    parameters, xs = make(device, *shapes, dtype=torch.bfloat16), batches(device, 2)
    wanted = expected(function, xs, parameters)
    parameters[2].requires_grad_(False)
    for x in xs:
        run(function, x, parameters, add_to_grad=True)
    assert parameters[2].grad is None
    assert all(torch.equal(p.grad, w) for p, w in zip(parameters, wanted, strict=True) if p.requires_grad)


@pytest.mark.parametrize("name", ["linear", "norm_qkv", "swiglu"])
def test_who_asks_for_gradients_gets_them(device, name):
    """torch.autograd.grad, and backward for other inputs, leave `.grad` as it is."""
    shapes, function = CASES[name]
    parameters, (x,) = make(device, *shapes), batches(device, 1)
    once = float_gradients(function, x, parameters)
    run(function, x, parameters, add_to_grad=True)
    before = [p.grad.clone() for p in parameters]
    outs = function(x, *parameters, add_to_grad=True)
    torch.manual_seed(x.shape[1])
    dys = [torch.randn_like(out) for out in outs]
    found = torch.autograd.grad(outs, parameters, dys, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, once, strict=True))
    torch.autograd.backward(outs, dys, inputs=[x])
    assert all(torch.equal(p.grad, b) for p, b in zip(parameters, before, strict=True))


def _hook(weight, seen):
    weight.register_hook(lambda grad: seen.append(grad.clone()))


def _post_hook(weight, seen):
    weight.register_post_accumulate_grad_hook(lambda w: seen.append(w.grad.clone()))


def _transposed(weight, seen):
    weight.grad = weight.grad.t().contiguous().t()


def _unaligned(weight, seen):
    at = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=weight.device)[1:].view_as(weight)
    weight.grad = at.copy_(weight.grad)


@pytest.mark.parametrize("change", [_hook, _post_hook, _transposed, _unaligned])
def test_what_stays_with_autograd(device, change):
    shapes, function = CASES["linear"]
    parameters, xs, seen = make(device, *shapes), batches(device, 2), []
    wanted = expected(function, xs, parameters)
    run(function, xs[0], parameters, add_to_grad=True)
    change(parameters[0], seen)
    with Additions() as additions:
        run(function, xs[1], parameters, add_to_grad=True)
    assert all(torch.equal(p.grad, w) for p, w in zip(parameters, wanted, strict=True))
    assert not additions.counts
    if change is _hook:
        assert torch.equal(seen[0], float_gradients(function, xs[1], parameters)[0])
    if change is _post_hook:
        assert torch.equal(seen[0], wanted[0])


def test_a_weight_that_is_no_leaf(device):
    weight, (x,) = make(device, (144, H))[0], batches(device, 1)
    for _ in range(2):
        run(lambda x, w, **o: [F.fp8_linear(x, 2 * w, **o)], x, [weight], add_to_grad=True)
    once = float_gradients(lambda x, w, **o: [F.fp8_linear(x, 2 * w)], x, [weight])[0]
    assert torch.equal(weight.grad, 2 * once)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["linear of a saved input", "norm_linears", "swiglu"])
def test_layers_computed_again(device, name, weight_dtype):
    """A checkpointed layer's saved weights are other tensors than the parameters."""
    shapes, function = CASES[name]
    parameters, xs = make(device, *shapes, dtype=weight_dtype), batches(device, 2)
    wanted = expected(function, xs, parameters)

    def again(x, *parameters):
        return checkpoint(lambda *a: tuple(function(*a, add_to_grad=True)), x, *parameters, use_reentrant=False)

    with Additions() as additions:
        for x in xs:
            run(again, x, parameters)
    assert additions.counts[weight_dtype] == (2 if name == "swiglu" else 1)
    assert all(torch.equal(p.grad, w) for p, w in zip(parameters, wanted, strict=True))


def test_a_weight_in_two_places(device):
    """Within one pass both gradients are added to the sum of the passes before."""
    weight, xs = make(device, (H, H))[0], batches(device, 2, torch.float32)

    def twice(x, w, **options):
        return [F.fp8_linear(F.fp8_linear(x, w, **options), w, **options)]

    wanted = sum(float_gradients(twice, x, [weight])[0] for x in xs)
    with Additions() as additions:
        for x in xs:
            run(twice, x, [weight], add_to_grad=True)
    assert additions.counts == {torch.float32: 2}
    assert float((weight.grad - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("make_model", [lambda d: FP8Linear(H, 144, device=d), lambda d: FP8SwiGLU(H, 96, device=d)])
@pytest.mark.parametrize("compiled", [False, True])
def test_modules(device, make_model, compiled):
    """A compiled layer leaves the sums to autograd."""
    model, xs = make_model(device), batches(device, 2)
    parameters = list(model.parameters())
    each = [torch.autograd.grad(model(x).float().sum(), parameters) for x in xs]
    wanted = [first + second for first, second in zip(*each, strict=True)]
    torch._dynamo.reset()
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    add_to_grads(model)
    losses = [call(x).float().sum() for x in xs]
    with Additions() as additions:
        for loss in losses:
            loss.backward()
    matrices = sum(p.ndim == 2 for p in parameters)
    assert additions.counts[torch.float32] == (0 if compiled else matrices)
    assert all(torch.equal(p.grad, w) for p, w in zip(parameters, wanted, strict=True))
    add_to_grads(model, False)
    with Additions() as additions:
        model(xs[0]).float().sum().backward()
    assert not additions.counts
