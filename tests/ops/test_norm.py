"""RMS norm, alone and fused with casts: against the reference, its own parts, and gradients in fp64."""

import pytest
import torch

from eightfold.ops.norm import (
    add_rms_norm,
    add_rms_norm_quantize,
    rms_norm,
    rms_norm_backward,
    rms_norm_columns,
    rms_norm_quantize,
)
from eightfold.ops.quant import quantize
from eightfold.reference import norm as reference
from fused_bytes import check_layout, close_cast, same_bytes, same_cast
from norm_inputs import DTYPES, EPS, data

ops = torch.ops.eightfold
SHAPES = [
    (0, 256),
    (1, 16),
    (300, 64),
    (70, 96),
    (1031, 128),
    (3, 129),
    (130, 144),
    (257, 1000),
    (128, 2176),
    (20, 8192),
    (140, 3584),
    (9, 8320),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_the_reference(shape, dtype, device):
    x, w = data(*shape, dtype, device)
    for weight in (w, w.bfloat16()):
        y, codes, scales, rstd = ops.rms_norm(x, weight, EPS, True)
        want_y, want_codes, want_scales, want_rstd = reference.rms_norm(x, weight, EPS, True)
        torch.testing.assert_close(rstd, want_rstd, rtol=1e-6, atol=0)
        torch.testing.assert_close(y, want_y, rtol=2**-7 if dtype == torch.bfloat16 else 2e-6, atol=0)
        same_bytes(codes, want_codes)  # nothing but the cast of x
        same_bytes(scales, want_scales)
        check_layout(codes, scales, (1, 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_ops_are_the_reference(shape, dtype, device):
    x, w = data(*shape, dtype, device)
    residual = torch.randn_like(x)
    for out, want in (
        (ops.rms_norm_quantize(x, w, EPS, True), reference.rms_norm_quantize(x, w, EPS, True)),
        (
            ops.add_rms_norm_quantize(x, residual, w, EPS, True)[1:],
            reference.add_rms_norm_quantize(x, residual, w, EPS, True)[1:],
        ),
    ):
        for i, group in ((0, (1, 128)), (2, (128, 1)), (4, (1, 128))):
            close_cast(*out[i : i + 2], *want[i : i + 2])
            check_layout(*out[i : i + 2], group)
        torch.testing.assert_close(out[6], want[6], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_is_unfused_to_the_byte(shape, dtype, device):
    x, w = data(*shape, dtype, device)
    residual = torch.randn_like(x)
    total, fused = add_rms_norm_quantize(x, residual, w, EPS, training=True)
    same_bytes(total, x + residual)
    for weight in (w, w.bfloat16()):
        both = add_rms_norm(x, residual, weight, EPS)
        for found, want in zip(both, (total, rms_norm(total, weight, EPS)), strict=True):
            same_bytes(found, want)
            assert found.stride() == want.stride()
    same_cast(fused.rows, quantize(rms_norm(total, w, EPS), (1, 128)))
    same_cast(fused.cols, quantize(rms_norm(total, w, EPS), (128, 1)))
    same_cast(fused.input, quantize(total, (1, 128)))
    alone = rms_norm_quantize(total, w, EPS, training=True)
    for name in ("rows", "cols", "input"):
        same_cast(getattr(fused, name), getattr(alone, name))
    same_bytes(fused.rstd, alone.rstd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_columns_from_codes_are_the_reference_to_the_byte(shape, dtype, device):
    x, w = data(*shape, dtype, device)
    saved = rms_norm_quantize(x, w, EPS, training=True)
    for weight in (w, w.bfloat16()):
        args = (saved.input.codes, saved.input.scales, saved.rstd, weight, dtype)
        out, want = ops.rms_norm_columns(*args), reference.rms_norm_columns(*args)
        for a, b in zip(out, want, strict=True):
            same_bytes(a, b)
        check_layout(*out, (128, 1))
    if x.numel():
        again = rms_norm_columns(saved.input, saved.rstd, w, dtype).dequantize(torch.float32).double()
        once = saved.cols.dequantize(torch.float32).double()
        assert 1e-4 < (again - once).norm() / once.norm() < 0.045  # two roundings of 2.6 % beside one


def test_columns_of_a_bad_row_are_marked(device):
    x, w = data(130, 256, torch.bfloat16, device, outliers=False)
    x[129, 3] = float("nan")
    saved = rms_norm_quantize(x, w, EPS, training=True)
    assert rms_norm_columns(saved.input, saved.rstd, w).scales.isnan()[1].all()
    assert rms_norm_columns(saved.input, saved.rstd, w).scales[0].isfinite().all()
    with pytest.raises(ValueError, match=r"rms_norm_columns: x.group must be \(1, 128\)"):
        rms_norm_columns(saved.cols, saved.rstd, w)
    for args, message in (
        ((saved.input.codes, saved.input.scales, saved.rstd[1:], w, torch.bfloat16), r"rstd must have shape \[130\]"),
        ((saved.input.codes, saved.input.scales, saved.rstd, w[1:], torch.bfloat16), r"weight must have shape \[256\]"),
        ((saved.input.codes, saved.input.scales, saved.rstd, w, torch.half), "dtype must be bfloat16 or float32"),
        ((x, saved.input.scales, saved.rstd, w, torch.half), "x_codes must be float8_e4m3fn, got bfloat16"),
    ):
        with pytest.raises(RuntimeError, match="rms_norm_columns: " + message):
            ops.rms_norm_columns(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_gives_the_training_rows_and_nothing_else(dtype, device):
    x, w = data(130, 400, dtype, device)
    same_cast(rms_norm_quantize(x, w, EPS).rows, rms_norm_quantize(x, w, EPS, training=True).rows)
    total, casts = add_rms_norm_quantize(x, x, w, EPS)
    same_bytes(total, x + x)
    same_cast(casts.rows, add_rms_norm_quantize(x, x, w, EPS, training=True)[1].rows)
    assert casts[1:] == (None, None, None)
    same_bytes(ops.rms_norm(x, w, EPS, False)[0], ops.rms_norm(x, w, EPS, True)[0])
    assert [t.shape for t in ops.rms_norm(x, w, EPS, False)[1:]] == [(0, 0), (0, 0), (0,)]
    assert [t.shape for t in ops.rms_norm_quantize(x, w, EPS, False)[2:]] == [(0, 0)] * 4 + [(0,)]


@pytest.mark.parametrize("cols", [64, 896, 4096])
def test_a_row_depends_on_itself_alone(cols, device):
    x, w = data(70, cols, torch.bfloat16, device)
    whole = ops.rms_norm_quantize(x, w, EPS, True)
    for rows in (slice(0, 1), slice(69, 70), slice(3, 40)):
        part = ops.rms_norm_quantize(x[rows].contiguous(), w, EPS, True)
        for i in (0, 1, 4, 5, 6):
            same_bytes(part[i], whole[i][rows])


@pytest.mark.parametrize("cols", [136, 256, 1000, 2176, 3584, 4096, 5120, 8192, 8200])
def test_few_rows_give_the_bytes_of_training(cols, device):
    x, w = data(150, cols, torch.bfloat16, device)
    residual = torch.randn_like(x)
    for weight in (w, w.bfloat16()):
        total, want = add_rms_norm_quantize(x, residual, weight, EPS, training=True)
        alone = ops.rms_norm_quantize(x, weight, EPS, True)[:2]
        for m in (1, 2, 31, 128, 129):
            part, casts = add_rms_norm_quantize(x[:m], residual[:m], weight, EPS)
            same_bytes(part, total[:m])
            same_bytes(casts.rows.codes, want.rows.codes[:m])
            same_bytes(casts.rows.scales, want.rows.scales[:m])
            for got, rows in zip(ops.rms_norm_quantize(x[:m], weight, EPS, False)[:2], alone, strict=True):
                same_bytes(got, rows[:m])
            same_bytes(rms_norm(x[:m], weight, EPS), ops.rms_norm(x, weight, EPS, True)[0][:m])
            same_bytes(add_rms_norm(x[:m], residual[:m], weight, EPS)[1], rms_norm(part, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_memory_gives_the_same_bytes(dtype, device):
    x, w = data(40, 512, dtype, device)
    shifted = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].view_as(x).copy_(x)
    dy = torch.randn_like(x)
    for a, b in zip(ops.rms_norm_quantize(x, w, EPS, True), ops.rms_norm_quantize(shifted, w, EPS, True), strict=True):
        same_bytes(a, b)
    for a, b in zip(add_rms_norm(x, dy, w, EPS), add_rms_norm(shifted, dy, w, EPS), strict=True):
        same_bytes(a, b)
    rstd = ops.rms_norm(x, w, EPS, True)[3]
    for a, b in zip(rms_norm_backward(dy, x, rstd, w), rms_norm_backward(dy, shifted, rstd, w), strict=True):
        same_bytes(a, b)


def test_values_against_fp64_and_rounding_bias(device):
    x, w = data(64, 4096, torch.bfloat16, device, outliers=False)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + EPS).sqrt() * w.double()
    error = (rms_norm(x, w, EPS).double() - exact) / exact.abs().clamp(min=1e-30)
    assert error.abs().max() <= 2**-8 * 1.01  # half a bf16 step
    assert error.mean().abs() < 2e-5  # nearest even has no bias; truncation would show 2e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_marks_its_row_and_no_other(bad, device):
    x, w = data(200, 300, torch.bfloat16, device)
    x[130, 7] = bad
    codes, scales, col_codes, col_scales, _, x_scales, rstd = ops.rms_norm_quantize(x, w, EPS, True)
    good = torch.arange(200, device=device) != 130
    assert scales[130].isnan()[0]
    assert (codes.view(torch.uint8)[130, :128] == 0x7F).all()
    assert scales[good].isfinite().all()
    assert rstd[good].isfinite().all()
    assert x_scales[130].isnan().tolist() == [True, False, False]
    assert col_scales[0].isfinite().all()  # rows 0 to 127
    assert col_scales[1, 7].isnan()
    assert (col_codes.view(torch.uint8)[128:, 7] == 0x7F).all()


def test_zero_rows_and_tiny_values_stay_finite(device):
    x = torch.zeros(4, 256, device=device, dtype=torch.bfloat16)
    x[1] = 1e-30
    codes, scales, *_, rstd = ops.rms_norm_quantize(x, torch.ones(256, device=device), EPS, True)
    torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5))
    assert scales.isfinite().all()
    assert (codes.float()[[0, 2, 3]] == 0).all()


def test_bits_do_not_depend_on_threads_or_run(device):
    x, w = data(300, 1040, torch.bfloat16, device)
    dy = torch.randn_like(x)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            forward = ops.add_rms_norm_quantize(x, dy, w, EPS, True)
            runs.append([*forward, *ops.rms_norm_backward(dy, x, None, forward[7], w, x)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            same_bytes(a, b)


def test_errors_name_the_argument_and_the_values(device):
    x, w = data(8, 256, torch.bfloat16, device)
    rstd = torch.ones(8, device=device)
    codes, scales = ops.quantize(x, [1, 128])
    for call, message in (
        (lambda: rms_norm(x.half(), w), r"rms_norm: x must be bfloat16 or float32, got float16"),
        (lambda: rms_norm(x[0], w), r"rms_norm: x must have 2 dimensions, got shape \[256\]"),
        (
            lambda: rms_norm(x.t(), w[:8]),
            r"rms_norm: x must be contiguous, got shape \[256, 8\] with strides \[1, 256\]",
        ),
        (lambda: rms_norm(x, w[:128]), r"rms_norm: weight must have shape \[256\], got \[128\]"),
        (lambda: rms_norm(x, w.half()), r"rms_norm: weight must be bfloat16 or float32, got float16"),
        (lambda: rms_norm(x, w, -1.0), r"rms_norm: eps must not be negative, got -1"),
        (lambda: add_rms_norm(x, x[:4], w), r"add_rms_norm: residual must have shape \[8, 256\], got \[4, 256\]"),
        (lambda: add_rms_norm(x, x.t(), w[:8]), r"add_rms_norm: weight must have shape \[256\], got \[8\]"),
        (
            lambda: add_rms_norm_quantize(x, x.float(), w),
            r"add_rms_norm_quantize: residual must be bfloat16, got float32",
        ),
        (
            lambda: add_rms_norm_quantize(x, x[:4], w),
            r"add_rms_norm_quantize: residual must have shape \[8, 256\], got \[4, 256\]",
        ),
        (lambda: rms_norm_backward(x, x, rstd[:7], w), r"rms_norm_backward: rstd must have shape \[8\], got \[7\]"),
        (lambda: rms_norm_backward(x, x.float(), rstd, w), r"rms_norm_backward: x must be bfloat16, got float32"),
        (
            lambda: ops.rms_norm_backward(x, codes, scales.contiguous(), rstd, w, None),
            r"rms_norm_backward: x_scales must have stride 1 along the rows, as quantize writes it, got shape \[8, 2\]",
        ),
        (
            lambda: ops.rms_norm_backward(x, x, scales, rstd, w, None),
            r"rms_norm_backward: x must be float8_e4m3fn, got bfloat16",
        ),
        (
            lambda: rms_norm_backward(x, x, rstd, w, x[:, :128]),
            r"rms_norm_backward: residual_grad must have shape \[8, 256\], got \[8, 128\]",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(ValueError, match=r"x.group must be \(1, 128\), got \(128, 1\)"):
        rms_norm_backward(x, quantize(x, (128, 1)), rstd, w)


@pytest.mark.gpu
def test_too_many_features_for_the_kernel():
    x = torch.zeros(2, 16400, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="x has 16400 features; the CUDA kernel takes at most 16384"):
        rms_norm(x, torch.ones(16400, device="cuda"))


@pytest.mark.gpu
def test_cpu_and_cuda_agree():
    x, w = data(130, 4096, torch.bfloat16, "cpu")
    cpu = ops.rms_norm_quantize(x, w, EPS, True)
    cuda = [t.cpu() for t in ops.rms_norm_quantize(x.cuda(), w.cuda(), EPS, True)]
    for i in (0, 2):
        close_cast(cuda[i], cuda[i + 1], cpu[i], cpu[i + 1])
    same_bytes(cuda[4], cpu[4])
    same_bytes(cuda[5], cpu[5])
    with pytest.raises(RuntimeError, match="weight is on cpu"):
        rms_norm(x.cuda(), w)


def _calls(device):
    x, w = data(20, 272, torch.bfloat16, device)
    q = reference.rms_norm_quantize(x, w, EPS, True)
    codes, scales = ops.quantize(x, [1, 128])
    yield ops.rms_norm, (x, w, EPS, True)
    yield ops.add_rms_norm, (x, x, w, EPS)
    for training in (True, False):
        yield ops.rms_norm_quantize, (x, w, EPS, training)
        yield ops.add_rms_norm_quantize, (x, x, w, EPS, training)
    yield ops.rms_norm_columns, (codes, scales, q[6], w, torch.bfloat16)
    yield ops.rms_norm_backward, (x, codes, scales, q[6], w, x)
    yield ops.rms_norm_backward, (x, x, None, q[6], w, None)


# opcheck's own test_schema computes with the inputs, which torch cannot do in FP8; this is what it would check.
def test_inputs_are_left_alone(device):
    for op, args in _calls(device):
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        op(*args)
        for a, b in zip(args, before, strict=True):
            if isinstance(a, torch.Tensor):
                same_bytes(a, b)


@pytest.mark.filterwarnings("ignore")
def test_opcheck(device):
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in _calls(device):
        torch.library.opcheck(op.default, args, test_utils=checks)


def test_compiles_as_one_graph(device):
    for op, args in _calls(device):
        torch._dynamo.reset()  # the lambda is one function to it, which it compiles eight times at most
        compiled = torch.compile(lambda *a, op=op: op(*a), fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(*args), op(*args), strict=True):
            same_bytes(a, b)
            assert a.stride() == b.stride()


@pytest.mark.gpu
def test_training_in_several_streams():
    """Tiles wait for tiles of their own launch: launches that share the device must not stop each other."""
    inputs = [data(rows, cols, torch.bfloat16, "cuda") for rows, cols in ((1000, 4096), (300, 8192), (3000, 512))]
    want = [ops.rms_norm_quantize(x, w, EPS, True) for x, w in inputs]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    got = []
    for turn in range(12):
        with torch.cuda.stream(streams[turn % 4]):
            got.append(ops.rms_norm_quantize(*inputs[turn % 3], EPS, True))
    torch.cuda.synchronize()
    for turn, out in enumerate(got):
        for a, b in zip(out, want[turn % 3], strict=True):
            same_bytes(a, b)


@pytest.mark.gpu
def test_graph_capture():
    for op, args in _calls("cuda"):
        expected = op(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(*args)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(out, expected, strict=True):
            same_bytes(a, b)
