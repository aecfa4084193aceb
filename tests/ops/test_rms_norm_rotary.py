"""Norm of heads and rotation in one op: the bits of the two ops in sequence, both ways; torch's machinery, errors."""

import pytest
import torch

from eightfold import reference
from eightfold.nn.functional import fp8_rms_norm, fp8_rms_norm_rotary
from eightfold.ops import rms_norm, rms_norm_backward, rms_norm_rotary, rms_norm_rotary_backward, rotary
from eightfold.ops.quant import quantize
from fused_bytes import check_layout, same_bytes, same_cast

ops = torch.ops.eightfold
EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float32]
# batch, tokens, heads, dim: odd counts of tokens and heads; one head; runs of many rows, which end within a token and
# go on in the next sequence; dims that CUDA takes in several kernels
SHAPES = [
    (1, 7, 5, 64),
    (2, 33, 8, 128),
    (1, 1031, 32, 128),
    (3, 1601, 11, 64),
    (3, 17, 3, 96),
    (1, 13, 6, 80),
    (2, 9, 1, 16),
    (1, 1, 4, 128),
    (1, 5, 2, 20),
    (2, 3, 2, 256),
    (0, 4, 2, 64),
    (1, 0, 2, 128),
    (1, 3, 2, 0),
]


def tables(shape, device, batched):
    angle = torch.rand(shape[0] if batched and shape[0] else 1, shape[1], 1, shape[3] // 2, device=device) * 100
    return angle.cos(), angle.sin()


def inputs(shape, dtype, device, weight_dtype=torch.float32, batched=False):
    """x as the slice of queries in the product of queries, keys and values; dy as attention leaves it, heads first."""
    batch, tokens, heads, dim = shape
    wide = torch.randn(batch, tokens, (heads + 2) * dim, device=device)
    wide *= torch.rand(batch, tokens, 1, device=device) * 4
    wide[:, 1:2], wide[:, 2:3] = 0, 1e-20
    x = wide.to(dtype)[..., dim : (heads + 1) * dim].unflatten(-1, (heads, dim))
    dy = torch.randn(batch, heads, tokens, dim, device=device).to(dtype).transpose(1, 2)
    weight = (torch.rand(dim, device=device) + 0.5).to(weight_dtype)
    return x, dy, weight, *tables(shape, device, batched)


def rows_of(x):
    return x.flatten(0, 2).contiguous()


def rotated_back(dy, cos, sin):
    return rows_of(rotary(dy, cos, sin, inverse=True))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_ops_in_sequence(shape, dtype, weight_dtype, batched, device):
    x, dy, weight, cos, sin = inputs(shape, dtype, device, weight_dtype, batched)
    for given in (x, x.contiguous()):
        y, saved, rstd = rms_norm_rotary(given, weight, cos, sin, EPS, training=True)
        same_bytes(y, rotary(rms_norm(rows_of(x), weight, EPS).view(shape), cos, sin))
        assert y.is_contiguous()
        same_cast(saved, quantize(rows_of(x), (1, 128)))
        check_layout(saved.codes, saved.scales, (1, 128))
        same_bytes(rstd, ops.rms_norm(rows_of(x), weight, EPS, True)[3])
        same_bytes(rms_norm_rotary(given, weight, cos, sin, EPS).y, y)
    want_dx, want_dweight = rms_norm_backward(rotated_back(dy, cos, sin), saved, rstd, weight)
    for given in (dy, dy.contiguous()):
        dx, dweight = rms_norm_rotary_backward(given, saved, rstd, weight, cos, sin)
        same_bytes(dx, want_dx.view(shape))
        assert dx.is_contiguous()
        same_bytes(dweight, want_dweight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 33, 8, 128), (3, 17, 3, 96), (1, 5, 2, 20)], ids=str)
def test_values_of_the_reference(shape, dtype, device):
    x, dy, weight, cos, sin = inputs(shape, dtype, device)
    out, want = (f.rms_norm_rotary(x, weight, EPS, cos, sin, True) for f in (ops, reference))
    step = 2**-7 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(out[0], want[0], rtol=step, atol=4 * step)
    same_bytes(out[1], want[1])
    same_bytes(out[2], want[2])
    torch.testing.assert_close(out[3], want[3], rtol=1e-6, atol=0)
    saved = (*want[1:], weight, cos, sin)
    (dx, dweight), want = (f.rms_norm_rotary_backward(dy, *saved) for f in (ops, reference))
    torch.testing.assert_close(dx, want[0], rtol=step, atol=4 * step)
    torch.testing.assert_close(dweight, want[1], rtol=2e-5, atol=2e-4)


def test_a_token_depends_on_itself_alone(device):
    x, dy, weight, cos, sin = inputs((1, 70, 6, 128), torch.bfloat16, device)
    whole = rms_norm_rotary(x, weight, cos, sin, EPS, training=True)
    whole_dx = rms_norm_rotary_backward(dy, whole.input, whole.rstd, weight, cos, sin)[0]
    for part in (slice(0, 1), slice(69, 70), slice(3, 40)):
        at = cos[:, part].contiguous(), sin[:, part].contiguous()
        y, saved, rstd = rms_norm_rotary(x[:, part], weight, *at, EPS, training=True)
        same_bytes(y, whole.y[:, part])
        same_bytes(rms_norm_rotary_backward(dy[:, part], saved, rstd, weight, *at)[0], whole_dx[:, part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_memory_gives_the_same_bytes(dtype, device):
    x, dy, weight, cos, sin = inputs((1, 40, 4, 64), dtype, device)

    def shifted(t):
        return torch.empty(t.numel() + 1, dtype=dtype, device=device)[1:].view(t.shape).copy_(t)

    (y, saved, rstd), other = (rms_norm_rotary(t, weight, cos, sin, EPS, training=True) for t in (x, shifted(x)))
    same_bytes(other.y, y)
    same_cast(other.input, saved)
    same_bytes(other.rstd, rstd)
    grads = (rms_norm_rotary_backward(t, saved, rstd, weight, cos, sin) for t in (dy, shifted(dy)))
    for a, b in zip(*grads, strict=True):
        same_bytes(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_marks_its_head_and_no_other(bad, device):
    x, dy, weight, cos, sin = inputs((1, 9, 5, 64), torch.bfloat16, device)
    x[0, 4, 2, 7] = bad
    y, saved, rstd = rms_norm_rotary(x, weight, cos, sin, EPS, training=True)
    dx, dweight = rms_norm_rotary_backward(dy, saved, rstd, weight, cos, sin)
    good = torch.ones(9, 5, dtype=torch.bool, device=device)
    good[4, 2] = False
    for t in (y[0], dx[0]):
        assert t[good].isfinite().all()
        assert t[4, 2].isnan().any()
    assert saved.scales.view(9, 5)[4, 2].isnan()
    assert dweight.isnan().any()


def test_bits_do_not_depend_on_threads_or_run(device):
    x, dy, weight, cos, sin = inputs((2, 150, 7, 128), torch.bfloat16, device)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            y, saved, rstd = rms_norm_rotary(x, weight, cos, sin, EPS, training=True)
            runs.append([y, rstd, *rms_norm_rotary_backward(dy, saved, rstd, weight, cos, sin)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            same_bytes(a, b)


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_function_has_the_bits_of_the_functions_in_sequence(weight_dtype, device):
    x, dy, weight, cos, sin = inputs((2, 11, 3, 64), torch.bfloat16, device, weight_dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    ours, apart = fp8_rms_norm_rotary(x, weight, EPS, (cos, sin)), rotary(fp8_rms_norm(x, weight, EPS), cos, sin)
    same_bytes(ours, apart)
    for grad in (dy, dy.transpose(-1, -2).contiguous().transpose(-1, -2)):
        grads = (torch.autograd.grad(y, (x, weight), grad, retain_graph=True) for y in (ours, apart))
        for a, b in zip(*grads, strict=True):
            same_bytes(a, b)
    with torch.no_grad():
        same_bytes(fp8_rms_norm_rotary(x, weight, EPS, (cos, sin)), ours)
    (alone,) = torch.autograd.grad(fp8_rms_norm_rotary(x.detach(), weight, EPS, (cos, sin)), weight, dy)
    same_bytes(alone, torch.autograd.grad(ours, weight, dy)[0])
    with pytest.raises(ValueError, match=r"x must be \[batch, tokens, heads, dim\], got \[11, 3, 64\]"):
        fp8_rms_norm_rotary(x[0], weight, EPS, (cos, sin))
    with pytest.raises(ValueError, match=r"norm weight must be \[64\], the features of x, got \[3\]"):
        fp8_rms_norm_rotary(x, weight[:3], EPS, (cos, sin))


def launched(call):
    """Names of the kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "dtype", "fused"),
    [
        (16, torch.bfloat16, True),
        (80, torch.bfloat16, True),
        (128, torch.bfloat16, True),
        (40, torch.bfloat16, False),
        (256, torch.bfloat16, False),
        (128, torch.float32, False),
    ],
    ids=str,
)
def test_one_kernel_within_its_limits(dim, dtype, fused):
    x, dy, weight, cos, sin = inputs((2, 9, 3, dim), dtype, "cuda", batched=True)
    saved = ops.rms_norm_rotary(x, weight, EPS, cos, sin, True)[1:]
    for op, args in (
        (ops.rms_norm_rotary, (x, weight, EPS, cos, sin, True)),
        (ops.rms_norm_rotary_backward, (dy, *saved, weight, cos, sin)),
    ):
        names = launched(lambda op=op, args=args: op(*args))
        assert sum(f"{op.__name__}_kernel" in name for name in names) == fused
        assert any("rotary_kernel" in name and "norm" not in name for name in names) != fused


def calls(device):
    x, dy, weight, cos, sin = inputs((2, 5, 3, 64), torch.bfloat16, device)
    for training in (True, False):
        yield ops.rms_norm_rotary, (x, weight, EPS, cos, sin, training)
    saved = ops.rms_norm_rotary(x, weight, EPS, cos, sin, True)[1:]
    yield ops.rms_norm_rotary_backward, (dy, *saved, weight, cos, sin)


@pytest.mark.filterwarnings("ignore")
def test_opcheck(device):
    # test_schema computes with the inputs, which torch cannot do in FP8: what it would check is below
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in calls(device):
        torch.library.opcheck(op.default, args, test_utils=checks)
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        op(*args)
        for a, b in zip(args, before, strict=True):
            if isinstance(a, torch.Tensor):
                same_bytes(a, b)


def test_compiles_as_one_graph(device):
    for op, args in calls(device):
        torch._dynamo.reset()  # the lambda is one function to it, which it compiles eight times at most
        compiled = torch.compile(lambda *a, op=op: op(*a), fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(*args), op(*args), strict=True):
            same_bytes(a, b)
            assert a.stride() == b.stride()
    x, dy, weight, cos, sin = inputs((2, 5, 3, 64), torch.bfloat16, device)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    compiled = torch.compile(lambda x, w: fp8_rms_norm_rotary(x, w, EPS, (cos, sin)), fullgraph=True)
    outs = compiled(x, weight), fp8_rms_norm_rotary(x, weight, EPS, (cos, sin))
    same_bytes(*outs)
    for a, b in zip(*(torch.autograd.grad(out, (x, weight), dy) for out in outs), strict=True):
        same_bytes(a, b)


@pytest.mark.gpu
def test_cuda_graph():
    for op, args in calls("cuda"):
        expected = op(*args)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = op(*args)
        out[0].zero_(), out[-1].zero_()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(out, expected, strict=True):
            same_bytes(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 3, 64)}, r"x must have 4 dimensions, got shape \[5, 3, 64\]"),
        ({"x": torch.zeros(2, 5, 3, 64, dtype=torch.float16)}, "x must be bfloat16 or float32, got float16"),
        ({"x": torch.zeros(2, 5, 3, 63)}, r"x must have an even last dimension, got shape \[2, 5, 3, 63\]"),
        ({"x": torch.zeros(2, 5, 64, 3).transpose(2, 3)}, "x must have stride 1 in its last dimension"),
        ({"weight": torch.ones(32)}, r"weight must have shape \[64\], got \[32\]"),
        ({"weight": torch.ones(64).half()}, "weight must be bfloat16 or float32, got float16"),
        ({"weight": torch.ones(128)[::2]}, "weight must be contiguous"),
        ({"eps": -1.0}, "eps must not be negative, got -1"),
        ({"cos": torch.zeros(1, 4, 1, 32)}, r"cos must have shape \[1, 5, 1, 32\], got \[1, 4, 1, 32\]"),
        ({"sin": torch.zeros(2, 5, 1, 32)}, r"sin must have shape \[1, 5, 1, 32\], got \[2, 5, 1, 32\]"),
    ],
)
def test_errors(change, message):
    x, _, weight, cos, sin = inputs((2, 5, 3, 64), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="rms_norm_rotary: " + message):
        rms_norm_rotary(**{"x": x, "weight": weight, "cos": cos, "sin": sin, "eps": EPS, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": torch.zeros(2, 5, 64, 3).transpose(2, 3)}, "dy must have stride 1 in its last dimension"),
        ({"dy": torch.zeros(2, 5, 4, 64)}, r"x_codes must have shape \[40, 64\], got \[30, 64\]"),
        ({"rstd": torch.ones(29)}, r"rstd must have shape \[30\], got \[29\]"),
        ({"weight": torch.ones(32)}, r"weight must have shape \[64\], got \[32\]"),
        ({"cos": torch.zeros(1, 4, 1, 32)}, r"cos must have shape \[1, 5, 1, 32\], got \[1, 4, 1, 32\]"),
    ],
)
def test_backward_errors(change, message):
    x, dy, weight, cos, sin = inputs((2, 5, 3, 64), torch.float32, "cpu")
    _, saved, rstd = rms_norm_rotary(x, weight, cos, sin, EPS, training=True)
    given = {"dy": dy, "x": saved, "rstd": rstd, "weight": weight, "cos": cos, "sin": sin}
    with pytest.raises(RuntimeError, match="rms_norm_rotary_backward: " + message):
        rms_norm_rotary_backward(**{**given, **change})
    with pytest.raises(ValueError, match=r"x.group must be \(1, 128\), got \(128, 1\)"):
        rms_norm_rotary_backward(**{**given, "x": quantize(rows_of(x), (128, 1))})
