"""Attention of packed sequences: against float64 with all gradients, strides, extremes, torch's machinery, errors."""

import pytest
import torch

from attention_cases import DTYPES, LENGTHS, MASKS, exact, packed, relative, skip_what_cuda_lacks, starts_of
from eightfold import reference
from eightfold.ops import attention
from eightfold.ops.attention import _flash_backward

ops = torch.ops.eightfold
SHAPES = [(4, 4, 64), (7, 1, 64), (8, 2, 96), (7, 1, 128), (4, 1, 16), (2, 1, 24), (3, 3, 256)]
TOLERANCE = {torch.bfloat16: 3e-3, torch.float32: 2e-6}  # of the norm: half a bf16 ulp is 1.7e-3 on average
ROUNDED_TWICE = 4e-3  # torch's backward kernel on CUDA multiplies bf16 weights and bf16 gradients of scores


@pytest.mark.parametrize(("causal", "block"), MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, causal, block, device):
    skip_what_cuda_lacks(device, dtype, shape[2])
    *inputs, starts = packed(LENGTHS, *shape, dtype, device)
    wide = [x.double().requires_grad_() for x in inputs]
    expected = exact(*wide, starts, causal=causal, block=block)
    grad = torch.randn_like(expected).to(dtype)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())

    leaves = [x.requires_grad_() for x in inputs]
    out, lse = attention(*leaves, starts=starts, longest=700, causal=causal, block=block, return_lse=True)
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert not lse.requires_grad
    assert relative(out, expected) < TOLERANCE[dtype]
    for ours, want in zip(torch.autograd.grad(out, leaves, grad), expected_grads, strict=True):
        assert ours.dtype == dtype
        assert relative(ours, want) < (ROUNDED_TWICE if device.type == "cuda" else TOLERANCE[dtype])

    options = starts, 700, shape[2] ** -0.5, causal, block
    plain, plain_lse = reference.attention(*inputs, *options)
    torch.testing.assert_close(lse, plain_lse.detach(), rtol=1e-6, atol=1e-5)
    assert relative(plain, expected) < TOLERANCE[dtype]
    grads = reference.attention_backward(grad, *inputs, out, lse, *options)
    for ours, want in zip(grads, expected_grads, strict=True):
        assert relative(ours, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row(dtype, device):
    """Each row by itself, so that a wrong one cannot hide among thousands."""
    skip_what_cuda_lacks(device, dtype, 64)
    *inputs, starts = packed([1, 17, 127, 300, 1030], 6, 2, 64, dtype, device)
    for causal, block in MASKS:
        expected = exact(*inputs, starts, causal=causal, block=block)
        out = attention(*inputs, starts=starts, causal=causal, block=block)
        error = (out.double() - expected).norm(dim=-1)
        bound = 5e-6 if dtype == torch.float32 else 1e-2
        assert (error < bound * expected.norm(dim=-1)).all(), f"causal {causal}, block {block}"


@pytest.mark.parametrize("causal", [True, False])
def test_batch_is_packed_sequences(causal, device):
    *inputs, starts = packed([70] * 3, 4, 2, 64, torch.bfloat16, device)
    batch = [x.view(3, 70, -1, 64).requires_grad_() for x in inputs]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    ours, lse = attention(*batch, causal=causal, return_lse=True)
    expected, expected_lse = attention(*leaves, starts=starts, causal=causal, return_lse=True)
    assert torch.equal(ours, expected.view(3, 70, 4, 64))
    assert torch.equal(lse, expected_lse)
    grad = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, batch, grad), torch.autograd.grad(expected, leaves, grad.flatten(0, 1))):
        assert torch.equal(a.flatten(0, 1), b)
    with torch.no_grad():
        swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in batch]
        assert torch.equal(attention(*swapped, causal=causal), ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype, device):
    """Slices of one projection's output; heads before tokens; one head for all; gradients that are expanded."""
    skip_what_cuda_lacks(device, dtype, 64)
    starts, scale = starts_of([40, 90], device), 64**-0.5
    wide = torch.randn(130, 8, 64, device=device).to(dtype)
    swapped = torch.randn(8, 130, 64, device=device).to(dtype).transpose(0, 1)
    layouts = [[x[:, :4], x[:, 4:6], x[:, 6:]] for x in (wide, swapped)]
    layouts.append([wide[:, :4], wide[:, 4:5].expand(-1, 2, -1), wide[:, 6:]])
    if device.type == "cpu":
        odd = torch.randn(130, 8, 67).to(dtype)[..., 1:65]
        layouts.append([odd[:, :4], odd[:, 4:6], odd[:, 6:]])
    for inputs in layouts:
        out, lse = ops.attention(*inputs, starts, 90, scale)
        plain = [x.contiguous() for x in inputs]
        for a, b in zip((out, lse), ops.attention(*plain, starts, 90, scale), strict=True):
            assert torch.equal(a, b)
        for dout in (torch.randn(4, 130, 64, device=device).to(dtype).transpose(0, 1), torch.ones_like(out)):
            ours = ops.attention_backward(dout, *inputs, out, lse, starts, 90, scale)
            expected = ops.attention_backward(dout.contiguous(), *plain, out, lse, starts, 90, scale)
            assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(ours, expected, strict=True))
    leaf = wide[:, :4].clone().requires_grad_()
    (summed,) = torch.autograd.grad(attention(leaf, wide[:, 4:6], wide[:, 6:], starts=starts).sum(), leaf)
    assert summed.isfinite().all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 5, 0, 0, 1, 0]], ids=str)
def test_empty_sequences(lengths, device):
    *inputs, starts = packed(lengths, 4, 2, 64, torch.bfloat16, device)
    out, lse = attention(*(x.requires_grad_() for x in inputs), starts=starts, return_lse=True)
    assert lse.shape == (4, sum(lengths))
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))
    if sum(lengths):
        full = [n for n in lengths if n]
        assert torch.equal(out, attention(*inputs, starts=starts_of(full, device)))


def test_empty_batch(device):
    for batch, tokens in ((0, 4), (3, 0)):
        x = torch.zeros(batch, tokens, 2, 64, dtype=torch.bfloat16, device=device)
        assert attention(x, x, x).shape == x.shape


def test_scale(device):
    *inputs, starts = packed([50, 200], 2, 1, 64, torch.bfloat16, device)
    for scale in (1e-6, 0.3, 1.0):
        assert relative(attention(*inputs, starts=starts, scale=scale), exact(*inputs, starts, scale)) < 3e-3
    for scale in (0.0, -0.3, float("nan")):
        with pytest.raises(RuntimeError, match="scale must be more than 0"):
            attention(*inputs, starts=starts, scale=scale)


def test_extreme_scores(device):
    """Scores of thousands: one key holds all the weight; the log-sum-exp is the largest score."""
    q, k, v, starts = packed([600], 2, 1, 64, torch.bfloat16, device)
    out, lse = attention(q * 300, k * 300, v, starts=starts, return_lse=True)
    assert relative(out, exact(q * 300, k * 300, v, starts)) < 3e-3
    assert lse.isfinite().all()
    same, flat = attention(q * 0, k, v, starts=starts, return_lse=True)
    torch.testing.assert_close(flat[0].exp(), torch.arange(1.0, 601, device=device), rtol=1e-5, atol=0)
    assert relative(same, exact(q * 0, k, v, starts)) < 3e-3


def test_nan_stays_in_its_sequence(device):
    q, k, v, starts = packed([60, 150, 70], 4, 2, 64, torch.bfloat16, device)
    clean = attention(q, k, v, starts=starts)
    for x in (q, k, v):
        x[60:210] = torch.nan
    out, lse = attention(q, k, v, starts=starts, return_lse=True)
    assert out[60:210].isnan().all()
    assert lse[:, 60:210].isnan().all()
    assert torch.equal(out[:60], clean[:60])
    assert torch.equal(out[210:], clean[210:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_what_sees_it(dtype):
    """On the CPU a row reads its own keys alone, not zeros times those after it."""
    for at in (0, 100, 127, 128, 140, 299):
        q, k, v, starts = packed([300], 3, 1, 64, dtype)
        clean = attention(q, k, v, starts=starts)
        for x in (k, v):
            x[at] = torch.nan
        out = attention(q, k, v, starts=starts)
        assert torch.equal(out[:at], clean[:at])
        assert out[at:].isnan().all()
        seen, whole = at // 40 * 40, attention(q, k, v, starts=starts, block=40)
        assert whole[:seen].isfinite().all()
        assert whole[seen:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bits(dtype):
    *inputs, starts = packed(LENGTHS, 6, 2, 64, dtype)
    dout, threads, seen = torch.randn_like(inputs[0]), torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            out, lse = ops.attention(*inputs, starts, 700, 0.125)
            seen.append((out, lse, *ops.attention_backward(dout, *inputs, out, lse, starts, 700, 0.125)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_torch_citizen(device):
    *inputs, starts = packed([9, 130], 4, 2, 64, torch.bfloat16, device)
    options = starts, 130, 0.125, True, 32
    torch.library.opcheck(ops.attention.default, (*inputs, *options))
    out, lse = ops.attention(*inputs, *options)
    if device.type == "cpu":  # its CUDA kernel is the reference, which reads starts on the host
        torch.library.opcheck(ops.attention_backward.default, (out, *inputs, out, lse, *options))
    leaves = [x.requires_grad_() for x in inputs]

    def loss(q, k, v):
        return attention(q * 2, k, v, starts=starts).float().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)):
        assert torch.equal(a, b)
    batch = [x.detach().view(1, 139, -1, 64) for x in leaves]
    assert torch.equal(torch.compile(attention, fullgraph=True, backend="aot_eager")(*batch), attention(*batch))


@pytest.mark.gpu
def test_cuda_graph():
    *inputs, starts = packed([9, 700], 4, 2, 64, torch.bfloat16, "cuda")
    attention(*inputs, starts=starts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*inputs, starts=starts)
    for x in inputs:
        x.normal_()
    graph.replay()
    assert torch.equal(out, attention(*inputs, starts=starts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 4, 64)}, r": q must have 3 dimensions, got shape \[2, 5, 4, 64\]"),
        ({"q": torch.zeros(10, 4, 64).half()}, ": q must be bfloat16 or float32, got float16"),
        ({"q": torch.zeros(10, 64, 4).transpose(1, 2)}, ": q must have stride 1 in its last dimension"),
        ({"q": torch.zeros(10, 3, 64)}, ": heads of q must be a multiple of heads of k, got 3 and 2"),
        ({"k": torch.zeros(10, 0, 64)}, ": heads of q must be a multiple of heads of k, got 4 and 0"),
        (
            {"q": torch.zeros(10, 4, 20)},
            r": q must have a last dimension of 16 to 256 that is a multiple of 8, got shape \[10, 4, 20\]",
        ),
        ({"k": torch.zeros(10, 2, 64).bfloat16()}, ": k must be float32, got bfloat16"),
        ({"k": torch.zeros(9, 2, 64)}, r": k must have shape \[10, 2, 64\], got \[9, 2, 64\]"),
        ({"v": torch.zeros(10, 1, 64)}, r": v must have shape \[10, 2, 64\], got \[10, 1, 64\]"),
        ({"v": torch.zeros(10, 2, 32)}, r": v must have shape \[10, 2, 64\], got \[10, 2, 32\]"),
        ({"starts": torch.tensor([0, 10])}, ": starts must be int32, got int64"),
        ({"starts": torch.zeros(0).int()}, r": starts must have at least one element, got shape \[0\]"),
        ({"starts": torch.zeros(1, 2).int()}, r": starts must have 1 dimensions, got shape \[1, 2\]"),
        ({"starts": torch.tensor([0, 5, 10, 10]).int()[::2]}, ": starts must be contiguous"),
        ({"starts": torch.tensor([1, 10]).int()}, ": starts must begin with 0, got 1"),
        ({"starts": torch.tensor([0, 7, 6, 10]).int()}, ": starts must not fall, got 7 and then 6 at 2"),
        ({"starts": torch.tensor([0, 9]).int()}, ": starts must end with the 10 rows of q, got 9"),
        ({"longest": 5}, ": longest must be at least the 6 rows of sequence 1, got 5"),
        ({"longest": -1}, ": longest must be at least 0, got -1"),
        ({"block": 0}, ": block must be from 1 to 1073741824, got 0"),
        ({"block": 2**30 + 1}, ": block must be from 1 to 1073741824, got 1073741825"),
        ({"causal": False, "block": 32}, ": block must be 1 where causal is false, got 32"),
    ],
)
def test_errors(change, message):
    q, k, v, starts = packed([4, 6], 4, 2, 64, torch.float32)
    arguments = {"q": q, "k": k, "v": v, "starts": starts, "longest": 9, "scale": 1.0, **change}
    with pytest.raises(RuntimeError, match="attention" + message):
        ops.attention(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": torch.zeros(10, 4, 32)}, r": dout must have shape \[10, 4, 64\], got \[10, 4, 32\]"),
        ({"out": torch.zeros(10, 4, 64).bfloat16()}, ": out must be float32, got bfloat16"),
        ({"lse": torch.zeros(10, 4)}, r": lse must have shape \[4, 10\], got \[10, 4\]"),
        ({"lse": torch.zeros(10, 4).t()}, ": lse must be contiguous"),
        ({"lse": torch.zeros(4, 10).double()}, ": lse must be float32, got float64"),
        ({"longest": 5}, ": longest must be at least the 6 rows of sequence 1, got 5"),
    ],
)
def test_errors_of_the_backward_pass(change, message):
    q, k, v, starts = packed([4, 6], 4, 2, 64, torch.float32)
    arguments = {"dout": q, "q": q, "k": k, "v": v, "out": q, "lse": torch.zeros(4, 10)}
    with pytest.raises(RuntimeError, match="attention_backward" + message):
        ops.attention_backward(**{**arguments, "starts": starts, "longest": 6, "scale": 1.0, **change})


def test_errors_of_the_public_function():
    q, k, v, starts = packed([4, 6], 4, 2, 64, torch.float32)
    with pytest.raises(ValueError, match=r"q must have 4 dimensions without starts, got shape \[10, 4, 64\]"):
        attention(q, k, v)
    with pytest.raises(ValueError, match=r"q must have 3 dimensions with starts, got shape \[1, 10, 4, 64\]"):
        attention(q[None], k[None], v[None], starts=starts)
    with pytest.raises(ValueError, match=r"v must have shape \[1, 10, kv_heads, 64\], got \[1, 9, 2, 64\]"):
        attention(q[None], k[None], v[None, :9])


@pytest.mark.parametrize("asked", [False, True])
def test_backward_fills_no_memory_that_nobody_asked_to_fill(monkeypatch, asked):
    """torch's own kernel runs in its deterministic form, which by default clears each new tensor with NaN."""
    x, starts = torch.randn(8, 1, 64, dtype=torch.bfloat16), torch.tensor([0, 8], dtype=torch.int32)
    seen = []

    def kernel(*args, **kwargs):
        flags = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        seen.append(flags)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", kernel)
    torch.use_deterministic_algorithms(asked, warn_only=True)
    try:
        with pytest.raises(RuntimeError, match="no such kernel"):
            _flash_backward(x, x, x, x, x, torch.zeros(1, 8), starts, 8, 0.1)
        assert torch.are_deterministic_algorithms_enabled() == asked
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    assert seen == [(True, asked)]
