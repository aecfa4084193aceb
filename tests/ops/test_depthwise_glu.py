"""SiLU, depthwise 3x3 and gate in one pass, forward and backward: against fp64, their own parts, and their bits."""

import pytest
import torch
import torch.nn.functional as F

from eightfold.ops import depthwise_glu, depthwise_glu_backward, depthwise_glu_quantize, quantize
from eightfold.reference import conv as reference
from fused_bytes import check_layout, close_cast, same_bytes, same_cast

ops = torch.ops.eightfold
DTYPES = [torch.bfloat16, torch.float32]
# Images that a GPU's tiles do not fill, fill, and cross; groups of channels with tails.
SHAPES = [
    (0, 4, 4, 16),
    (1, 1, 1, 8),
    (2, 5, 7, 24),
    (1, 32, 32, 136),
    (3, 1, 40, 64),
    (2, 33, 3, 128),
    (1, 9, 65, 200),
    (2, 40, 19, 320),
]


def data(shape, dtype, device, weight_dtype=torch.float32, plane=False):
    batch, height, width, channels = shape
    if device.type == "cuda" and dtype != torch.bfloat16:
        pytest.skip("bfloat16 alone on CUDA")
    x = (torch.randn(batch, height, width, 2 * channels, device=device) * 2).to(dtype)
    weight = torch.randn(2 * channels, *(() if plane else (1,)), 3, 3, device=device) * 0.5
    bias = torch.randn(2 * channels, device=device) * 0.5
    return x, weight.to(weight_dtype), bias.to(weight_dtype)


def exact(x, weight, bias):
    """As SANA's own block has it, in the dtype of its arguments."""
    s = F.silu(x).permute(0, 3, 1, 2)
    d = F.conv2d(s, weight.reshape(-1, 1, 3, 3), bias, padding=1, groups=weight.shape[0])
    value, gate = d.chunk(2, 1)
    return (value * F.silu(gate)).permute(0, 2, 3, 1)


def fp64_gradients(dy, *inputs):
    leaves = [t.double().detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(exact(*leaves), leaves, dy.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_torch(shape, dtype):
    args = data(shape, dtype, torch.device("cpu"))
    if shape[0] == 0:
        return
    doubles = [t.double() for t in args]
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    want = exact(*doubles)
    atol = 2e-6 * float(want.abs().max())
    torch.testing.assert_close(reference.depthwise_glu(*args).double(), want, rtol=rtol, atol=atol)
    dy = torch.randn(*shape).to(dtype)
    for got, want in zip(reference.depthwise_glu_backward(dy, *args), fp64_gradients(dy, *args), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_against_fp64(shape, dtype, device):
    for weight_dtype, plane in ((torch.float32, False), (torch.bfloat16, True)):
        args = data(shape, dtype, device, weight_dtype, plane)
        y = depthwise_glu(*args)
        assert (y.shape, y.dtype, y.is_contiguous()) == (torch.Size(shape), dtype, True)
        if y.numel() == 0:
            continue
        want = exact(*(t.double() for t in args))
        step = 2**-8 * 1.001 if dtype == torch.bfloat16 else 1e-6
        assert ((y.double() - want).abs() <= step * want.abs() + 5e-6 * want.abs().max()).all()
        if dtype == torch.bfloat16 and y.numel() > 4000:  # nearest even has no bias; truncation would show 2e-3
            assert ((y.double() - want) / want.abs().clamp(min=1e-6)).mean().abs() < 3e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_is_the_cast_of_the_output(shape, dtype, device):
    args = data(shape, dtype, device)
    y = depthwise_glu(*args).flatten(0, 2)
    got = depthwise_glu_quantize(*args)
    same_cast(got, quantize(y, (1, 128)))
    check_layout(got.codes, got.scales, (1, 128))
    close_cast(got.codes, got.scales, *reference.depthwise_glu_quantize(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_against_fp64(shape, dtype, device):
    for weight_dtype, plane in ((torch.float32, False), (torch.bfloat16, True)):
        args = data(shape, dtype, device, weight_dtype, plane)
        dy = torch.randn(shape, device=device).to(dtype)
        got = depthwise_glu_backward(dy, *args)
        assert [t.dtype for t in got] == [dtype, torch.float32, torch.float32]
        assert [t.shape for t in got] == [t.shape for t in args]
        if dy.numel() == 0:
            assert not got[1].any()
            assert not got[2].any()
            continue
        want = fp64_gradients(dy, *args)
        step = 2**-8 * 1.001 if dtype == torch.bfloat16 else 1e-6
        assert ((got[0].double() - want[0]).abs() <= step * want[0].abs() + 5e-6 * want[0].abs().max()).all()
        for a, b in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-5 * float(b.abs().max()))


def test_autograd(device):
    x, weight, bias = (t.requires_grad_() for t in data((2, 6, 9, 40), torch.bfloat16, device, torch.bfloat16))
    y = depthwise_glu(x, weight, bias)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True)
    assert [t.dtype for t in got] == [torch.bfloat16] * 3
    want = fp64_gradients(dy, x, weight, bias)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-5 * float(b.abs().max()))
    strided = dy.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    for a, b in zip(torch.autograd.grad(y, (x, weight, bias), strided), got, strict=True):
        same_bytes(a, b)


@pytest.mark.parametrize("shape", [(3, 5, 7, 40), (3, 34, 33, 136)], ids=str)
def test_an_image_does_not_depend_on_its_neighbours(shape, device):
    """Bits of one image, and of one whose neighbours, in the batch and in memory, hold nothing but NaN."""
    x, weight, bias = data(shape, torch.bfloat16, device)
    dy = torch.randn(shape, device=device).bfloat16()
    for spoil in (False, True):
        beside, dbeside = x.clone(), dy.clone()
        if spoil:
            beside[[0, 2]], dbeside[[0, 2]] = torch.nan, torch.nan
        alone = x[1:2].clone(), dy[1:2].clone()
        same_bytes(depthwise_glu(beside, weight, bias)[1:2], depthwise_glu(alone[0], weight, bias))
        pixels = shape[1] * shape[2]
        whole, part = depthwise_glu_quantize(beside, weight, bias), depthwise_glu_quantize(alone[0], weight, bias)
        same_bytes(whole.codes[pixels : 2 * pixels], part.codes)
        same_bytes(whole.scales[pixels : 2 * pixels], part.scales)
        dx = depthwise_glu_backward(dbeside, beside, weight, bias)[0]
        same_bytes(dx[1:2], depthwise_glu_backward(alone[1], alone[0], weight, bias)[0])


def test_a_pixel_does_not_depend_on_the_size_of_its_image(device):
    x, weight, bias = data((1, 50, 61, 24), torch.bfloat16, device)
    whole = depthwise_glu(x, weight, bias)
    part = depthwise_glu(x[:, 7:31, 5:48].contiguous(), weight, bias)
    same_bytes(part[:, 1:-1, 1:-1].contiguous(), whole[:, 8:30, 6:47].contiguous())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_marks_its_window_and_no_more(bad, device):
    x, weight, bias = data((2, 20, 20, 136), torch.bfloat16, device)
    x[1, 4, 9, 130] = bad
    marked = (~depthwise_glu(x, weight, bias).isfinite()).nonzero().tolist()
    assert marked == [[1, row, col, 130] for row in (3, 4, 5) for col in (8, 9, 10)]
    scales = depthwise_glu_quantize(x, weight, bias).scales.isnan().nonzero().tolist()
    assert scales == [[400 + 20 * row + col, 1] for row in (3, 4, 5) for col in (8, 9, 10)]


def test_extreme_values_stay_finite(device):
    x = torch.zeros(1, 1, 8, 16, device=device, dtype=torch.bfloat16)
    x[0, 0, :, :8] = 1
    x[0, 0, :, 8:] = torch.tensor([-3e38, -1e4, -100, -0.0, 0, 100, 1e4, 1e30])[:, None]
    weight = torch.zeros(16, 3, 3, device=device)
    weight[:, 1, 1] = 1
    y = depthwise_glu(x, weight, torch.zeros(16, device=device))
    silu = 1 / (1 + torch.tensor(-1.0).exp())
    torch.testing.assert_close(
        y[0, 0, :, 0].float().cpu(), (silu * torch.tensor([0, 0, 0, 0, 0, 100, 1e4, 1e30])).bfloat16().float()
    )
    assert depthwise_glu_backward(torch.ones_like(y), x, weight, torch.zeros(16, device=device))[0].isfinite().all()


def test_bits_do_not_depend_on_threads_or_run(device):
    args = data((2, 21, 34, 136), torch.bfloat16, device)
    dy = torch.randn(2, 21, 34, 136, device=device).bfloat16()
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            quantised = ops.depthwise_glu_quantize(*args)
            runs.append([ops.depthwise_glu(*args), *quantised, *ops.depthwise_glu_backward(dy, *args)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            same_bytes(a, b)


def test_errors_name_the_argument_and_the_values(device):
    x, weight, bias = data((2, 3, 4, 8), torch.bfloat16, device)
    dy = torch.zeros(2, 3, 4, 8, device=device, dtype=torch.bfloat16)
    for call, message in (
        (lambda: depthwise_glu(x.half(), weight, bias), r"depthwise_glu: x must be bfloat16.*, got float16"),
        (lambda: depthwise_glu(x[0], weight, bias), r"x must have 4 dimensions, got shape \[3, 4, 16\]"),
        (
            lambda: depthwise_glu(x[..., :15].contiguous(), weight, bias),
            r"x must have an even number of channels, values before gates, got shape \[2, 3, 4, 15\]",
        ),
        (
            lambda: depthwise_glu(x.permute(0, 2, 1, 3), weight, bias),
            r"x must be contiguous, got shape \[2, 4, 3, 16\] with strides",
        ),
        (lambda: depthwise_glu(x, weight[:8], bias), r"weight must have shape \[16, 1, 3, 3\], got \[8, 1, 3, 3\]"),
        (
            lambda: depthwise_glu(x, weight[:, 0, :2], bias),
            r"weight must have shape \[16, 3, 3\], got \[16, 2, 3\]",
        ),
        (lambda: depthwise_glu(x, weight.half(), bias), r"weight must be bfloat16 or float32, got float16"),
        (lambda: depthwise_glu_quantize(x, weight, bias[:4]), r"depthwise_glu_quantize: bias must have shape \[16\]"),
        (lambda: depthwise_glu_backward(dy.float(), x, weight, bias), r"dy must be bfloat16, got float32"),
        (
            lambda: depthwise_glu_backward(dy[:1], x, weight, bias),
            r"depthwise_glu_backward: dy must have shape \[2, 3, 4, 8\], got \[1, 3, 4, 8\]",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.gpu
def test_what_cuda_does_not_take():
    x, weight, bias = data((2, 3, 4, 12), torch.bfloat16, torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"x must have a multiple of 16 channels on CUDA, got shape \[2, 3, 4, 24\]"):
        depthwise_glu(x, weight, bias)
    x, weight, bias = data((2, 3, 4, 8), torch.bfloat16, torch.device("cuda"))
    with pytest.raises(RuntimeError, match="x must be bfloat16, got float32"):
        depthwise_glu(x.float(), weight, bias)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x)
    with pytest.raises(RuntimeError, match="x must start at a multiple of 16 bytes, got an address 2 past one"):
        depthwise_glu(shifted, weight, bias)


@pytest.mark.gpu
def test_cpu_and_cuda_agree():
    args = data((2, 21, 34, 136), torch.bfloat16, torch.device("cpu"))
    dy = torch.randn(2, 21, 34, 136).bfloat16()
    cuda = [t.cuda() for t in args]
    torch.testing.assert_close(depthwise_glu(*cuda).cpu(), depthwise_glu(*args), rtol=2**-7, atol=1e-5)
    close_cast(*(t.cpu() for t in ops.depthwise_glu_quantize(*cuda)), *ops.depthwise_glu_quantize(*args))
    got, want = depthwise_glu_backward(dy.cuda(), *cuda), depthwise_glu_backward(dy, *args)
    for a, b, rtol in zip(got, want, (2**-7, 2e-5, 2e-5), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=1e-5 * float(b.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 32, 32, 5600), (1, 128, 128, 2880)], ids=str)
def test_sizes_of_sana(shape):
    args = data(shape, torch.bfloat16, torch.device("cuda"))
    dy = torch.randn(shape, device="cuda").bfloat16()
    y, want = depthwise_glu(*args), reference.depthwise_glu(*args)
    torch.testing.assert_close(y, want, rtol=2**-7, atol=1e-4)
    same_cast(depthwise_glu_quantize(*args), quantize(y.flatten(0, 2), (1, 128)))
    for a, b in zip(depthwise_glu_backward(dy, *args), reference.depthwise_glu_backward(dy, *args), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-4 * float(b.abs().max()))


def _calls(device):
    args = data((2, 5, 6, 24), torch.bfloat16, device)
    yield ops.depthwise_glu, args
    yield ops.depthwise_glu_quantize, args
    yield ops.depthwise_glu_backward, (torch.randn(2, 5, 6, 24, device=device).bfloat16(), *args)


def _tuple(out):
    return out if isinstance(out, (tuple, list)) else (out,)


def test_inputs_are_left_alone(device):
    for op, args in _calls(device):
        before = [a.clone() for a in args]
        op(*args)
        for a, b in zip(args, before, strict=True):
            same_bytes(a, b)


@pytest.mark.filterwarnings("ignore")
def test_opcheck(device):
    for op, args in _calls(device):
        torch.library.opcheck(
            op.default, args, test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        )


def test_compiles_as_one_graph(device):
    for op, args in _calls(device):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a, op=op: op(*a), fullgraph=True, backend="aot_eager")
        for a, b in zip(_tuple(compiled(*args)), _tuple(op(*args)), strict=True):
            same_bytes(a, b)
            assert a.stride() == b.stride()
    args = [t.requires_grad_() for t in data((2, 5, 6, 24), torch.bfloat16, device)]
    compiled = torch.compile(lambda *a: depthwise_glu(*a).float().square().sum(), fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(depthwise_glu(*args).float().square().sum(), args)
    for a, b in zip(torch.autograd.grad(compiled(*args), args), eager, strict=True):
        same_bytes(a, b)


@pytest.mark.gpu
def test_graph_capture():
    for op, args in _calls(torch.device("cuda")):
        expected = _tuple(op(*args))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(*args)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(_tuple(out), expected, strict=True):
            same_bytes(a, b)
