"""Linear attention: against float64 with all gradients, layouts, masks, carried states, torch's machinery, errors."""

import pytest
import torch

from eightfold import reference
from eightfold.ops import (
    LinearAttentionState,
    linear_attention,
    linear_attention_packed,
    linear_attention_quantize,
    quantize,
)
from fused_bytes import check_layout, same_bytes, same_cast

ops = torch.ops.eightfold
BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [BF16, FP32]
SHAPES = [(1, 31, 5, 32), (3, 33, 6, 64), (2, 64, 3, 128), (2, 1024, 2, 32), (1, 1030, 3, 64)]
TOLERANCE = {BF16: 3e-3, FP32: 4e-6}  # of the norm: half a bf16 ulp is 1.7e-3 on average
STATES = {"cpu": 4e-6, "cuda": 2e-5}  # tensor cores cut off what they add, and their sums are of one sign
ROUNDED_TWICE = 5e-3  # on CUDA gradients are those of an upstream gradient over D that is rounded to bf16


def relative(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def skip_what_cuda_lacks(device, dtype):
    if device.type == "cuda" and dtype == FP32:
        pytest.skip("bfloat16 only on CUDA")


def inputs(shape, dtype, device="cpu", mean=0.0):
    """q, k and v; a query and a key of zeros, others of negative numbers alone."""
    q, k, v = (torch.randn(shape, device=device) for _ in range(3))
    for x in (q, k):
        x[:, 1:2] = 0.0
        x[:, 2::7] = -x[:, 2::7].abs()
    return [x.to(dtype) for x in (q, k, v + mean)]


def exact(q, k, v, key_mask=None, state=None, normalizer=None, eps=1e-15):
    """o, S and z in float64, for autograd."""
    q, k, v = (x.double() for x in (q, k, v))
    if key_mask is not None:
        gone = ~key_mask[..., None, None]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    sums, counts = torch.einsum("bnhi,bnhj->bhij", k.relu(), v), k.relu().sum(1)
    if state is not None:
        sums, counts = sums + state, counts + normalizer
    d = torch.einsum("bnhi,bhi->bnh", q.relu(), counts) + eps
    return torch.einsum("bnhi,bhij->bnhj", q.relu(), sums) / d[..., None], sums, counts


def check(values, expected, bounds):
    for value, want, bound in zip(values, expected, bounds, strict=True):
        assert value.shape == want.shape
        assert relative(value, want) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, device):
    skip_what_cuda_lacks(device, dtype)
    leaves = [x.requires_grad_() for x in inputs(shape, dtype, device)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = exact(*wide)
    grad = torch.randn(shape, device=device).to(dtype)
    expected_grads = torch.autograd.grad(expected[0], wide, grad.double())

    out, states = linear_attention(*leaves, return_state=True)
    assert out.is_contiguous()
    assert out.dtype == dtype
    bound = TOLERANCE[dtype]
    check((out, *states), expected, (bound, *[STATES[device.type]] * 2))
    assert (out[:, 1:2] == 0).all()
    grads = torch.autograd.grad(out, leaves, grad)
    check(grads, expected_grads, [ROUNDED_TWICE if device.type == "cuda" else 2 * bound] * 3)
    assert all(g.dtype == dtype for g in grads)
    assert (grads[0][leaves[0] <= 0] == 0).all()
    assert (grads[1][leaves[1] <= 0] == 0).all()

    plain = [x.detach() for x in leaves]
    check(reference.linear_attention(*plain), expected, (bound, *[STATES[device.type]] * 2))
    theirs, *_ = reference.linear_attention_backward(grad, *plain, *(s.detach() for s in states))
    check(theirs.unbind(2), expected_grads, [2 * bound] * 3)


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token(dtype, dim, device):
    """It sees itself alone: its result is its value, and of its query's and key's gradients only rounding is left."""
    skip_what_cuda_lacks(device, dtype)
    q, k, v = (torch.randn(3, 1, 5, dim, device=device).to(dtype).requires_grad_() for _ in range(3))
    out = linear_attention(q, k, v)
    assert relative(out, v) < 1e-6
    grad = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    assert relative(dv, grad) < (TOLERANCE[BF16] if device.type == "cuda" else 1e-6)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-3


@pytest.mark.parametrize("mean", [0.0, 2.0])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens(dtype, dim, mean, device):
    """Sums of 16,384 tokens. Where v has a mean, the two terms of a query's gradient cancel but for a hundredth."""
    skip_what_cuda_lacks(device, dtype)
    leaves = [x.requires_grad_() for x in inputs((1, 16384, 1, dim), dtype, device, mean)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected, *_ = exact(*wide)
    grad = torch.randn_like(leaves[0])
    out = linear_attention(*leaves)
    rounded = reference.linear_attention(*(x.detach() for x in leaves))[0]
    assert relative(out, expected) < max(1.5 * relative(rounded, expected), 4e-6)
    grads = torch.autograd.grad(out, leaves, grad)
    bound = ROUNDED_TWICE if dtype == BF16 else 1e-4 if mean else 1e-5
    check(grads, torch.autograd.grad(expected, wide, grad.double()), [bound] * 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 77, 5, 32), (1, 300, 3, 64), (2, 130, 1, 128)], ids=str)
def test_every_token(shape, dtype, device):
    """Each token of each head by itself, so that a wrong one cannot hide among thousands."""
    skip_what_cuda_lacks(device, dtype)
    leaves = inputs(shape, dtype, device, 0.5)
    wide = [x.double().requires_grad_() for x in leaves]
    expected, *_ = exact(*wide)
    grad = torch.randn_like(leaves[0])
    want = torch.autograd.grad(expected, wide, grad.double())
    out, *ours = ops.linear_attention(*leaves)
    dqkv, *_ = ops.linear_attention_backward(grad, *leaves, *ours)
    bound = 1e-2 if dtype == BF16 else 1e-5
    for a, b in zip((out, *dqkv.unbind(2)), (expected, *want), strict=True):
        size = b.norm(dim=-1)
        assert ((a.double() - b).norm(dim=-1) <= bound * (size + size.mean())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_key_mask(dim, dtype, device):
    """Keys that do not exist change nothing, whatever they hold, and have no gradients."""
    skip_what_cuda_lacks(device, dtype)
    q, k, v = inputs((3, 150, 3, dim), dtype, device)
    mask = torch.rand(3, 150, device=device) < 0.6
    mask[1] = False
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected = exact(*wide, mask)
    k[~mask], v[~mask] = torch.nan, torch.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, states = linear_attention(*leaves, key_mask=mask, return_state=True)
    check((out, *states), expected, (TOLERANCE[dtype], *[STATES[device.type]] * 2))
    assert (out[1] == 0).all()
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad)
    for ours, want in zip(grads, torch.autograd.grad(expected[0], wide, grad.double()), strict=True):
        assert relative(ours, want) < (ROUNDED_TWICE if device.type == "cuda" else 2 * TOLERANCE[dtype])
    assert (grads[1][~mask] == 0).all()
    assert (grads[2][~mask] == 0).all()
    same_bytes(reference.linear_attention(*(x.detach() for x in leaves), mask)[0][1], out[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("tokens", [40, 4500])
def test_carried_state(tokens, dim, dtype, device):
    """Two blocks, the second of which sees the keys of both, with gradients through what the first leaves."""
    skip_what_cuda_lacks(device, dtype)
    leaves = [x.requires_grad_() for x in inputs((2, tokens, 2, dim), dtype, device)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    split = tokens // 3

    def both(attend, q, k, v):
        first, states = attend(q[:, :split], k[:, :split], v[:, :split], None)
        second, states = attend(q[:, split:], k[:, split:], v[:, split:], states)
        return torch.cat((first, second), 1), *states

    def plain(q, k, v, states):
        out, *states = exact(q, k, v, None, *(states or (None, None)))
        return out, states

    ours = both(lambda q, k, v, states: linear_attention(q, k, v, carried=states, return_state=True), *leaves)
    expected = both(plain, *wide)
    check(ours, expected, (TOLERANCE[dtype], *[STATES[device.type]] * 2))
    grads = [torch.randn_like(x).div(100 if i else 1) for i, x in enumerate(ours)]
    bounds = [ROUNDED_TWICE if device.type == "cuda" else 2 * TOLERANCE[dtype]] * 3
    want = torch.autograd.grad(expected, wide, [g.double() for g in grads], retain_graph=True)
    check(torch.autograd.grad(ours, leaves, grads, retain_graph=True), want, bounds)
    want = torch.autograd.grad(expected[2], wide[1], grads[2].double())  # the states alone
    check(torch.autograd.grad(ours[2], leaves[1], grads[2]), want, [TOLERANCE[dtype]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 5, 32), (2, 70, 3, 64), (1, 70, 2, 128)], ids=str)
def test_views_of_a_projection(shape, dtype, device):
    """Slices of one projection's output in either order, heads before tokens: the bits of dense rows."""
    skip_what_cuda_lacks(device, dtype)
    dense = inputs(shape, dtype, device)
    expected = ops.linear_attention(*dense)
    grad = torch.randn_like(expected[0])
    want = ops.linear_attention_backward(grad, *dense, *expected[1:])
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (*dense, grad)]
    for views in (torch.stack(dense, 2).unbind(2), torch.stack(dense, 3).unbind(3), turned[:3]):
        same = zip(ops.linear_attention(*views), expected, strict=True)
        assert all(torch.equal(a, b) for a, b in same)
        ours = ops.linear_attention_backward(turned[3], *views, *expected[1:])
        assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))

    qkv = torch.stack(dense, 2).requires_grad_()
    out = linear_attention_packed(qkv)
    assert torch.equal(out, expected[0])
    (dqkv,) = torch.autograd.grad(out, qkv, grad)
    assert dqkv.is_contiguous()
    assert torch.equal(dqkv, want[0])
    leaves = [x.requires_grad_() for x in dense]
    for ours, part in zip(torch.autograd.grad(linear_attention(*leaves).sum(), leaves), leaves, strict=True):
        assert ours.isfinite().all()  # of a gradient that is expanded
        assert ours.shape == part.shape
    with pytest.raises(ValueError, match=r"qkv must have shape \[batch, tokens, 3, heads, dim\], got \[2, 3, 4, 5\]"):
        linear_attention_packed(torch.zeros(2, 3, 4, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 37, 6, 32), (1, 200, 70, 32), (3, 5, 3, 64), (2, 33, 1, 128), (1, 1, 1, 32)], ids=str
)
def test_quantize(shape, dtype, device):
    """The bytes of a cast of the result; a last group of fewer than 128 columns; a NaN marks its groups."""
    skip_what_cuda_lacks(device, dtype)
    q, k, v = inputs(shape, dtype, device)
    q[-1, -1, -1, 0] = torch.nan
    out, states = linear_attention(q, k, v, return_state=True)
    ours, same = linear_attention_quantize(q, k, v, return_state=True)
    same_cast(ours, quantize(out.view(shape[0] * shape[1], shape[2] * shape[3]), (1, 128)))
    check_layout(ours.codes, ours.scales, (1, 128))
    assert ours.scales[-1, -1].isnan()
    assert all(torch.equal(a, b) for a, b in zip(states, same, strict=True))


def test_a_sample_is_its_own(device):
    """The same bits alone, among others and again; a NaN stays in its sample and head."""
    q, k, v = inputs((4, 700, 5, 32), BF16, device)
    grad = torch.randn_like(q)

    def all_of(rows):
        parts = [x[rows] for x in (q, k, v)]
        out, *states = ops.linear_attention(*parts)
        return out, *states, *ops.linear_attention_backward(grad[rows], *parts, *states)

    together, alone = all_of(slice(None)), all_of(slice(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(all_of(slice(None)), together, strict=True))
    assert all(torch.equal(a[2:3], b) for a, b in zip(together, alone, strict=True))
    k[0, 350, 1] = torch.nan
    poisoned = all_of(slice(None))
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(together, poisoned, strict=True))
    assert poisoned[0][0, 3:5, 1].isnan().all()
    assert torch.equal(poisoned[0][0, :, 2:], together[0][0, :, 2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bits(dtype):
    leaves = inputs((2, 1300, 3, 64), dtype)
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            out, *states = ops.linear_attention(*leaves)
            seen.append((out, *states, *ops.linear_attention_backward(out, *leaves, *states)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 2, 32), (2, 0, 3, 32), (2, 5, 0, 64), (0, 0, 0, 128)], ids=str)
def test_empty(shape, device):
    leaves = [x.requires_grad_() for x in torch.randn(3, *shape, device=device).to(BF16)]
    batch, tokens, heads, dim = shape
    out, states = linear_attention(*leaves, return_state=True)
    assert out.shape == shape
    assert all((s == 0).all() for s in states)
    assert all(g.shape == shape for g in torch.autograd.grad(out.sum(), leaves))
    carried = LinearAttentionState(*(torch.randn_like(s) for s in states))
    _, after = linear_attention(*leaves, carried=carried, return_state=True)
    assert all(torch.equal(a, b) for a, b in zip(after, carried, strict=True))
    cast = linear_attention_quantize(*(x.detach() for x in leaves))
    assert cast.codes.shape == (batch * tokens, heads * dim)


def test_epsilon(device):
    """It is added in float32: 1e-15 does not vanish where the other sum is 0, and counts where it is small."""
    q, k, v = inputs((1, 50, 1, 32), BF16, device)
    assert (linear_attention(-q.abs(), k, v) == 0).all()
    for eps in (1e-30, 1e-6, 3.0):
        ours, want = linear_attention(q / 256, k / 256, v, eps=eps), exact(q / 256, k / 256, v, eps=eps)[0]
        assert relative(ours, want) < 3e-3
    for eps in (0.0, -1.0, 1e-38, float("nan"), 1e39):
        with pytest.raises(RuntimeError, match=r"eps must be from 1e-37 to 3\.4e38"):
            linear_attention(q, k, v, eps=eps)


def test_torch_citizen(device):
    leaves = inputs((2, 70, 3, 32), BF16, device)
    mask = torch.rand(2, 70, device=device) < 0.5
    out, *states = ops.linear_attention(*leaves, mask)
    torch.library.opcheck(ops.linear_attention.default, (*leaves, mask, *states, 1e-6))
    torch.library.opcheck(ops.linear_attention.default, leaves)
    torch.library.opcheck(ops.linear_attention_quantize.default, (*leaves, mask, *states))
    torch.library.opcheck(ops.linear_attention_backward.default, (out, *leaves, *states))
    torch.library.opcheck(ops.linear_attention_backward.default, (out, *leaves, *states, mask, *states, 1e-6))
    leaves = [x.requires_grad_() for x in leaves]
    qkv = torch.stack([x.detach() for x in leaves], 2).requires_grad_()

    def loss(q, k, v):
        first, carried = linear_attention(q * 2, k, v, key_mask=mask, return_state=True)
        return linear_attention(first, k, v, carried=carried).float().square().sum()

    def packed(qkv):
        return linear_attention_packed(qkv).float().square().sum()

    torch._dynamo.reset()
    for function, arguments in ((loss, leaves), (packed, [qkv])):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        ours = torch.autograd.grad(compiled(*arguments), arguments)
        assert all(torch.equal(a, b) for a, b in zip(ours, torch.autograd.grad(function(*arguments), arguments)))
    rows = [x.detach() for x in leaves]
    compiled = torch.compile(lambda *x: linear_attention_quantize(*x).codes, fullgraph=True, backend="aot_eager")
    same_bytes(compiled(*rows), linear_attention_quantize(*rows).codes)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [300, 5000])
def test_cuda_graph(tokens, bare_memory):
    leaves = inputs((2, tokens, 5, 32), BF16, "cuda")

    def passes():
        out, *states = ops.linear_attention(*leaves)
        cast = ops.linear_attention_quantize(*leaves)
        return out, *states, *cast, *ops.linear_attention_backward(out, *leaves, *states)

    passes()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = passes()
    for x in leaves:
        x.normal_()
    for _ in range(3):
        graph.replay()
    for a, b in zip(captured, passes(), strict=True):
        same_bytes(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 1000, 7, 32), (1, 5000, 3, 64), (1, 700, 2, 128)], ids=str)
def test_cpu_and_cuda(shape):
    """Different orders of sums: close to a rounding of the result."""
    leaves = inputs(shape, BF16)
    on_device = [x.cuda() for x in leaves]
    for ours, theirs in zip(ops.linear_attention(*on_device), ops.linear_attention(*leaves), strict=True):
        assert relative(ours.cpu(), theirs.double()) < 3e-3
